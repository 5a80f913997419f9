"""A process of ours beside a QEMU: started with a description in a file, told things over QMP."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmlab.hypervisors import processes
from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.qmp import QmpConnection, QmpLost
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.errors import OperationFailed

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner
    from vmlab.hypervisors.processes import OwnedProcess

_START_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Companion:
    """One of them.

    Attributes:
        module: What it runs.
        purpose: What it does, for messages: "serves breakable disks".
        name: Begins the names of its files.
        directory: That of the QEMU process, where its files are.
    """

    module: str
    purpose: str
    name: str
    directory: Path

    @property
    def messages(self) -> Path:
        """What it says."""
        return self.directory / f"{self.name}.log"

    async def start(self, description: object, *, owner: Owner, machine: str) -> OwnedProcess:
        """Start it; it can be told something when this returns.

        Args:
            description: What it finds in its file, as JSON.
            owner: Whose it is.
            machine: Id of the machine.

        Raises:
            OperationFailed: it did not start; with what it said. Nothing runs.
        """
        file = f"{self.name}.json"
        await done_in_thread(_write, self.directory / file, json.dumps(description))
        process = await processes.spawn(
            # The directory that it is started in is no place for modules of anybody's.
            [sys.executable, "-P", "-m", self.module, file],
            owner=owner,
            machine=machine,
            stdout=self.messages,
            stderr=self.messages,
            cwd=self.directory,
        )
        try:
            await (await self._talk(machine, process)).close()
        except BaseException as error:
            await uninterrupted(_end(process))
            if isinstance(error, QmpLost):
                raise OperationFailed(
                    f"the process that {self.purpose} did not start: {self.said()}",
                    hint=f"its messages are in {self.messages}",
                    hypervisor="qemu",
                ) from error
            raise
        return process

    def said(self) -> str:
        """What it said last, if anything."""
        try:
            return self.messages.read_text("utf-8", "replace").strip().rpartition("\n")[2]
        except OSError:
            return ""

    async def tell(self, machine: str, command: str, arguments: dict[str, Any]) -> None:
        """Have it do something.

        Raises:
            QmpError: it refused.
            QmpLost: it has ended.
        """
        conversation = await self._talk(machine, None)
        try:
            await conversation.execute(command, arguments)
        finally:
            await conversation.close()

    async def _talk(self, machine: str, process: OwnedProcess | None) -> QmpConnection:
        def ended() -> str | None:
            gone = process is not None and not process.running
            return f"the process that {self.purpose} has ended" if gone else None

        return await QmpConnection.open(
            self.directory / f"{self.name}-qmp.sock",
            machine=machine,
            hypervisor="qemu",
            log=self.directory / f"{self.name}-qmp.log",
            ended=ended,
            timeout=_START_S,
        )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


async def _end(process: OwnedProcess) -> None:
    process.kill()
    await process.wait()
