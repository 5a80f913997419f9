"""QEMU as a hypervisor: its programs, what they can do here, and the machines of an owner."""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from vmlab.hypervisors import accelerators
from vmlab.hypervisors.accelerators import QEMU_BINARIES
from vmlab.hypervisors.base import HypervisorProvider, Probe, ProbeItem, Snapshot
from vmlab.hypervisors.monitored.debugger import debugger_socket
from vmlab.hypervisors.monitored.hypervisor import MonitoredHypervisor
from vmlab.hypervisors.qemu import breakable, memory, parcels, timers, virtiofs, wires
from vmlab.hypervisors.qemu.boards import BOARDS
from vmlab.hypervisors.qemu.host_ticks import host_ticks_khz
from vmlab.hypervisors.qemu.live import HANGS_WITH_NODES
from vmlab.hypervisors.qemu.machine import QemuMachine
from vmlab.hypervisors.qemu.snapshots import Saved
from vmlab.hypervisors.remembered import facts_of, remembered
from vmlab.hypervisors.threads import in_thread
from vmlab.machine.architecture import Architecture, parse_architecture
from vmlab.machine.capabilities import Capabilities, Capability, Limits
from vmlab.machine.errors import (
    HypervisorUnavailable,
    InvalidSpec,
    SpecProblem,
)
from vmlab.machine.faults import FaultKind
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner

OLDEST: Final = (7, 2)
"""The oldest QEMU that is known to work: `-action panic=pause`, JSON for -netdev."""

_KEPT_FROZEN: Final = 4
"""Snapshots whose memory is kept for more machines."""

_VERSION: Final = re.compile(r"version (\d+)\.(\d+)(?:\.(\d+))?")
_VERSION_TIMEOUT: Final = 60.0

SUPPORTED: Final = frozenset(
    {
        Capability.PAUSE,
        Capability.RESUME,
        Capability.SNAPSHOT,
        Capability.MEMORY_SNAPSHOT,
        Capability.RESTORE,
        Capability.FORK,
        Capability.COLD_MIGRATION,
        Capability.LIVE_MIGRATION,
        Capability.HOTPLUG_DISK,
        Capability.HOTPLUG_NIC,
        Capability.HOTPLUG_VCPU,
        Capability.HOTPLUG_MEMORY,
        Capability.RESIZE,
        Capability.RESIZE_DISK,
        Capability.DISK_IN_PLACE,
        Capability.PINNING,
        Capability.NUMA,
        Capability.CONSOLE,
        Capability.GUEST_CHANNELS,
        Capability.DISPLAY,
        Capability.SHARE_9P,
        Capability.SHARE_VIRTIOFS,
        Capability.FAULTS,
    }
)
UNSUPPORTED: Final = {
    Capability.DETERMINISTIC: "QEMU's devices are not driven by the instruction count",
    Capability.SHARE_COPY: "a copy needs the guest's agent: see vmlab.guests",
}
_LOADS: Final = (Capability.MEMORY_SNAPSHOT, Capability.FORK, Capability.LIVE_MIGRATION)
"""What a process does that loads the state of another one."""
_NO_PCI_HOTPLUG: Final = "guests of this architecture have no PCI hot-plug"
_GROWTH: Final = (Capability.HOTPLUG_VCPU, Capability.HOTPLUG_MEMORY)
_NO_GROWTH: Final = "guests of this architecture are resized at rest"
FAULTS: Final = frozenset(
    {
        FaultKind.DISK_ERROR,
        FaultKind.NET_PARTITION,
        FaultKind.PAUSE,
        FaultKind.KILL,
        FaultKind.MEMORY_PRESSURE,
        *breakable.KINDS,
        *wires.COUNTED,
    }
)
COUNTED: Final = breakable.COUNTED | wires.COUNTED


@dataclass(frozen=True, slots=True)
class Program:
    """A QEMU program: its path and version."""

    path: str
    version: tuple[int, ...]

    @property
    def text(self) -> str:
        """The version, as it is written."""
        return ".".join(map(str, self.version))


def find_program(architecture: Architecture) -> Program | None:
    """QEMU for guests of that architecture; None if it is not there or does not run."""
    path = shutil.which(QEMU_BINARIES[architecture])
    if path is None:
        return None
    try:
        found = remembered(f"version of {path}", facts_of(path), lambda: _ask_version(path))
    except OSError:
        return None
    return Program(path, tuple(found)) if found is not None else None


