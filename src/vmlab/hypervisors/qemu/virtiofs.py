"""virtiofs: a daemon beside QEMU for each share that a guest has by it (virtio 1.2, 5.11).

The daemon serves the directory over vhost-user, in namespaces of its own, to one QEMU process and
no longer than that lives. Two programs do it: virtiofsd in Rust, and its predecessor in C that came
with QEMU until 7.2. QEMU can neither save nor move the state of such a device.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmlab.hypervisors import processes
from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.packages import OUT_OF_PATH
from vmlab.hypervisors.qemu import private_view
from vmlab.hypervisors.remembered import facts_of, remembered
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.errors import OperationFailed
from vmlab.machine.spec import MachineSpec, Share, ShareKind

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner
    from vmlab.hypervisors.processes import OwnedProcess

PROGRAM: Final = "virtiofsd"
MESSAGES: Final = "virtiofsd.log"
WHY_UNSAVED: Final = "QEMU cannot save what a virtiofs share holds"
_ASK_S: Final = 60.0
_END_GRACE: Final = 30.0
"""Seconds that a daemon whose QEMU has gone takes to notice it; it is killed after that."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """A virtiofsd program.

    Attributes:
        path: Where it is.
        rust: Whether it is the one in Rust, whose options differ.
    """

    path: str
    rust: bool

    def arguments(self, share: Share, listening: int) -> list[str]:
        """Its command line.

        Args:
            share: What it serves.
            listening: Descriptor of the socket that QEMU connects to. Named by a path instead, the
                program in C leaves a file below /run behind.
        """
        source = str(share.source.absolute())
        if self.rust:
            return [
                self.path,
                f"--fd={listening}",
                f"--shared-dir={source}",
                "--sandbox=namespace",
                # What the host changes is seen within a second.
                "--cache=auto",
                "--announce-submounts",
            ]
        options = ("sandbox=namespace", "cache=auto", "announce_submounts", "log_level=warn")
        words = [self.path, f"--fd={listening}", "-f", "-o", f"source={_escaped(source)}"]
        return words + [word for option in options for word in ("-o", option)]


def _escaped(path: str) -> str:
    """A path in a list of FUSE options, which a comma would end (lib/fuse_opt.c)."""
    return path.replace("\\", "\\\\").replace(",", "\\,")


def find_daemon() -> Daemon | None:
    """The virtiofsd of this host: the one in PATH, else where distributions hide it."""
    found = shutil.which(PROGRAM) or next(filter(_is_program, OUT_OF_PATH[PROGRAM]), None)
    if found is None:
        return None
    try:
        rust = remembered(f"options of {found}", facts_of(found), lambda: _is_rust(found))
    except OSError:
        return None
    return Daemon(found, bool(rust)) if rust is not None else None


def _is_program(path: str) -> bool:
    return os.access(path, os.X_OK)


def _is_rust(path: str) -> bool | None:
    """Which of the two programs it is; None if it is neither, or does not run."""
    try:
        done = subprocess.run(
            [path, "--help"], capture_output=True, text=True, check=False, timeout=_ASK_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if "--shared-dir" in done.stdout:
        return True
    return False if "source=PATH" in done.stdout else None


@cache
def why_not() -> str | None:
    """Why no share can be had by virtiofs here; None if it can."""
    if find_daemon() is None:
        return "virtiofsd is not installed"
    if os.geteuid() != 0:
        return "virtiofsd has to be started by root"
    # In a container that lends root too little, the daemon would die when QEMU connects.
    about: list[int | str] = [processes.boot_id(), *facts_of("/proc/self/ns/user")]
    works = remembered("may virtiofsd have namespaces", about, _namespaces_work)
    return None if works else "virtiofsd may not make namespaces of its own here"


def _namespaces_work() -> bool:
    command = [sys.executable, "-I", "-S", private_view.__file__, "--try"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def by_virtiofs(spec: MachineSpec) -> tuple[str, ...]:
    """The tags of the shares that a guest gets by virtiofs on this host, at its choice or only."""
    kinds = {ShareKind.VIRTIOFS}
    if any(share.kind is ShareKind.AUTO for share in spec.shares) and why_not() is None:
        kinds.add(ShareKind.AUTO)
    return tuple(share.tag for share in spec.shares if share.kind in kinds)


def socket_name(number: int) -> str:
    """The socket of the share of that number, in the directory of the process."""
    return f"virtiofs-{number}.sock"


class Daemons:
    """The daemons of one QEMU process.

    `processes` are those that run; `directory` is QEMU's, where they write what they have to say.
    `disks` is the one among them that serves no share but disks.
    """

    def __init__(self, directory: Path, running: Sequence[OwnedProcess] = ()) -> None:
        self.directory = directory
        self.processes = list(running)
        self.disks: OwnedProcess | None = None

    @classmethod
    async def start(
        cls, shares: Iterable[tuple[int, Share]], directory: Path, *, owner: Owner, machine: str
    ) -> Daemons:
        """Start one for each share; their sockets are there when this returns.

        Args:
            shares: The shares with their numbers.
            directory: That of the QEMU process; it is made if it is not there.
            owner: Whose they are.
            machine: Id of the machine.

        Raises:
            OperationFailed: one cannot be started; none runs.
        """
        daemons = cls(directory)
        wanted = tuple(shares)
        if not wanted:
            return daemons
        program = find_daemon()
        if program is None:
            raise OperationFailed(
                "virtiofsd is not installed",
                hint='install it, or give the share the kind "9p"',
                hypervisor="qemu",
                operation="start",
            )
        await done_in_thread(lambda: directory.mkdir(mode=0o700, parents=True, exist_ok=True))
        try:
            for number, share in wanted:
                await daemons._start(program, number, share, owner, machine)
        except BaseException:
            await uninterrupted(daemons.give_up())
            raise
        return daemons

    async def _start(
        self, program: Daemon, number: int, share: Share, owner: Owner, machine: str
    ) -> None:
        with _listening(self.directory, socket_name(number)) as listening:
            descriptor = listening.fileno()
            command = program.arguments(share, descriptor)
            if share.readonly:
                # Neither program refuses to write in all its versions; the kernel does.
                launcher = [sys.executable, "-I", "-S", private_view.__file__]
                command = [*launcher, str(share.source.absolute()), *command]
            process = await processes.spawn(
                command,
                owner=owner,
                machine=machine,
                stdout=self.directory / MESSAGES,
                stderr=self.directory / MESSAGES,
                cwd=self.directory,
                pass_fds=(descriptor,),
            )
        self.processes.append(process)

    async def one_ended(self) -> None:
        """Wait until one of them has ended; for ever if there is none."""
        if not self.processes:
            await asyncio.Event().wait()
        waiting = [asyncio.ensure_future(process.wait()) for process in self.processes]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    def said(self) -> str:
        """What was said last, if anything was."""
        try:
            return (self.directory / MESSAGES).read_text("utf-8", "replace").strip().split("\n")[-1]
        except OSError:
            return ""

    def last_words(self) -> str:
        """That one has ended before its QEMU, what that means, and what was said last."""
        if self.disks is not None and not self.disks.running:
            return "what serves its breakable disks has ended"
        words = "virtiofsd has ended, without which the guest waits for its share for ever"
        return f"{words}: {said}" if (said := self.said()) else words

    async def end(self) -> None:
        """Wait until they have ended, as they do when their QEMU has; again does nothing."""
        for process in self.processes:
            try:
                await process.wait(_END_GRACE)
            except TimeoutError:
                await _put_away(process)
        self.processes.clear()

    async def give_up(self) -> str:
        """End those of a QEMU that did not start; returns why it is to blame on them, if it is."""
        failed = False
        for process in self.processes:
            failed = failed or not process.running
            await _put_away(process)
        self.processes.clear()
        return self.said() if failed else ""


async def _put_away(process: OwnedProcess) -> None:
    """Kill a daemon and the part of it that lives in a namespace of its own."""
    # Each daemon leads a process group; while it runs, nobody else has that number.
    with suppress(ProcessLookupError):
        if process.running:
            os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _listening(directory: Path, name: str) -> socket.socket:
    """A new socket in a directory, however long that one's path is."""
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        short = f"/proc/self/fd/{folder}/{name}"
        made.bind(short)
        os.chmod(short, 0o600)  # noqa: PTH101 (it is no path to keep)
        made.listen(1)
    except OSError as error:
        made.close()
        raise OperationFailed(
            f"cannot make the socket {directory / name}: {error.strerror}",
            hint="look at the space and the permissions there",
            hypervisor="qemu",
            operation="start",
        ) from error
    finally:
        os.close(folder)
    return made
