"""The contract that every hypervisor fulfils and that the conformance suite proves.

Asynchronous. A `Hypervisor` makes `Machine`s; a `Machine` is started, watched, broken and deleted.
What is unsupported raises UnsupportedOperation before anything happens; a call in a wrong state
raises InvalidState. Every operation takes `timeout`, its deadline in seconds (None is the
operation's own default), and can be cancelled: a timed-out or cancelled operation leaves the
machine in the state that it had before, or in another stable state that `status` tells, and no
process, socket, file or record behind. A `timeout` that is negative or no number is InvalidSpec.
Operations on one machine are serialised in the order of the calls; only `kill`, and `delete` with
force, end those that were called before them. Questions (`status`, `info`, `metrics`, consoles
and channels, `snapshots`) wait for nothing.

Back ends do not implement this directly but the hooks of `vmlab.hypervisors.hooks`, unless the
machinery of operations runs elsewhere (a client of a remote hypervisor).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field

from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import Capabilities
from vmlab.machine.events import Event
from vmlab.machine.faults import Fault
from vmlab.machine.metrics import MachineMetrics
from vmlab.machine.spec import Disk, MachineSpec, Nic
from vmlab.machine.states import MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class ProbeItem(_Answer):
    """One thing that was looked at: an accelerator, a program, a permission."""

    name: str
    works: bool
    detail: str = Field("", description="what was found, or why it does not work")
    hint: str | None = Field(None, description="what to do about it")


class Probe(_Answer):
    """What works of one hypervisor on this host, and why not the rest."""

    hypervisor: str
    available: bool
    version: str = ""
    reason: str = Field("", description="why it is not available")
    hint: str | None = None
    items: tuple[ProbeItem, ...] = ()


class MachineStatus(_Answer):
    """What a machine is doing, as its hypervisor says now."""

    id: str
    name: str
    state: MachineState
    reason: str = Field("", description="why it is in this state, where that is known")
    operation: str | None = Field(None, description="the operation under way")
    time: float = Field(description="seconds on the hypervisor's clock")


class DiskInfo(_Answer):
    """A disk as the hypervisor has it."""

    name: str
    size: int = Field(ge=0, description="bytes")
    bus: str
    readonly: bool = False
    path: Path | None = None


class NicInfo(_Answer):
    """A network interface as the hypervisor has it."""

    name: str
    network: str
    mac: str
    link: bool = True
    forwards: tuple[tuple[str, int, int], ...] = Field(
        (), description="protocol, port of the host, port of the guest"
    )


class NodeInfo(_Answer):
    """A NUMA node as the hypervisor has it."""

    memory: int = Field(ge=0, description="bytes")
    cpus: tuple[int, ...]


class MachineInfo(_Answer):
    """What a machine is made of, read back from the hypervisor and never from the specification."""

    id: str
    name: str
    architecture: Architecture
    vcpus: int = Field(ge=1)
    memory: int = Field(ge=0, description="bytes")
    disks: tuple[DiskInfo, ...] = ()
    nics: tuple[NicInfo, ...] = ()
    nodes: tuple[NodeInfo, ...] = ()
    pinning: dict[int, tuple[int, ...]] = Field(default_factory=dict)
    consoles: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    accelerator: str = ""
    pid: int | None = Field(None, description="process of the machine on this host, if it has one")
    directory: Path | None = Field(None, description="the machine's files on this host")
    owner: str = Field("", description='"run:ID" or "store:ID"')
    extra: dict[str, str] = Field(default_factory=dict, description="of this hypervisor alone")


class Snapshot(_Answer):
    """A saved state of a machine."""

    name: str
    machine: str = Field(description="id of the machine it was taken of")
    spec: MachineSpec
    state: MachineState = Field(description="state of the machine when it was taken")
    memory: bool = Field(description="whether memory and vCPU state are in it")
    time: float = Field(description="seconds on the hypervisor's clock")
    size: int = Field(ge=0, description="bytes")
    digest: str = Field(description="of its contents, in the hypervisor's own form")
    directory: Path | None = Field(
        None, description="its files on this host, where they may be moved as a whole and used"
    )


class Channel(ABC):
    """A stream of bytes to and from a guest."""

    name: str

    @abstractmethod
    async def read(self, size: int = 65536) -> bytes:
        """The next bytes, at least one and at most `size`; b"" when the channel has ended."""

    @abstractmethod
    async def write(self, data: bytes) -> None:
        """Send all of `data`.

        Raises:
            ChannelClosed: the other side is gone.
        """

    @abstractmethod
    async def close(self) -> None:
        """Let go of the channel; closing it again does nothing."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class Console(Channel):
    """A serial console: a channel whose output is also kept."""

    @abstractmethod
    async def log(self) -> bytes:
        """Everything that the guest has printed since it was created, across restarts."""

    async def history(self, size: int) -> bytes:
        """The last `size` bytes, at most, that were printed before what `read` began with.

        Where that is not known, what is printed meanwhile is among them.
        """
        printed = await self.log()
        return printed[max(0, len(printed) - size) :]

    async def catch_up(self) -> None:
        """Wait until all that was printed before this call has been read.

        For who reads in a task of its own, which has to come back for more.
        """