def _ask_version(path: str) -> list[int] | None:
    """What QEMU says its version is; None if it does not run, or says something else."""
    try:
        done = subprocess.run(
            [path, "--version"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_VERSION_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION.search(done.stdout)
    return [int(part) for part in match.groups("0")] if match else None


def _supports(programs: Mapping[Architecture, Program]) -> Capabilities:
    """What can be done with guests of those architectures."""
    fastest = accelerators.accelerators_for
    pluggable = any(BOARDS[architecture].hotplug == "port" for architecture in programs)
    loadable = any(
        timers.survive(architecture, program.version, fastest(architecture)[0])
        for architecture, program in programs.items()
    )
    lacking = {} if pluggable else {Capability.HOTPLUG_NIC: _NO_PCI_HOTPLUG}
    if not any(BOARDS[architecture].grows for architecture in programs):
        lacking |= dict.fromkeys(_GROWTH, _NO_GROWTH)
    lacking |= {} if loadable else dict.fromkeys(_LOADS, timers.WHY_NOT)
    if (missing := virtiofs.why_not()) is not None:
        lacking[Capability.SHARE_VIRTIOFS] = missing
    if programs and set(programs) <= set(HANGS_WITH_NODES):
        lacking[Capability.NUMA] = "; ".join(HANGS_WITH_NODES[name] for name in programs)
    supported = SUPPORTED - set(lacking)
    why = dict(UNSUPPORTED) | lacking
    found: dict[str, None] = {}
    for architecture in programs:
        found |= dict.fromkeys(fastest(architecture))
    names = [name for name in found if name != "tcg"] + ["tcg"]
    return Capabilities(
        hypervisor="qemu",
        version=max((program.text for program in programs.values()), default=""),
        supported=supported,
        unsupported=why,
        architectures=frozenset(programs),
        accelerators=tuple(names),
        faults=FAULTS,
        counted=COUNTED,
        breakable=breakable.KINDS,
        limits=Limits(vcpus_per_machine=255, disks_per_machine=64, nics_per_machine=32),
    )


class QemuHypervisor(MonitoredHypervisor):
    """The machines of one owner that QEMU runs.

    Args:
        owner: Run or store.
        only: The one architecture that is offered; None is every one that there is.
        debugger: Unix socket at which a machine waits for a debugger to let it run; for one
            machine at a time.
    """

    name: ClassVar[str] = "qemu"
    program: ClassVar[str] = "QEMU"

    def __init__(
        self,
        owner: Owner,
        *,
        only: Architecture | None = None,
        debugger: Path | None = None,
    ) -> None:
        super().__init__(owner)
        self.debugger = debugger
        self._only = only
        self._programs: dict[Architecture, Program] | None = None
        self._capabilities: Capabilities | None = None
        self._thawing = asyncio.Lock()
        self._frozen: OrderedDict[str, memory.Frozen] = OrderedDict()

    async def probe(self) -> Probe:
        return await asyncio.to_thread(provider.probe)

    async def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            # What `accelerator` asks about next is found out meanwhile.
            programs, _ = await asyncio.gather(
                asyncio.to_thread(_find_programs, self._only),
                asyncio.to_thread(accelerators.kvm),
            )
            self._programs = programs
            self._capabilities = await asyncio.to_thread(_supports, programs)
        return self._capabilities

    def program_for(self, architecture: Architecture) -> str:
        """QEMU's program for guests of that architecture."""
        return (self._programs or {})[architecture].path

    def loads(self, architecture: Architecture, accelerator: str) -> bool:
        """Whether a process can go on with the state of another one's guest."""
        version = (self._programs or {})[architecture].version
        return timers.survive(architecture, version, accelerator)

    def accelerator(self, architecture: Architecture) -> str:
        """The fastest accelerator that works for guests of that architecture."""
        return accelerators.accelerators_for(architecture)[0]

    def ticks_khz(self, architecture: Architecture, accelerator: str) -> int | None:
        """How fast a guest's counter runs, in kHz, where it is the host's and nothing tells."""
        if architecture is not Architecture.X86_64 or accelerator != "tcg":
            return None
        return host_ticks_khz()

    def new_machine(self, id_: str, spec: MachineSpec, state: MachineState) -> QemuMachine:
        return QemuMachine(self, id_, spec, state)

    async def import_snapshot(self, parcel: Path, name: str) -> Snapshot:
        """Take in a snapshot that `QemuMachine.export_snapshot` packed, for `create_from`.

        It belongs to no machine of this owner's, and goes with the owner.

        Raises:
            CorruptSnapshot: it is none.
            OSError: it cannot be read, or there is no room for it.
        """
        place = self.records.directory(f"imported-{secrets.token_hex(6)}")
        directory = place / "snapshots" / name
        found = await in_thread(lambda check: parcels.unpack(parcel, directory, check))
        # Its files are found by the machine that it is said to be of.
        return found.model_copy(update={"machine": place.name, "name": name})

    async def frozen(self, saved: Saved) -> memory.Frozen:
        """The memory of a snapshot, to be mapped by any number of machines that are made of it.

        Kept for the next of them; the one that was used least recently goes.
        """
        key = f"{saved.snapshot.machine}/{saved.snapshot.digest}"
        async with self._thawing:
            if key not in self._frozen:
                self._frozen[key] = await memory.copied(saved.memory, seal=True)
            self._frozen.move_to_end(key)
            while len(self._frozen) > _KEPT_FROZEN:
                # Machines that are being made of it have it open by the time this one is used.
                self._frozen.popitem(last=False)[1].close()
            return self._frozen[key]

    async def close(self) -> None:
        """Let go of it; a run's machines are deleted, a store's live on."""
        try:
            await super().close()
        finally:
            while self._frozen:
                self._frozen.popitem()[1].close()


def _find_programs(only: Architecture | None) -> dict[Architecture, Program]:
    """The programs that are there and new enough."""
    wanted = [only] if only is not None else list(Architecture)
    with ThreadPoolExecutor(len(wanted)) as pool:
        found = zip(wanted, pool.map(find_program, wanted), strict=True)
    return {
        architecture: program
        for architecture, program in found
        if program is not None and program.version >= OLDEST
    }


class QemuProvider(HypervisorProvider):
    """QEMU, where it is installed."""

    name: ClassVar[str] = "qemu"
    summary: ClassVar[str] = "QEMU over QMP: x86_64, riscv64, aarch64 and ppc64le; KVM or TCG"

    def probe(self) -> Probe:
        """Which programs and accelerators there are."""
        items = [_program_item(architecture) for architecture in Architecture]
        programs = _find_programs(None)
        image_tool = shutil.which("qemu-img")
        items.append(
            ProbeItem(
                name="qemu-img",
                works=image_tool is not None,
                detail=image_tool or "not installed",
                hint=None if image_tool else "install qemu-utils",
            )
        )
        items += [
            item for item in accelerators.probe_accelerators() if programs or item.name != "tcg"
        ]
        available = bool(programs) and image_tool is not None
        missing = "no QEMU of version 7.2 or later" if not programs else "qemu-img"
        return Probe(
            hypervisor=self.name,
            available=available,
            version=max((program.text for program in programs.values()), default=""),
            reason="" if available else f"{missing} is installed",
            hint=None
            if available
            else "install qemu-system-x86, qemu-system-misc, qemu-system-arm, qemu-system-ppc "
            "and qemu-utils, or what your distribution calls them",
            items=tuple(items),
        )

    def open(self, owner: Owner, options: Mapping[str, str] | None = None) -> QemuHypervisor:
        """QEMU for `owner`.

        The option `architecture` offers that one only; `gdb` is a Unix socket's path, at which a
        machine that is started waits for gdb before its first instruction.

        Raises:
            HypervisorUnavailable: no QEMU is installed.
            InvalidSpec: an option is unknown or wrong.
        """
        only: Architecture | None = None
        debugger: Path | None = None
        for name, value in (options or {}).items():
            if name == "gdb":
                debugger = debugger_socket(value, self.name)
                continue
            if name != "architecture":
                raise InvalidSpec(
                    [SpecProblem(name, value, "no such option; known are `architecture`, `gdb`")],
                    hypervisor=self.name,
                )
            try:
                only = parse_architecture(value)
            except ValueError as error:
                raise InvalidSpec(
                    [SpecProblem(name, value, str(error))], hypervisor=self.name
                ) from error
        wanted = [only] if only is not None else list(Architecture)
        if not any(shutil.which(QEMU_BINARIES[architecture]) for architecture in wanted):
            raise HypervisorUnavailable(
                f"QEMU is not installed ({', '.join(QEMU_BINARIES[one] for one in wanted)})",
                hint="`vmlab doctor` tells how to install it",
                hypervisor=self.name,
            )
        return QemuHypervisor(owner, only=only, debugger=debugger)


def _program_item(architecture: Architecture) -> ProbeItem:
    program = find_program(architecture)
    name = QEMU_BINARIES[architecture]
    if program is None:
        return ProbeItem(
            name=name,
            works=False,
            detail="not installed",
            hint=f"install {_PACKAGES[architecture]}",
        )
    if program.version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return ProbeItem(
            name=name, works=False, detail=f"{program.path} {program.text}", hint=f"needs {oldest}"
        )
    return ProbeItem(name=name, works=True, detail=f"{program.path} {program.text}")


_PACKAGES: Final = {
    Architecture.X86_64: "qemu-system-x86",
    Architecture.RISCV64: "qemu-system-misc",
    Architecture.AARCH64: "qemu-system-arm",
    Architecture.PPC64LE: "qemu-system-ppc",
}

provider = QemuProvider()
