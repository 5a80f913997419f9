"""What one does with a guest: run commands, wait for things, read and copy files, break it.

The names are those of the NixOS test driver where it has them. Waiting happens inside the guest
(one command that ends when the thing has come), so nothing is polled over the channel.
"""

from __future__ import annotations

import asyncio
import secrets
import shlex
import stat
import time
from collections.abc import AsyncIterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import ClassVar, Final

from vmlab.guests import trees
from vmlab.guests.command import (
    AgentRestarted,
    Command,
    CommandChannel,
    CommandResult,
    Sink,
    quote,
)
from vmlab.guests.forwarding import PortForward, relay
from vmlab.hypervisors.base import Machine
from vmlab.hypervisors.operation import uninterrupted
from vmlab.machine.errors import (
    ChannelClosed,
    DeadlineExceeded,
    OperationFailed,
    ResourceNotFound,
    VmlabError,
)
from vmlab.machine.faults import NetPartition

DEFAULT_TIMEOUT: Final = 900.0
"""Seconds that a command or a wait has when its caller names no timeout, as in the NixOS driver."""

CONNECT_TIMEOUT: Final = 300.0
"""Seconds that a guest has to boot and answer."""

_PAUSE = "0.05"
_EXCERPT: Final = 2000


class CommandFailed(OperationFailed):
    """A command in the guest did not end as it should have.

    `command`, `status`, `stdout` and `stderr` tell what it did.
    """

    _fields: ClassVar[tuple[str, ...]] = ("command", "status", "stdout", "stderr")

    def __init__(self, result: CommandResult, expected: str, *, machine: str | None = None) -> None:
        self.command = result.command
        self.status = result.status
        self.stdout = result.stdout
        self.stderr = result.stderr
        parts = [f"{result.command!r} exited with status {result.status}, expected {expected}"]
        for label, text in (("stdout", result.stdout), ("stderr", result.stderr)):
            if text.strip():
                parts.append(f"{label}:\n{_tail(text)}")
        super().__init__("\n".join(parts), machine=machine, operation="execute")


def _tail(text: str) -> str:
    text = text.rstrip("\n")
    return text if len(text) <= _EXCERPT else "[...]" + text[-_EXCERPT:]


