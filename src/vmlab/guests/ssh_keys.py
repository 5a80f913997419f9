"""The keys between this host and one machine: its own key pair, and the host key it showed.

Made on first use, for that machine alone, and kept beside its files. The host key is the one that
its guest showed at the first login, as ssh(1) does with StrictHostKeyChecking=accept-new; a guest
that shows another one later is refused.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmlab.guests.command import Command, CommandChannel, quote
from vmlab.machine.errors import OperationFailed

if TYPE_CHECKING:
    import asyncssh

_AUTHORIZE: Final = (
    "umask 77; cd && mkdir -p .ssh && touch .ssh/authorized_keys && "
    "{{ grep -qxF {key} .ssh/authorized_keys || echo {key} >>.ssh/authorized_keys; }}"
)


@dataclass(frozen=True)
class MachineKeys:
    """The keys in a directory, which is made when they are."""

    directory: Path

    @property
    def private(self) -> Path:
        """The key that we log in with (OpenSSH's format, mode 0600)."""
        return self.directory / "id_ed25519"

    @property
    def pinned(self) -> Path:
        """The host key that the guest showed first (one line, as in authorized_keys)."""
        return self.directory / "host_key.pub"

    def public(self) -> str:
        """The line for authorized_keys; the pair is made if there is none."""
        import asyncssh

        if not self.private.exists():
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            pair = asyncssh.generate_private_key("ssh-ed25519", comment="vmlab")
            with suppress(FileExistsError):
                _place(self.private, pair.export_private_key())
        line = asyncssh.read_private_key(self.private).convert_to_public().export_public_key()
        return line.decode().strip()

    def host_key(self) -> asyncssh.SSHKey | None:
        """The pinned host key, or None before the first login.

        Raises:
            OperationFailed: there is something else in its file.
        """
        import asyncssh

        if not self.pinned.exists():
            return None
        try:
            return asyncssh.read_public_key(self.pinned)
        except asyncssh.KeyImportError as error:
            raise OperationFailed(
                f"{self.pinned} holds no host key: {error}",
                hint="remove it to accept the guest's key anew",
                operation="connect",
            ) from error

    def pin(self, key: asyncssh.SSHKey) -> None:
        """Accept this host key from now on, and no other."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            _place(self.pinned, key.export_public_key())


def _place(path: Path, data: bytes) -> None:
    """Make a file of mode 0600 that is there as a whole or not at all, and never replaced."""
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    try:
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        path.hardlink_to(scratch)
    finally:
        scratch.unlink(missing_ok=True)


async def authorize(keys: MachineKeys, channel: CommandChannel) -> None:
    """Let our key log in as who runs commands on `channel`.

    Raises:
        OperationFailed: the guest cannot keep it.
    """
    said = bytearray()

    async def take(data: bytes) -> None:
        said.extend(data)

    command = Command(_AUTHORIZE.format(key=quote(keys.public())))
    if await channel.run(command, stdout=take, stderr=take) != 0:
        raise OperationFailed(
            f"the guest does not keep our key: {said.decode('utf-8', 'replace').strip()}",
            hint="its ~/.ssh/authorized_keys has to be writable",
            operation="connect",
        )
