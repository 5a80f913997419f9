"""The embedded engine as a hypervisor: what it can do, what of it works here, its machines."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from vmlab import __version__
from vmlab.hypervisors.base import HypervisorProvider, Probe, ProbeItem
from vmlab.hypervisors.embedded import faults
from vmlab.hypervisors.embedded.machine import EmbeddedMachine
from vmlab.hypervisors.embedded.machine_file import EXECUTORS, SLOTS
from vmlab.hypervisors.monitored.debugger import debugger_socket
from vmlab.hypervisors.monitored.hypervisor import MonitoredHypervisor
from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import Capabilities, Capability, Limits
from vmlab.machine.errors import HypervisorUnavailable, InvalidSpec, SpecProblem
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner

HOSTS: Final = frozenset({"x86_64", "amd64", "aarch64", "arm64"})
"""Processors that the engine has native code for, as platform.machine() calls them."""
SUPPORTED: Final = frozenset(
    {
        Capability.PAUSE,
        Capability.RESUME,
        Capability.HOTPLUG_DISK,
        Capability.RESIZE,
        Capability.RESIZE_DISK,
        Capability.DISK_IN_PLACE,
        Capability.CONSOLE,
        Capability.GUEST_CHANNELS,
        Capability.DETERMINISTIC,
        Capability.FAULTS,
    }
)
_LATER: Final = "the engine does not have it yet: --hypervisor qemu has"
UNSUPPORTED: Final = {
    **dict.fromkeys(
        (
            Capability.SNAPSHOT,
            Capability.MEMORY_SNAPSHOT,
            Capability.RESTORE,
            Capability.FORK,
            Capability.COLD_MIGRATION,
            Capability.LIVE_MIGRATION,
            Capability.SHARE_9P,
            Capability.PINNING,
        ),
        _LATER,
    ),
    Capability.HOTPLUG_NIC: "its board has no bus that a NIC could come to while it runs",
    Capability.HOTPLUG_VCPU: "riscv64 guests are resized at rest",
    Capability.HOTPLUG_MEMORY: "riscv64 guests are resized at rest",
    Capability.NUMA: "its board has one node",
    Capability.DISPLAY: "its board has no display",
}
CAPABILITIES: Final = Capabilities(
    hypervisor="embedded",
    version=__version__,
    supported=SUPPORTED,
    unsupported=UNSUPPORTED,
    architectures=frozenset({Architecture.RISCV64}),
    accelerators=EXECUTORS,
    faults=faults.FAULTS,
    counted=faults.COUNTED,
    limits=Limits(vcpus_per_machine=64, disks_per_machine=128, nics_per_machine=SLOTS),
)


class EmbeddedHypervisor(MonitoredHypervisor):
    """The machines of one owner that the embedded engine runs.

    Args:
        owner: Run or store.
        debugger: Unix socket at which a machine waits for a debugger to let it run; for one
            machine at a time.
    """

    name: ClassVar[str] = "embedded"
    program: ClassVar[str] = "engine"

    async def probe(self) -> Probe:
        return await asyncio.to_thread(provider.probe)

    async def capabilities(self) -> Capabilities:
        return CAPABILITIES

    def __init__(self, owner: Owner, *, debugger: Path | None = None) -> None:
        super().__init__(owner)
        self.debugger = debugger

    def new_machine(self, id_: str, spec: MachineSpec, state: MachineState) -> EmbeddedMachine:
        return EmbeddedMachine(self, id_, spec, state)

    async def _prepare(self) -> None:
        # Before any machine waits for it: the first time it takes its while.
        await asyncio.to_thread(_compile)
        await super()._prepare()


def _compile() -> None:
    """Have the engine's interpreter compiled for this host, once for a version.

    Raises:
        HypervisorUnavailable: that cannot be done.
    """
    from vmlab.engine.accel.interpreter import prepare
    from vmlab.engine.code.cache import default_folder
    from vmlab.engine.compile.client import CompileFailed

    if not _can_keep(default_folder()):
        # It is there already, or each process compiles its own.
        return
    try:
        prepare()
    except CompileFailed as error:
        raise HypervisorUnavailable(
            f"the engine's interpreter cannot be compiled: {error}",
            hint="`vmlab doctor` looks at what it needs; or take --hypervisor qemu",
            hypervisor="embedded",
        ) from error


class EmbeddedProvider(HypervisorProvider):
    """vmlab's own engine, which is always there."""

    name: ClassVar[str] = "embedded"
    summary: ClassVar[str] = "vmlab's own engine: riscv64 on any x86_64 or aarch64 host"

    def probe(self) -> Probe:
        """Whether this host's processor and system let the engine's native code run."""
        items = [_processor(), _executable_memory(), _interpreter(), _user_network()]
        failed = next((item for item in items[:3] if not item.works), None)
        return Probe(
            hypervisor=self.name,
            available=failed is None,
            version=__version__,
            reason=f"{failed.name}: {failed.detail}" if failed is not None else "",
            hint=failed.hint if failed is not None else None,
            items=tuple(items),
        )

    def open(self, owner: Owner, options: Mapping[str, str] | None = None) -> EmbeddedHypervisor:
        """The engine for `owner`.

        The option `gdb` is a Unix socket's path, at which a machine that is started waits for gdb
        before its first instruction.

        Raises:
            HypervisorUnavailable: this host's processor is none that it has code for.
            InvalidSpec: an option is unknown or wrong.
        """
        given = dict(options or {})
        socket = given.pop("gdb", None)
        debugger = debugger_socket(socket, self.name) if socket is not None else None
        problems = [
            SpecProblem(name, value, "no such option; known is `gdb`")
            for name, value in given.items()
        ]
        if problems:
            raise InvalidSpec(problems, hypervisor=self.name)
        processor = _processor()
        if not processor.works:
            raise HypervisorUnavailable(
                f"the embedded engine has no code for {processor.detail}",
                hint=processor.hint,
                hypervisor=self.name,
            )
        return EmbeddedHypervisor(owner, debugger=debugger)