class Progress(Protocol):
    """Called during a migration with the bytes sent so far and those to send in all."""

    def __call__(self, transferred: int, total: int, /) -> None: ...


class Machine(ABC):
    """One machine of a hypervisor."""

    id: str
    name: str

    @property
    @abstractmethod
    def spec(self) -> MachineSpec:
        """What the machine is to be now: as created, with what was plugged and resized since."""

    @property
    @abstractmethod
    def state(self) -> MachineState:
        """The state as last known; `status` asks the hypervisor."""

    @property
    @abstractmethod
    def hypervisor(self) -> Hypervisor:
        """Where the machine is."""

    @abstractmethod
    async def start(self, *, timeout: float | None = None) -> None:
        """Boot it: created, stopped or failed -> running (the guest's vCPUs run)."""

    @abstractmethod
    async def stop(
        self, *, graceful: bool = True, kill: bool = True, timeout: float | None = None
    ) -> None:
        """Shut it down: running or paused -> stopped.

        Args:
            graceful: Ask the guest to power down and wait for it; a paused guest runs for that.
            kill: When `timeout` seconds have passed without effect, kill it instead of giving up.
            timeout: Seconds that the guest is given; killing it may take up to 30 more.

        Raises:
            DeadlineExceeded: with `kill` false; the machine is as before.
        """

    @abstractmethod
    async def kill(self, *, timeout: float | None = None) -> None:
        """End it at once and unasked: any live state, failed or unknown -> stopped.

        What the guest had written but not flushed may be kept, as when a hypervisor's process is
        killed and its host's page cache lives on; the fault PowerCut is what surely loses it.

        The operation under way and those that wait for their turn fail (OperationAborted), but for
        other kills and deletes.
        """

    @abstractmethod
    async def pause(self, *, timeout: float | None = None) -> None:
        """Stop its vCPUs: running -> paused."""

    @abstractmethod
    async def resume(self, *, timeout: float | None = None) -> None:
        """Let its vCPUs run on: paused -> running."""

    @abstractmethod
    async def restart(self, *, graceful: bool = True, timeout: float | None = None) -> None:
        """Boot it again: running -> running. Not graceful is a reset, as by the button."""

    @abstractmethod
    async def delete(self, *, force: bool = False, timeout: float | None = None) -> None:
        """Remove it with its disks and snapshots; deleting a deleted machine does nothing.

        An image that a disk has by `source` or `file` is not the machine's and stays.

        Args:
            force: Kill it first if it is live, instead of refusing; what is under way or waits
                fails as it does by `kill`.
            timeout: Seconds for all of it. A delete that has begun to remove things is not
                cancelled any more but by this; one that fails can be repeated.
        """

    @abstractmethod
    async def status(self, *, timeout: float | None = None) -> MachineStatus:
        """What it is doing, asked of the hypervisor; works for a deleted machine too."""

    @abstractmethod
    async def info(self, *, timeout: float | None = None) -> MachineInfo:
        """What it is made of, read back from the hypervisor."""

    @abstractmethod
    async def metrics(self, *, timeout: float | None = None) -> MachineMetrics:
        """What it uses; the machine has to be live."""

    @abstractmethod
    async def console(self, name: str = "serial", *, timeout: float | None = None) -> Console:
        """Open one of its consoles.

        Raises:
            ResourceNotFound: it has no console of that name.
        """

    @abstractmethod
    async def channel(self, name: str, *, timeout: float | None = None) -> Channel:
        """Open one of its guest channels; the machine has to be running or paused.

        Raises:
            ResourceNotFound: it has no channel of that name.
        """

    @abstractmethod
    async def screenshot(self, *, timeout: float | None = None) -> bytes:
        """What its display shows, as a PNG image; the machine has to be running or paused.

        Raises:
            UnsupportedOperation: its specification has no display.
        """

    @abstractmethod
    async def send_keys(self, keys: Sequence[str], *, timeout: float | None = None) -> None:
        """Press keys of its keyboard, one after the other; the machine has to be running.

        Args:
            keys: Names of `vmlab.machine.keys`, several that are held together joined by a dash:
                `["l", "s", "ret", "ctrl-alt-f2"]`.
            timeout: Seconds for all of them.

        Raises:
            InvalidSpec: there is no key of such a name; none was pressed.
            UnsupportedOperation: its specification has no display.
        """

    @abstractmethod
    async def snapshot(
        self, name: str, *, memory: bool | None = None, timeout: float | None = None
    ) -> Snapshot:
        """Save its disks, and with `memory` (None: if it is live and can be) all of it.

        Raises:
            OperationFailed: there is a snapshot of that name already, or the guest writes to a
                disk's `file`, which is no part of the machine.
        """

    @abstractmethod
    async def snapshots(self, *, timeout: float | None = None) -> list[Snapshot]:
        """Its snapshots, the oldest first."""

    @abstractmethod
    async def delete_snapshot(self, name: str, *, timeout: float | None = None) -> None:
        """Remove a snapshot.

        Raises:
            SnapshotNotFound: there is none of that name.
        """

    @abstractmethod
    async def restore(self, name: str, *, timeout: float | None = None) -> None:
        """Bring back a snapshot; disks, memory and the state when it was taken return.

        One without memory is restored to a machine at rest only, which is stopped afterwards.

        Raises:
            SnapshotNotFound: there is none of that name.
            CorruptSnapshot: its contents are damaged; the machine is as before.
        """

    @abstractmethod
    async def fork(self, name: str, *, timeout: float | None = None) -> Machine:
        """An independent copy of the running or paused machine, in the same state.

        The copy has a name, an id and MAC addresses of its own; neither sees what the other writes.

        Raises:
            OperationFailed: the guest writes to a disk's `file`, which only one machine can have.
        """

    @abstractmethod
    async def migrate(
        self,
        target: Hypervisor,
        *,
        live: bool | None = None,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Machine:
        """Move it to another hypervisor of the same kind; it is deleted here when it has arrived.

        Args:
            target: Where to.
            live: With its memory; None is live if it is running or paused.
            progress: Told how far it is.
            timeout: Seconds for all of it.

        Raises:
            MigrationFailed: it did not arrive; it is as before here, and nothing is left there.
                After a cancellation `get` of either hypervisor tells where it is.
        """

    @abstractmethod
    async def plug_disk(self, disk: Disk, *, timeout: float | None = None) -> DiskInfo:
        """Add a disk; returns when the machine has it. Live machines need `hotplug-disk`.

        Raises:
            InvalidSpec: its `source` or `file` is not as it has to be.
            OperationFailed: another live machine has its `file` and writes to it; a start tells
                the same of disks that were added at rest.
        """

    @abstractmethod
    async def unplug_disk(self, name: str, *, timeout: float | None = None) -> None:
        """Remove a disk with what was made for it; a `source` or `file` of its own is kept.

        Where the guest has to let go of it, a paused machine refuses it with InvalidState.
        """

    @abstractmethod
    async def resize_disk(self, name: str, size: int, *, timeout: float | None = None) -> DiskInfo:
        """Grow a disk to `size` bytes; shrinking is refused."""

    @abstractmethod
    async def plug_nic(self, nic: Nic, *, timeout: float | None = None) -> NicInfo:
        """Add a network interface. Live machines need `hotplug-nic`."""

    @abstractmethod
    async def unplug_nic(self, name: str, *, timeout: float | None = None) -> None:
        """Remove a network interface."""

    @abstractmethod
    async def resize(
        self,
        *,
        vcpus: int | None = None,
        memory: int | None = None,
        timeout: float | None = None,
    ) -> MachineInfo:
        """Change the number of vCPUs and the memory in bytes.

        A machine at rest needs `resize`; a live one `hotplug-vcpu` and `hotplug-memory`. Where
        the guest has to take part, a paused machine refuses it with InvalidState.
        """

    @abstractmethod
    async def pin(
        self, pinning: Mapping[int, tuple[int, ...]], *, timeout: float | None = None
    ) -> None:
        """Bind vCPUs to CPUs of the host: vCPU -> CPU numbers; vCPUs not named float."""

    @abstractmethod
    async def inject(self, fault: Fault, *, timeout: float | None = None) -> str:
        """Break something, as the fault says; returns the fault's id.

        Raises:
            UnsupportedOperation: this hypervisor cannot inject faults of that kind.
        """

    @abstractmethod
    async def clear_fault(self, fault: str, *, timeout: float | None = None) -> None:
        """End a fault by its id; one that has ended already is not an error.

        Raises:
            ResourceNotFound: there never was a fault of that id.
        """


class Hypervisor(ABC):
    """Something that runs machines, for one owner."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def owner(self) -> Owner:
        """Whose machines these are: a run's, which die with it, or a store's, which live on."""

    @abstractmethod
    async def probe(self) -> Probe:
        """What works here and why not the rest, tried and not assumed."""

    @abstractmethod
    async def capabilities(self) -> Capabilities:
        """What it can do on this host."""

    @abstractmethod
    async def create(self, spec: MachineSpec, *, timeout: float | None = None) -> Machine:
        """Make a machine, at rest.

        Raises:
            InvalidSpec, UnsupportedOperation, ResourceExhausted: nothing was created.
            MachineExists: a machine of that name exists.
        """

    @abstractmethod
    async def create_from(
        self, snapshot: Snapshot, name: str, *, timeout: float | None = None
    ) -> Machine:
        """Make a fresh machine out of a snapshot, in the state that the snapshot was taken in.

        A snapshot without memory gives a stopped machine.

        Raises:
            SnapshotNotFound, CorruptSnapshot: nothing was created.
            MachineExists: a machine of that name exists.
        """

    @abstractmethod
    async def get(self, name: str) -> Machine:
        """The machine of that name or id.

        Raises:
            MachineNotFound: there is none, or it was deleted.
        """

    @abstractmethod
    async def list(self) -> Sequence[Machine]:
        """All machines of the owner's, by name; deleted ones are not among them."""

    @abstractmethod
    async def events(self, since: int = 0) -> Sequence[Event]:
        """The events after number `since`, oldest first.

        Raises:
            ResourceNotFound: some of them are too old to be kept; read the state anew.
        """

    @abstractmethod
    def subscribe(self, since: int | None = None) -> AsyncIterator[Event]:
        """Events as they happen, after number `since` (None: from now on), without a gap."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of it. A run's machines are killed and deleted, a store's live on."""

    def loop_factory(self) -> Callable[[], asyncio.AbstractEventLoop]:
        """What makes the event loop that its calls run on; a virtual clock needs its own."""
        return asyncio.new_event_loop

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class HypervisorProvider(ABC):
    """What a back end registers in the entry-point group `vmlab.hypervisors`.

    Importing and probing one is cheap and has no side effect.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def probe(self) -> Probe:
        """What works here and why not the rest."""

    @abstractmethod
    def open(self, owner: Owner, options: Mapping[str, str] | None = None) -> Hypervisor:
        """A hypervisor whose machines belong to `owner`; touches nothing until it is used.

        Args:
            owner: Run or store.
            options: Settings of this back end, as text ("profile" -> "unreliable").

        Raises:
            HypervisorUnavailable: it cannot be used here.
            InvalidSpec: an option is unknown or wrong.
        """
