"""What hypervisors share whose machines are processes that speak QMP: records, and adoption."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError

from vmlab.hypervisors.monitored.machine import MonitoredMachine
from vmlab.hypervisors.operated_hypervisor import OperatedHypervisor
from vmlab.hypervisors.qmp import QmpTimeout
from vmlab.hypervisors.records import MachineRecords
from vmlab.machine.errors import MachineNotFound, OperationFailed, VmlabError
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner


class MonitoredHypervisor(OperatedHypervisor):
    """The machines of one owner that are processes speaking QMP.

    Args:
        owner: Run or store.

    Attributes:
        records: What is written down of each machine.
    """

    program: ClassVar[str]
    """What the processes are called in messages."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner)
        self.records = MachineRecords(owner, self.name)
        self._adopting = asyncio.Lock()
        self._adopted = owner.kind == "run"

    @abstractmethod
    def new_machine(
        self, id_: str, spec: MachineSpec, state: MachineState
    ) -> MonitoredMachine[Any]:
        """The object of a machine that does not exist yet; touches nothing."""

    async def _prepare(self) -> None:
        """Find a store's machines again, once."""
        if self._adopted:
            return
        async with self._adopting:
            if not self._adopted:
                await self.capabilities()
                for id_ in self.records.ids():
                    await self._adopt(id_)
                self._adopted = True

    async def _adopt(self, id_: str) -> None:
        """Take over one machine that the records tell of.

        Raises:
            OperationFailed: its record is damaged, or its process talks to another one.
        """
        with suppress(MachineNotFound):
            # Otherwise another process has deleted it just now.
            record = self.records.load(id_)
            with self.reading(id_):
                spec = MachineSpec.model_validate(record["spec"])
                machine = self.new_machine(id_, spec, MachineState(record["state"]))
                machine.from_record(record)
            await machine.find_again()
            self.adopt(machine)

    @contextmanager
    def reading(self, id_: str) -> Iterator[None]:
        """What cannot be made of the record of that machine is told as a damaged record.

        Raises:
            OperationFailed: it is damaged.
        """
        try:
            yield
        except (ValidationError, LookupError, ValueError, TypeError) as error:
            raise OperationFailed(
                f"the record of machine {id_!r} is damaged: {error}",
                hint=f"move {self.records.directory(id_)} away",
                hypervisor=self.name,
            ) from error

    async def close(self) -> None:
        """Let go of it; a run's machines are deleted, a store's live on."""
        if self.owner.kind == "store":
            for machine in tuple(self._machines.values()):
                assert isinstance(machine, MonitoredMachine)
                await machine.release()
        await super().close()

    def unanswered(self, error: VmlabError) -> str:
        """Why a machine that was found is unknown."""
        if isinstance(error, QmpTimeout):
            return (
                f"its {self.program} does not answer: it hangs, or two other processes use the "
                f"machine, and {self.program} talks to no more than that; it can be found again "
                "when one of them has ended"
            )
        return f"its {self.program} does not answer: {error}"
