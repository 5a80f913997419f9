"""The inside of a lab's machine for people who call without `await`: the names of `Guest`.

No commands of its own: each method is the one of that name of `vmlab.guests.guest.Guest`, run on
the lab's event loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vmlab.guests.command import CommandResult
from vmlab.guests.guest import Guest

__all__ = ["Inside"]

T = TypeVar("T")


class Inside(ABC):
    """What is done inside a machine; seconds are those of the guest's hypervisor's clock."""

    @abstractmethod
    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on the lab's event loop, and wait for it."""

    @abstractmethod
    def inside(self, operation: str) -> Guest:
        """The guest, which has to answer.

        Raises:
            VmlabError: there is none, with why.
        """

    # Commands.

    def execute(
        self,
        command: str | Sequence[str],
        *,
        input: bytes | str | None = None,
        environment: Mapping[str, str] | None = None,
        directory: str | None = None,
        timeout: float | None = None,
    ) -> CommandResult:
        """Run a command, whatever its exit status; see `Guest.execute`."""
        return self.run(
            self.inside("execute").execute(
                command,
                input=input,
                environment=environment,
                directory=directory,
                timeout=timeout,
            )
        )

    def succeed(self, *commands: str, timeout: float | None = None) -> CommandResult:
        """Run commands one after the other; each has to exit with 0. Returns the last result.

        Raises:
            CommandFailed: with what it printed.
        """
        return self.run(self.inside("succeed").succeed(*commands, timeout=timeout))

    def fail(self, *commands: str, timeout: float | None = None) -> CommandResult:
        """Run commands one after the other; none may exit with 0. Returns the last result.

        Raises:
            CommandFailed: one succeeded.
        """
        return self.run(self.inside("fail").fail(*commands, timeout=timeout))

    def systemctl(self, arguments: str, *, timeout: float | None = None) -> CommandResult:
        """Run `systemctl` with arguments, whatever its exit status."""
        return self.run(self.inside("systemctl").systemctl(arguments, timeout=timeout))

    # Waiting.

    def wait_until_succeeds(
        self, command: str, *, timeout: float | None = None, every: float = 1.0
    ) -> CommandResult:
        """Run a command again and again, `every` so many seconds, until it exits with 0."""
        guest = self.inside("wait_until_succeeds")
        return self.run(guest.wait_until_succeeds(command, timeout=timeout, every=every))

    def wait_until_fails(
        self, command: str, *, timeout: float | None = None, every: float = 1.0
    ) -> CommandResult:
        """Run a command again and again, `every` so many seconds, until it does not exit with 0."""
        guest = self.inside("wait_until_fails")
        return self.run(guest.wait_until_fails(command, timeout=timeout, every=every))

    def wait_for_file(self, path: str, *, timeout: float | None = None) -> None:
        """Wait until there is something at `path`."""
        self.run(self.inside("wait_for_file").wait_for_file(path, timeout=timeout))

    def wait_for_open_port(
        self, port: int, *, address: str | None = None, timeout: float | None = None
    ) -> None:
        """Wait until something listens on a TCP port, at `address` or at any."""
        guest = self.inside("wait_for_open_port")
        self.run(guest.wait_for_open_port(port, address=address, timeout=timeout))

    def wait_for_closed_port(
        self, port: int, *, address: str | None = None, timeout: float | None = None
    ) -> None:
        """Wait until nothing listens on a TCP port, at `address` or at any."""
        guest = self.inside("wait_for_closed_port")
        self.run(guest.wait_for_closed_port(port, address=address, timeout=timeout))

    def wait_for_unit(self, unit: str, *, timeout: float | None = None) -> None:
        """Wait until a systemd unit is active.

        Raises:
            OperationFailed: it failed, or stopped with no job that would start it.
        """
        self.run(self.inside("wait_for_unit").wait_for_unit(unit, timeout=timeout))

    # Files.

    def read(self, path: str, *, timeout: float | None = None) -> bytes:
        """The contents of a file.

        Raises:
            ResourceNotFound: it cannot be read.
        """
        return self.run(self.inside("read").read(path, timeout=timeout))

    def write(
        self, path: str, data: bytes | str, *, mode: int = 0o644, timeout: float | None = None
    ) -> None:
        """Make `data` a file's contents; directories above it are made."""
        self.run(self.inside("write").write(path, data, mode=mode, timeout=timeout))

    def copy_in(self, source: str | Path, target: str, *, timeout: float | None = None) -> None:
        """Copy a file or a tree of the host to `target`, which it will be; see `Guest.copy_in`."""
        self.run(self.inside("copy_in").copy_in(Path(source), target, timeout=timeout))

    def copy_out(self, source: str, target: str | Path, *, timeout: float | None = None) -> None:
        """Copy a file or a tree of the guest to `target`, which it will be."""
        self.run(self.inside("copy_out").copy_out(source, Path(target), timeout=timeout))

    # The network.

    def forward_port(self, guest_port: int, host_port: int = 0) -> int:
        """Lead a TCP port of this host's 127.0.0.1 to one of the guest; returns this host's.

        Args:
            guest_port: The port in the guest.
            host_port: The port of this host; 0 is a free one.
        """
        return self.run(self.inside("forward_port").forward_port(guest_port, host_port)).port

    def block(self) -> None:
        """Take the link of every NIC down, as if the cables were pulled."""
        self.run(self.inside("block").block())

    def unblock(self) -> None:
        """Bring back the links that `block` took down."""
        self.run(self.inside("unblock").unblock())
