"""What a back end fills in for each of its machines.

A hook does its one thing and raises a VmlabError when it cannot; it knows nothing of states,
deadlines or events, which `serialised_machine` sees to. It may be cancelled at any await, and lets
the cancellation out. Hooks that take an operation run one at a time on a machine; the questions
(`_observe`, `_do_status`, `_do_info`, `_do_metrics`, `_do_console`, `_do_channel`,
`_do_screenshot`, `_do_send_keys`, `_do_snapshots`) may come at any time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vmlab.hypervisors.base import (
    Channel,
    Console,
    DiskInfo,
    Machine,
    MachineInfo,
    NicInfo,
    Progress,
    Snapshot,
)
from vmlab.hypervisors.operation import Operation
from vmlab.hypervisors.picture import Picture
from vmlab.machine.faults import Fault
from vmlab.machine.metrics import MachineMetrics
from vmlab.machine.spec import Disk, Nic
from vmlab.machine.states import MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.operated_machine import OperatedMachine


class MachineHooks(Machine):
    """The hooks of a machine; `OperatedMachine` calls them."""

    async def _enter(self, operation: Operation) -> None:
        """It is the turn of `operation` in this process: wait until no other one has its own.

        What other processes have done with the machine meanwhile is known when it returns; the
        operation was not allowed yet.
        """

    def _leave(self) -> None:
        """An operation is over; called once for each call of `_enter`, also for one that failed."""

    @abstractmethod
    async def _observe(self) -> MachineState:
        """What the machine is doing now: running, paused, stopped or failed (it died)."""

    @abstractmethod
    async def _undo(self, operation: Operation) -> None:
        """Remove what `operation`, which did not succeed, has half done.

        Called once for an operation that had begun, whatever ended it and however far it was; for
        one that was refused it is not called.
        """

    @abstractmethod
    async def _do_create(self, operation: Operation) -> None:
        """Make the machine's files and records."""

    @abstractmethod
    async def _do_start(self, operation: Operation) -> None:
        """Boot; return when the vCPUs run."""

    @abstractmethod
    async def _do_shutdown(self, operation: Operation) -> None:
        """Ask the guest to power down and return when it is off, however long that takes."""

    @abstractmethod
    async def _do_kill(self, operation: Operation) -> None:
        """End the machine at once; return when nothing of it runs, also if nothing did."""

    @abstractmethod
    async def _do_reset(self, operation: Operation) -> None:
        """Reset a running machine without asking the guest."""

    @abstractmethod
    async def _do_pause(self, operation: Operation) -> None:
        """Stop the vCPUs."""

    @abstractmethod
    async def _do_resume(self, operation: Operation) -> None:
        """Let the vCPUs run."""

    @abstractmethod
    async def _do_delete(self, operation: Operation) -> None:
        """Remove all that belongs to the machine; must be repeatable.

        No cancellation interrupts it; only its deadline does.
        """

    @abstractmethod
    async def _do_info(self) -> MachineInfo:
        """What the machine is made of, read from the hypervisor."""

    @abstractmethod
    async def _do_metrics(self) -> MachineMetrics:
        """What the live machine uses."""

    @abstractmethod
    async def _do_console(self, name: str) -> Console:
        """Open a console, or ResourceNotFound."""

    @abstractmethod
    async def _do_channel(self, name: str) -> Channel:
        """Open a guest channel, or ResourceNotFound."""

    @abstractmethod
    async def _do_screenshot(self) -> Picture:
        """What the display of a machine that has one shows."""

    @abstractmethod
    async def _do_send_keys(self, keys: Sequence[tuple[str, ...]]) -> None:
        """Press keys, each item's together, of a machine that has a display."""

    @abstractmethod
    async def _do_snapshots(self) -> list[Snapshot]:
        """The snapshots, the oldest first."""

    @abstractmethod
    async def _do_snapshot(self, operation: Operation, name: str, memory: bool) -> Snapshot:
        """Save disks, and memory if asked; the machine does on what it did before."""

    @abstractmethod
    async def _do_delete_snapshot(self, operation: Operation, snapshot: Snapshot) -> None:
        """Remove a snapshot that exists."""

    @abstractmethod
    async def _do_restore(self, operation: Operation, snapshot: Snapshot) -> None:
        """Bring `snapshot` back; check its contents before anything of the machine changes."""

    @abstractmethod
    async def _do_fork(self, operation: Operation, child: OperatedMachine) -> None:
        """Make `child`, which has its id and specification but nothing else, a copy of this."""

    @abstractmethod
    async def _do_migrate(
        self, operation: Operation, arrival: OperatedMachine, live: bool, progress: Progress
    ) -> None:
        """Send everything to `arrival`, a machine of the target's, which does not run yet."""

    @abstractmethod
    async def _do_hand_over(self, operation: Operation, arrival: OperatedMachine) -> None:
        """Let `arrival` take over and remove what is left here.

        No cancellation interrupts it; its deadline does, but not within 30 seconds. When it
        raises, both sides are undone and the machine stays here.
        """

    @abstractmethod
    async def _do_create_from(self, operation: Operation, snapshot: Snapshot) -> None:
        """Make this machine out of a snapshot, which is checked first, in its state."""

    @abstractmethod
    async def _do_status(self) -> tuple[MachineState, float]:
        """What the hypervisor says that the machine is doing, and the time that is true of."""

    @abstractmethod
    async def _do_plug_disk(self, operation: Operation, disk: Disk) -> DiskInfo:
        """Add a disk; return when the machine has it."""

    @abstractmethod
    async def _do_unplug_disk(self, operation: Operation, disk: Disk) -> None:
        """Remove a disk and what was made for it."""

    @abstractmethod
    async def _do_resize_disk(self, operation: Operation, disk: Disk, size: int) -> DiskInfo:
        """Grow a disk to `size` bytes."""

    @abstractmethod
    async def _do_plug_nic(self, operation: Operation, nic: Nic) -> NicInfo:
        """Add a network interface; return when the machine has it."""

    @abstractmethod
    async def _do_unplug_nic(self, operation: Operation, nic: Nic) -> None:
        """Remove a network interface."""

    @abstractmethod
    async def _do_resize(self, operation: Operation, vcpus: int | None, memory: int | None) -> None:
        """Change vCPUs and memory (bytes); None leaves as it is."""

    @abstractmethod
    async def _do_pin(self, operation: Operation, pinning: Mapping[int, tuple[int, ...]]) -> None:
        """Bind vCPUs; those not named float."""

    @abstractmethod
    async def _do_inject(self, operation: Operation, fault: Fault) -> str:
        """Break something; return the id of the fault."""

    @abstractmethod
    async def _do_clear_fault(self, operation: Operation, fault: str) -> None:
        """End a fault, or ResourceNotFound."""