def _processor() -> ProbeItem:
    machine = platform.machine()
    works = machine.lower() in HOSTS
    return ProbeItem(
        name="processor",
        works=works,
        detail=machine or "unknown",
        hint=None if works else "take --hypervisor qemu",
    )


def _executable_memory() -> ProbeItem:
    """Whether memory can be written through one mapping and executed through another."""
    from vmlab.engine.code.arena import Arena

    try:
        Arena(65536).close()
    except OSError as error:
        return ProbeItem(
            name="executable memory",
            works=False,
            detail=f"refused: {error.strerror}",
            hint="is /proc/sys/vm/memfd_noexec 2, or does a policy forbid it?",
        )
    return ProbeItem(name="executable memory", works=True, detail="a memory file, mapped twice")


def _interpreter() -> ProbeItem:
    """Whether the interpreter is compiled, or can be."""
    from vmlab.engine.accel.interpreter import is_prepared
    from vmlab.engine.code.cache import default_folder

    folder = default_folder()
    if is_prepared():
        return ProbeItem(name="interpreter", works=True, detail=f"compiled, in {folder}")
    if find_spec("llvmlite") is None:
        return ProbeItem(
            name="interpreter",
            works=False,
            detail="not compiled, and llvmlite is not installed",
            hint="pip install llvmlite",
        )
    if not _can_keep(folder):
        return ProbeItem(
            name="interpreter",
            works=True,
            detail=f"compiled anew for each machine: {folder} cannot be written",
            hint="let it be written, or set XDG_CACHE_HOME",
        )
    return ProbeItem(name="interpreter", works=True, detail="compiled at the first start")


def _can_keep(folder: Path) -> bool:
    """Whether files can be made in a directory, which may be made first."""

    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def _user_network() -> ProbeItem:
    from vmlab.engine.devices.virtio.user_network import PROGRAM

    path = shutil.which(PROGRAM)
    return ProbeItem(
        name="user network",
        works=path is not None,
        detail=path or f"{PROGRAM} is not installed",
        hint=None if path else f"install {PROGRAM} for --network; segments do without",
    )


provider = EmbeddedProvider()
