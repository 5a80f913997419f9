"""What the suite has to know of one kind of back end before it can run: a `ConformanceProfile`.

A back end registers its own in the entry-point group `vmlab.conformance` under the name of its
hypervisor; without one a profile that knows nothing is used, and what it lacks is skipped.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Final, Literal

from vmlab.conformance.probe import GuestProbe
from vmlab.hypervisors.base import Hypervisor, Machine, Snapshot
from vmlab.machine.capabilities import Capabilities, Capability
from vmlab.machine.errors import HypervisorUnavailable
from vmlab.machine.faults import At, FaultKind, KillFault
from vmlab.machine.spec import MachineSpec

GROUP: Final = "vmlab.conformance"

Corrupt = Callable[[Hypervisor, Machine, Snapshot], Awaitable[None]]
Crash = Callable[[Machine, float], Awaitable[None]]


async def crash_by_fault(machine: Machine, delay: float) -> None:
    """Arm the fault `kill`: the machine dies `delay` seconds from now."""
    await machine.inject(KillFault(when=At(seconds=delay)))


async def crash_by_signal(machine: Machine, delay: float) -> None:
    """Send SIGKILL to the machine's process, `delay` seconds from now.

    Raises:
        HypervisorUnavailable: the machine has no process of its own.
    """
    import asyncio

    pid = (await machine.info()).pid
    if pid is None:
        raise HypervisorUnavailable(f"machine {machine.name!r} has no process that could be killed")
    asyncio.get_running_loop().call_later(delay, _kill, pid)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        # It ended by itself before its time.
        return


@dataclass(frozen=True)
class ConformanceProfile:
    """How the suite handles one kind of back end.

    Attributes:
        hypervisor: Name of the hypervisor.
        spec: What the machines of the suite are made of; the name is replaced. Its disks named in
            `scratch` are written by the guest, its first NIC is on a network of its own.
        options: Options to open the hypervisor with.
        scratch: Names of the disks of `spec` that the guest may write to.
        bus: Of disks that a running machine has from its start and lets go.
        probe: Makes the guest's probe of a machine; None skips what needs the guest's own view.
        probe_needs: Capabilities without which the probe cannot be used.
        echo_channel: A channel of `spec` that sends back what it receives, if there is one.
        corrupt: Damages the contents of a snapshot where they are kept.
        crash: Makes a machine die by itself after some seconds; None finds out how by itself.
        must_declare: Capabilities that have to be declared on a host like CI's.
        seed_option: The option that takes the seed, if there is one.
        sizes: vCPUs and bytes of memory whose echo is checked.
        many: Machines that run at once in the check with many.
        cancel_points: At which shares of an operation's usual time it is cancelled.
        settle: Seconds that a guest is left alone to see whether something moves.
        stall: Seconds that a guest may stand still during a hot-plug.
        slack: Seconds that something may take which waits for nothing, and that what happens
            beside an operation may take to be seen; on a busy host a multiple of the usual.
        lag: Seconds that a busy host may let something wait that is due, such as a deadline.
        triggers: Triggers of faults that have to work; another one may be refused by its name.
        faultless: Why faults of a kind cannot exist there, for those that are not declared.
        patience: Seconds that one check may take, on the hypervisor's clock.
        processes: Whether machines are processes of this host.
        own_clock: Whether the hypervisor's clock is its own, so that a run that is the same takes
            the same time; on the host's clock no two runs do.
        drawn: What a guest has drawn at random, the same in two runs that are the same: random
            numbers, or what its kernel made of some.
        variant: The profile for other options, where they change what machines are made of.
        reliable: Whether operations, events and answers can be relied on with given options.
    """

    hypervisor: str
    spec: MachineSpec
    options: Mapping[str, str] = field(default_factory=dict)
    scratch: tuple[str, ...] = ()
    bus: Literal["virtio", "scsi"] = "virtio"
    probe: Callable[[Machine], GuestProbe] | None = None
    probe_needs: tuple[Capability, ...] = (Capability.GUEST_CHANNELS,)
    echo_channel: str | None = None
    corrupt: Corrupt | None = None
    crash: Crash | None = None
    must_declare: frozenset[Capability] = frozenset()
    seed_option: str | None = None
    sizes: tuple[tuple[int, int], ...] = ((1, 128 << 20), (2, 512 << 20), (4, 1 << 30))
    many: int = 100
    cancel_points: tuple[float, ...] = (0.0, 0.35, 0.8)
    settle: float = 2.0
    stall: float = 1.0
    slack: float = 60.0
    lag: float = 0.0
    triggers: frozenset[str] = frozenset({"time"})
    faultless: Mapping[FaultKind, str] = field(default_factory=dict)
    patience: float = 3600.0
    processes: bool = True
    own_clock: bool = False
    drawn: Callable[[GuestProbe], Awaitable[bytes]] = lambda guest: guest.entropy()
    variant: Callable[[Mapping[str, str]], ConformanceProfile] | None = None
    reliable: Callable[[Mapping[str, str]], bool] = lambda options: True

    def with_changes(self, **changes: object) -> ConformanceProfile:
        """The same profile with some attributes replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]  # attributes by name

    def fitting(self, capabilities: Capabilities) -> ConformanceProfile:
        """The profile without what the hypervisor cannot make: channels, consoles, the probe."""
        parts: dict[str, object] = {}
        if Capability.GUEST_CHANNELS not in capabilities:
            parts["channels"] = ()
        if Capability.CONSOLE not in capabilities:
            parts["consoles"] = ()
        able = all(need in capabilities for need in self.probe_needs)
        return self.with_changes(
            spec=self.spec.with_changes(**parts) if parts else self.spec,
            probe=self.probe if able else None,
        )

    def crasher(self, kinds: frozenset[FaultKind]) -> Crash | None:
        """How machines are made to die, given the faults that the hypervisor declares."""
        if self.crash is not None:
            return self.crash
        if FaultKind.KILL in kinds:
            return crash_by_fault
        return crash_by_signal if self.processes else None


def find_profile(name: str) -> ConformanceProfile:
    """The profile of the hypervisor `name`, or one that knows nothing of it.

    Raises:
        HypervisorUnavailable: the profile is registered but cannot be loaded.
    """
    for point in entry_points(group=GROUP, name=name):
        try:
            loaded = point.load()
        except ImportError as error:
            raise HypervisorUnavailable(
                f"the conformance profile of {name!r} cannot be loaded: {error}",
                hint=f"reinstall the package that registers {point.value!r}",
                hypervisor=name,
            ) from error
        if not isinstance(loaded, ConformanceProfile):
            raise HypervisorUnavailable(
                f"{point.value!r} is not a ConformanceProfile but {type(loaded).__name__}",
                hint="correct the entry point in the package that registers it",
                hypervisor=name,
            )
        return loaded
    if name == "simulated":
        from vmlab.conformance.simulated import profile

        return profile
    return ConformanceProfile(name, MachineSpec.of(name="conformance", memory="128M"))