class Guest:
    """The inside of one machine.

    Args:
        machine: Whose inside.
        channel: How its commands get there.
    """

    def __init__(self, machine: Machine, channel: CommandChannel) -> None:
        self.machine = machine
        self.channel = channel
        self._blocked: dict[str, str] = {}
        self._forwards: list[PortForward] = []

    async def connect(self, *, timeout: float = CONNECT_TIMEOUT) -> None:
        """Wait until the guest answers.

        Raises:
            DeadlineExceeded: it does not within `timeout` seconds.
        """
        await self.channel.connect(timeout=timeout)

    async def ping(self) -> None:
        """Return when the guest has given a sign of life; may be cancelled at any time.

        Raises:
            ChannelClosed: it died.
        """
        await self.channel.ping()

    # Commands.

    async def execute(
        self,
        command: str | Sequence[str],
        *,
        input: bytes | str | AsyncIterable[bytes] | None = None,
        environment: Mapping[str, str] | None = None,
        directory: str | None = None,
        stdout: Sink | None = None,
        stderr: Sink | None = None,
        timeout: float | None = None,
    ) -> CommandResult:
        """Run a command, whatever its exit status.

        Args:
            command: Text for /bin/sh, or words that are passed as they are.
            input: Standard input; None is /dev/null.
            environment: Variables to set for it.
            directory: Where to run it.
            stdout: Takes standard output as it comes; it is then not in the result.
            stderr: Takes standard error as it comes; it is then not in the result.
            timeout: Seconds; then the command is ended by SIGTERM, and SIGKILL if need be.

        Raises:
            DeadlineExceeded: it ran longer than `timeout`.
            ChannelClosed: the guest died.
        """
        text = command if isinstance(command, str) else shlex.join(command)
        given = Command(
            text,
            input.encode() if isinstance(input, str) else input,
            dict(environment or {}),
            directory,
        )
        return await self._execute(given, stdout, stderr, timeout)

    async def _execute(
        self,
        given: Command,
        stdout: Sink | None = None,
        stderr: Sink | None = None,
        timeout: float | None = None,
    ) -> CommandResult:
        text = given.text
        out, err = bytearray(), bytearray()
        limit = DEFAULT_TIMEOUT if timeout is None else timeout
        begun = time.monotonic()
        try:
            async with asyncio.timeout(limit):
                status = await self.channel.run(
                    given, stdout=stdout or _into(out), stderr=stderr or _into(err)
                )
        except TimeoutError:
            error = DeadlineExceeded(
                f"{_tail(text)!r}",
                seconds=limit,
                machine=self.machine.name,
                hint="the command was ended in the guest; give it a longer timeout if it needs one",
            )
            if out or err:
                error.add_note(
                    f"until then it printed: {_tail((out + err).decode('utf-8', 'replace'))}"
                )
            raise error from None
        seconds = time.monotonic() - begun
        return CommandResult(text, status, bytes(out), bytes(err), seconds)

    async def succeed(self, *commands: str, timeout: float | None = None) -> CommandResult:
        """Run commands one after the other; each has to exit with 0. Returns the last result.

        Raises:
            CommandFailed: with what it printed.
        """
        result = CommandResult("", 0, b"", b"", 0.0)
        for command in commands:
            result = await self.execute(command, timeout=timeout)
            if not result.ok:
                raise CommandFailed(result, "0", machine=self.machine.name)
        return result

    async def fail(self, *commands: str, timeout: float | None = None) -> CommandResult:
        """Run commands one after the other; none may exit with 0. Returns the last result.

        Raises:
            CommandFailed: one succeeded.
        """
        result = CommandResult("", 1, b"", b"", 0.0)
        for command in commands:
            result = await self.execute(command, timeout=timeout)
            if result.ok:
                raise CommandFailed(result, "another one than 0", machine=self.machine.name)
        return result

    # Waiting.

    async def wait_until_succeeds(
        self, command: str, *, timeout: float | None = None, every: float = 1.0
    ) -> CommandResult:
        """Run a command again and again, `every` so many seconds, until it exits with 0."""
        # The x keeps newlines at the end, which $() would take away.
        return await self._wait(
            f"until o=$( ( {command}\n) 2>/dev/null; s=$?; echo x; exit $s ); do sleep {every}; "
            'done; printf %s "${o%x}"',
            f"{command!r} to succeed",
            timeout,
        )

    async def wait_until_fails(
        self, command: str, *, timeout: float | None = None, every: float = 1.0
    ) -> CommandResult:
        """Run a command again and again, `every` so many seconds, until it does not exit with 0."""
        return await self._wait(
            f"while ( {command}\n) >/dev/null 2>&1; do sleep {every}; done",
            f"{command!r} to fail",
            timeout,
        )

    async def wait_for_file(self, path: str, *, timeout: float | None = None) -> None:
        """Wait until there is something at `path`."""
        name = quote(path)
        await self._wait(
            f"until [ -e {name} ] || [ -L {name} ]; do sleep {_PAUSE}; done",
            f"file {path}",
            timeout,
        )

    async def wait_for_open_port(
        self, port: int, *, address: str | None = None, timeout: float | None = None
    ) -> None:
        """Wait until something listens on a TCP port, at `address` or at any."""
        await self._wait(
            f"until {_listening(port, address)}; do sleep {_PAUSE}; done",
            f"TCP port {port} to be open",
            timeout,
        )

    async def wait_for_closed_port(
        self, port: int, *, address: str | None = None, timeout: float | None = None
    ) -> None:
        """Wait until nothing listens on a TCP port, at `address` or at any."""
        await self._wait(
            f"while {_listening(port, address)}; do sleep {_PAUSE}; done",
            f"TCP port {port} to be closed",
            timeout,
        )

    async def wait_for_unit(self, unit: str, *, timeout: float | None = None) -> None:
        """Wait until a systemd unit is active.

        Raises:
            OperationFailed: it failed, or stopped with no job that would start it.
        """
        name = quote(unit)
        result = await self._wait(
            f"while :; do s=$(systemctl show -p ActiveState --value {name}); case $s in "
            "active) exit 0 ;; failed) echo failed; exit 1 ;; inactive) "
            f'[ "$(systemctl show -p Job --value {name})" ] || {{ echo inactive; exit 1; }} ;; '
            f"esac; sleep {_PAUSE}; done",
            f"unit {unit}",
            timeout,
        )
        if not result.ok:
            status = await self.execute(["systemctl", "status", "--no-pager", "-n", "30", unit])
            raise OperationFailed(
                f"unit {unit!r} is {result.stdout.strip() or 'unknown'}, not active:\n"
                f"{_tail(status.stdout or result.stderr)}",
                hint=f"`journalctl -u {unit}` in the guest tells more",
                machine=self.machine.name,
                operation="wait_for_unit",
            )

    async def wait_for_console_text(
        self, text: str, *, console: str = "serial", timeout: float | None = None
    ) -> None:
        """Wait until the console has printed `text`, from boot on."""
        limit = DEFAULT_TIMEOUT if timeout is None else timeout
        wanted = text.encode()
        async with await self.machine.console(console) as terminal:
            seen = await terminal.log()
            try:
                async with asyncio.timeout(limit):
                    while wanted not in seen:
                        data = await terminal.read()
                        if not data:
                            raise ChannelClosed(
                                f"the console ended before it printed {text!r}",
                                hint="the machine died or was stopped",
                                machine=self.machine.name,
                            )
                        seen = await terminal.log()
            except TimeoutError:
                raise DeadlineExceeded(
                    f"waiting for {text!r} on the console",
                    seconds=limit,
                    machine=self.machine.name,
                ) from None

    async def systemctl(self, arguments: str, *, timeout: float | None = None) -> CommandResult:
        """Run `systemctl` with arguments, whatever its exit status."""
        return await self.execute(f"systemctl {arguments}", timeout=timeout)

    async def _wait(self, script: str, what: str, timeout: float | None) -> CommandResult:
        limit = DEFAULT_TIMEOUT if timeout is None else timeout
        try:
            return await self.execute(script, timeout=limit)
        except DeadlineExceeded:
            raise DeadlineExceeded(
                f"waiting for {what}", seconds=limit, machine=self.machine.name
            ) from None

    # Files.

    async def read(self, path: str, *, timeout: float | None = None) -> bytes:
        """The contents of a file.

        Raises:
            ResourceNotFound: it cannot be read.
        """
        result = await self.execute(f"cat -- {quote(path)}", timeout=timeout)
        if not result.ok:
            raise ResourceNotFound(
                f"cannot read {path!r} in the guest: {result.stderr.strip()}",
                machine=self.machine.name,
                operation="read",
            )
        return result.stdout_bytes

    async def write(
        self,
        path: str,
        data: bytes | str | AsyncIterable[bytes],
        *,
        mode: int = 0o644,
        timeout: float | None = None,
    ) -> None:
        """Make `data`, or pieces as they come, a file's contents; directories above it are made.

        A file that is there is replaced as a whole, through a symbolic link too; a device, or a
        file where none can be made beside it (/proc, /sys), is written to as it is.

        Raises:
            CommandFailed: it cannot be written; the file that was there is untouched.
        """
        if isinstance(data, str):
            data = data.encode()
        command = _WRITE.format(
            name=quote(path),
            parent=quote(str(PurePosixPath(path).parent)),
            token=secrets.token_hex(6),
            mode=f"{mode:o}",
            take=_take('"$p"', len(data) if isinstance(data, bytes) else 0),
        )
        await self.give(command, data, timeout=timeout)

    async def give(
        self, script: str, data: bytes | AsyncIterable[bytes], *, timeout: float | None = None
    ) -> None:
        """Run a script with `data`, which it has to read by `take >FILE`, at the best speed.

        Raises:
            CommandFailed: its status is not 0.
        """
        result = await self._execute(Command(script, data, takes=True), timeout=timeout)
        if not result.ok:
            raise CommandFailed(result, "0", machine=self.machine.name)

    async def copy_in(self, source: Path, target: str, *, timeout: float | None = None) -> None:
        """Copy a file or a tree of the host to `target`, which it will be, modes and links kept.

        It appears as a whole: a file that is there is replaced, a directory that is there refused.

        Args:
            source: What to copy.
            target: An absolute path in the guest.
            timeout: Seconds for each part of it: all small files together, and each large one.

        Raises:
            OperationFailed: it cannot be read here.
            CommandFailed: it cannot be written there; nothing of it is left.
        """
        parent, name = _split(target)
        scratch = f"{parent.rstrip('/')}/.vmlab-copy-{secrets.token_hex(6)}"
        words = {
            "parent": quote(parent),
            "target": quote(target),
            "name": quote(f"./{name}"),
            "scratch": quote(scratch),
        }
        plan = await asyncio.to_thread(trees.plan, source)
        large = plan.large
        if plan.single is not None:
            status = plan.single
            script = _COPY_FILE_IN.format(
                **words,
                mode=f"{stat.S_IMODE(status.st_mode):o}",
                time=int(status.st_mtime),
                take=_take('"$s"', status.st_size),
            )
            await self.give(script, trees.contents(source, status.st_size), timeout=timeout)
            return
        stream = trees.packed(source, name, without=large)
        if not large:
            await self.unpack(stream, target, timeout=timeout)
            return
        try:
            script = _UNPACK.format(**words, then="trap - EXIT")
            result = await self.execute(script, input=stream, timeout=timeout)
            if not result.ok:
                raise CommandFailed(result, "0", machine=self.machine.name)
            for path, status in large.items():
                inner = quote(str(PurePosixPath(scratch, name, path)))
                script = _FILL.format(
                    take=_take(inner, status.st_size), name=inner, time=int(status.st_mtime)
                )
                pieces = trees.contents(source / path, status.st_size)
                await self.give(script, pieces, timeout=timeout)
            await self.succeed(_SETTLE.format(**words), timeout=timeout)
        except BaseException:
            await uninterrupted(self._forget(scratch))
            raise

    async def unpack(
        self, stream: AsyncIterable[bytes], target: str, *, timeout: float | None = None
    ) -> None:
        """Unpack a tar stream of one file or tree, which bears the last name of `target`, there.

        It appears as a whole: a file that is there is replaced, a directory that is there refused.

        Raises:
            CommandFailed: it cannot be written there, or is no such stream; nothing of it is left.
        """
        parent, name = _split(target)
        words = {
            "parent": quote(parent),
            "target": quote(target),
            "name": quote(f"./{name}"),
            "scratch": quote(f"{parent.rstrip('/')}/.vmlab-copy-{secrets.token_hex(6)}"),
        }
        script = _UNPACK.format(**words, then=_SETTLE.format(**words))
        result = await self.execute(script, input=stream, timeout=timeout)
        if not result.ok:
            raise CommandFailed(result, "0", machine=self.machine.name)

    async def pack(self, source: str, take: Sink, *, timeout: float | None = None) -> None:
        """A tar stream of a file or tree of the guest, under its last name.

        Args:
            source: An absolute path in the guest.
            take: Takes the stream as it comes; while it waits, so does the guest.
            timeout: Seconds for all of it.

        Raises:
            ResourceNotFound: there is nothing at `source`, or it cannot be read.
        """
        parent, name = _split(source)
        result = await self.execute(
            f"cd {quote(parent)} && exec tar -c -f - -- {quote(name)}",
            stdout=take,
            timeout=timeout,
        )
        if not result.ok and not _only_changed(result):
            raise ResourceNotFound(
                f"cannot copy {source!r} out of the guest: {result.stderr.strip()}",
                machine=self.machine.name,
                operation="copy_out",
            )

    async def _forget(self, scratch: str) -> None:
        """Remove what a copy that failed has left, if the guest is there to do so."""
        with suppress(AgentRestarted, ChannelClosed, DeadlineExceeded):
            await self.execute(f"rm -rf {quote(scratch)}", timeout=60)

    async def copy_out(self, source: str, target: Path, *, timeout: float | None = None) -> None:
        """Copy a file or a tree of the guest to `target`, which it will be, modes and links kept.

        Nothing of `target` exists if it fails.

        Raises:
            ResourceNotFound: there is nothing at `source`.
            OperationFailed: it cannot be written here.
        """
        _, name = _split(source)
        with trees.scratch(target) as scratch:
            unpacker = trees.Unpacker(scratch)
            try:
                await self.pack(source, unpacker.take, timeout=timeout)
            finally:
                await unpacker.finish()
            unpacker.check()
            trees.settle(scratch / name, target)

    # Life and death.

    async def boot_id(self) -> str:
        """What is different after every boot (random(4), /proc/sys/kernel/random/boot_id)."""
        return (await self.read("/proc/sys/kernel/random/boot_id", timeout=10)).decode().strip()

    async def reboot(self, *, timeout: float = CONNECT_TIMEOUT) -> None:
        """Reboot from inside and wait until the guest answers again.

        Raises:
            DeadlineExceeded: it did not come back within `timeout` seconds.
        """
        before = await self.boot_id()
        try:
            async with asyncio.timeout(timeout):
                await self._leave("reboot")
                while True:
                    with suppress(
                        AgentRestarted, ChannelClosed, DeadlineExceeded, ResourceNotFound
                    ):
                        await self.channel.connect(timeout=timeout)
                        if await self.boot_id() != before:
                            return
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise DeadlineExceeded(
                "rebooting the guest", seconds=timeout, machine=self.machine.name
            ) from None

    async def refresh(
        self,
        *,
        hostname: str | None = None,
        machine_id: str | None = None,
        macs: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        """Set right what a guest that was restored or forked has of its past, or of its siblings.

        Its random numbers are its own from then on (`vmlab.guests.refresh` says by which means on
        which hypervisor), and its clock is the host's, to a second; and what is asked for.

        Args:
            hostname: Its new name.
            machine_id: Its new id of machine-id(5), 32 hexadecimal digits.
            macs: The present MAC addresses of network interfaces -> their new ones.
            timeout: Seconds for each part of it.

        Raises:
            CommandFailed: the guest refuses something of it.
        """
        from vmlab.guests.refresh import refresh

        await refresh(
            self, hostname=hostname, machine_id=machine_id, macs=macs or {}, timeout=timeout
        )

    async def shutdown(self, *, timeout: float | None = None) -> None:
        """Power the guest down and wait until the machine is off."""
        await self.machine.stop(timeout=timeout)

    async def crash(self) -> None:
        """Make the guest's kernel panic at once, without syncing its disks (sysrq "c")."""
        await self._leave("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger")

    async def _leave(self, command: str) -> None:
        """Run a command that the guest may not survive."""
        with suppress(AgentRestarted, ChannelClosed, DeadlineExceeded):
            await self.execute(command, timeout=2)

    async def block(self) -> None:
        """Take the link of every NIC down, as if the cables were pulled."""
        for nic in self.machine.spec.nics:
            if nic.name not in self._blocked:
                self._blocked[nic.name] = await self.machine.inject(NetPartition(nic=nic.name))

    async def unblock(self) -> None:
        """Bring back the links that `block` took down."""
        while self._blocked:
            name, fault = next(iter(self._blocked.items()))
            await self.machine.clear_fault(fault)
            del self._blocked[name]

    async def forward_port(self, guest_port: int, host_port: int = 0) -> PortForward:
        """Lead a TCP port of this host to one of the guest, until the guest is let go of.

        Args:
            guest_port: The port in the guest, at its 127.0.0.1 unless the machine's specification
                forwards it.
            host_port: The port of this host, at 127.0.0.1; 0 is a free one.

        Raises:
            OperationFailed: the port of this host is not free.
        """
        for nic in (await self.machine.info()).nics:
            for protocol, host, guest in nic.forwards:
                if (protocol, guest) == ("tcp", guest_port) and host_port in (0, host):
                    return PortForward(host)
        forward = await relay(self.channel, guest_port, host_port=host_port)
        self._forwards.append(forward)
        return forward

    async def close(self) -> None:
        """Let go of the guest."""
        while self._forwards:
            await self._forwards.pop().close()
        with suppress(VmlabError):
            await self.channel.close()


def _into(buffer: bytearray) -> Sink:
    async def take(data: bytes) -> None:
        buffer.extend(data)

    return take


def _split(path: str) -> tuple[str, str]:
    """Directory and last name of an absolute path in the guest."""
    pure = PurePosixPath(path)
    if not pure.is_absolute() or not pure.name or ".." in pure.parts:
        raise OperationFailed(
            f"{path!r} is not an absolute path to a file or directory",
            hint='such as "/root/results"',
        )
    return str(pure.parent), pure.name


def _only_changed(result: CommandResult) -> bool:
    """Whether tar only noticed that something was written to meanwhile (GNU tar, status 1)."""
    return result.status == 1 and all(
        "changed as we read it" in line for line in result.stderr.splitlines()
    )


def _take(file: str, size: int) -> str:
    """A shell command that writes the input to `file`, a quoted path to nothing or an empty file.

    A large file gets its size before its contents: a tmpfs that is mounted with huge=within_size,
    as that of the tiny images is, then has huge pages for them (2.1 x as fast on emulated riscv64).
    """
    if size < trees.LARGE:
        return f"take >{file}"
    return f"{{ truncate -s {size} {file} 2>/dev/null; take 1<>{file}; }}"


# Whatever ends the command, its own file goes with it. Text for str.format.
_WRITE: Final = """mkdir -p {parent} || exit
n=$(readlink -f {name}) || n={name}
p=$n.vmlab-{token}
if [ -b "$n" ] || [ -c "$n" ] || [ -p "$n" ] || ! (: >"$p") 2>/dev/null; then
    take >"$n"
    exit
fi
trap 'rm -f "$p"' EXIT
trap 'exit 143' HUP INT TERM
{take} && chmod {mode} "$p" && mv -f "$p" "$n"
"""

_BEGIN: Final = """s={scratch}
if [ -d {target} ] && ! [ -L {target} ]; then
    echo "it exists already, and is a directory" >&2
    exit 73
fi
mkdir -p {parent} || exit
trap 'rm -rf "$s"' EXIT
trap 'exit 143' HUP INT TERM
"""

# A link to a directory is what is replaced, and not a place to move things into.
_COPY_FILE_IN: Final = (
    _BEGIN
    + """{take} && chmod {mode} "$s" && touch -d @{time} "$s" || exit
{{ ! [ -d {target} ] || rm -f {target}; }} && mv -f "$s" {target}
"""
)

_UNPACK: Final = (
    _BEGIN
    + """mkdir "$s" || exit
(cd "$s" && tar -x -f -) && {then}
"""
)

_FILL: Final = "{take} && touch -d @{time} {name}"

_SETTLE: Final = (
    "{{ ! [ -d {target} ] || rm -f {target}; }} && mv -f {scratch}/{name} {target} && "
    "rm -rf {scratch}"
)


def _listening(port: int, address: str | None) -> str:
    """A shell test: does something listen on a TCP port? (proc(5), /proc/net/tcp, state 0A)."""
    if not 1 <= port <= 65535:
        raise OperationFailed(f"port {port}: 1 to 65535")
    if address is None:
        return f"cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -q ':{port:04X} [0-9A-F:]* 0A'"
    host = quote(address)
    # OpenBSD's nc has -z; busybox's runs a program when it has connected; bash connects by itself.
    return (
        f"{{ if command -v nc; then nc -z -w 1 {host} {port} || nc -w 1 {host} {port} -e true; "
        f"else timeout 2 bash -c {quote(f': </dev/tcp/{address}/{port}')}; fi; }} >/dev/null 2>&1"
    )
