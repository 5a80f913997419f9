"""A QEMU process: what the base has, the daemons that end with it, and QEMU's jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from vmlab.hypervisors.monitored import emulator
from vmlab.hypervisors.monitored.emulator import COMMAND_LINE, QMP_SOCKET
from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.qemu.command_line import PID_FILE, SECOND_QMP_SOCKET
from vmlab.hypervisors.qemu.virtiofs import Daemons
from vmlab.hypervisors.qmp import QmpConnection, QmpError, QmpLost
from vmlab.machine.errors import MachineCrashed, OperationFailed

if TYPE_CHECKING:
    from vmlab.hypervisors.processes import OwnedProcess

_LAST_MOMENTS: Final = 1.0
"""Seconds in which QEMU's end is noticed, after that of a process that ends with it."""


class Emulator(emulator.Emulator):
    """A running QEMU; made by `start` or `adopt`."""

    program: ClassVar[str] = "QEMU"
    hypervisor: ClassVar[str] = "qemu"
    messages: ClassVar[str] = "qemu.log"
    sockets: ClassVar[tuple[str, ...]] = (QMP_SOCKET, SECOND_QMP_SOCKET)
    transient: ClassVar[tuple[str, ...]] = ("*.sock", "*.pcap", PID_FILE)

    def __init__(
        self, machine: str, directory: Path, process: OwnedProcess, qmp: QmpConnection
    ) -> None:
        super().__init__(machine, directory, process, qmp)
        # Those that serve its shares: they end with it.
        self.daemons = Daemons(directory)

    async def _notice(self, on_end: Callable[[str], None]) -> None:
        ended = asyncio.ensure_future(self.process.wait())
        alone = asyncio.ensure_future(self.daemons.one_ended())
        try:
            await asyncio.wait({ended, alone}, return_when=asyncio.FIRST_COMPLETED)
            # A daemon ends when QEMU does, and may be seen to end first.
            await asyncio.wait({ended}, timeout=_LAST_MOMENTS)
            if self.qmp.lost is not None:
                await asyncio.wait({ended}, timeout=emulator.LAST_MOMENTS)
        finally:
            for task in (ended, alone):
                task.cancel()
        if not self.ending:
            on_end(self.daemons.last_words() if self.running else self.last_words())

    @property
    def exited(self) -> bool:
        """Whether the process has ended well: by itself, or when it was asked to."""
        if self.process.returncode is not None:
            return super().exited
        # Somebody else's child, of whose status nothing is heard here.
        return not self.running and self.exited_in(self.directory)

    @classmethod
    def exited_in(cls, directory: Path) -> bool:
        """Whether QEMU has taken its PID file away, as it does when it calls exit(3).

        One that is killed or that aborts leaves the file (softmmu/vl.c, qemu_unlink_pidfile).
        """
        try:
            told = PID_FILE in (directory / COMMAND_LINE).read_text("utf-8").split()
        except OSError:
            return False
        return told and not (directory / PID_FILE).exists()

    async def _end(self) -> None:
        await super()._end()
        await self.daemons.end()

    async def run_job(
        self, command: str, arguments: Mapping[str, Any], *, timeout: float | None = None
    ) -> None:
        """Start a job (docs/interop/qemu-qmp-ref, "Jobs") and wait for its end.

        A cancelled call cancels the job, and waits for that.

        Raises:
            OperationFailed: it failed, with why.
        """
        job = f"{command}-job"
        with self.qmp.listen(
            "JOB_STATUS_CHANGE",
            match=lambda event: (
                event.data.get("id") == job and event.data.get("status") == "concluded"
            ),
        ) as concluded:
            try:
                await self.execute(command, {"job-id": job, **arguments})
                await concluded.wait(timeout)
            except (QmpError, MachineCrashed):
                # There is no job.
                raise
            except QmpLost as error:
                raise await self.crashed(command, error) from error
            except BaseException:
                # A job that saves or loads cannot be cancelled half-way: wait for it.
                await uninterrupted(self._settle_job(job))
                raise
        await uninterrupted(self._dismiss(job, command))

    async def _settle_job(self, job: str) -> None:
        while self.running:
            known = [other for other in await self.execute("query-jobs") if other["id"] == job]
            if not known:
                return
            if known[0]["status"] == "concluded":
                await self.execute("job-dismiss", {"id": job})
                return
            await asyncio.sleep(0.02)

    async def _dismiss(self, job: str, command: str) -> None:
        failed = [
            other.get("error")
            for other in await self.execute("query-jobs")
            if other["id"] == job and other.get("error")
        ]
        await self.execute("job-dismiss", {"id": job})
        if failed:
            raise OperationFailed(
                f"{command} failed: {failed[0]}",
                machine=self.machine,
                hypervisor="qemu",
                operation=command,
            )
