"""The machine file of an engine process: from a machine's specification to its configuration.

A pure function, so that what will run can be read here and in the machine's `machine.toml`. Sockets
are named relative to the directory that the file is in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmlab.engine.configuration import (
    Boot,
    Configuration,
    DiskBus,
    DiskFile,
    Execution,
    Forward,
    Gdb,
    Idle,
    ImageFormat,
    Nic,
    SegmentKind,
    SocketPort,
    Time,
    TimeMode,
)
from vmlab.hypervisors.monitored import disks
from vmlab.hypervisors.monitored.boot import console_argument, refuse_image
from vmlab.hypervisors.monitored.emulator import QMP_SOCKET
from vmlab.hypervisors.monitored.names import disk_device, nic_device
from vmlab.hypervisors.monitored.networks import bridge_port, segment_group
from vmlab.hypervisors.monitored.streams import channel_socket, console_log, console_socket
from vmlab.machine import spec as specs
from vmlab.machine.errors import InvalidSpec, SpecProblem

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner

MACHINE_FILE: Final = "machine.toml"
EXECUTORS: Final = tuple(executor.value for executor in Execution)
"""Who can execute a guest, the fastest first: what is called accelerator elsewhere."""
SLOTS: Final = 23
"""virtio devices that a machine has room for, beside those that every one has."""


@dataclass(frozen=True, slots=True)
class Launch:
    """All that an engine process is started with.

    Attributes:
        id: The machine's id.
        spec: The machine.
        disks: The files of its disks, in the order of the specification.
        macs: The address of each NIC.
        logs: Directory of the consoles' logs.
        owner: Whose it is.
        debugger: Unix socket that a debugger connects to, if one may.
    """

    id: str
    spec: specs.MachineSpec
    disks: Sequence[disks.DiskFile]
    macs: Mapping[str, str]
    logs: Path
    owner: Owner
    debugger: Path | None = None


def check(spec: specs.MachineSpec) -> None:
    """Refuse what the engine's machines do not have.

    Raises:
        InvalidSpec: naming each field, and what would be right.
    """
    refuse_image(spec, "embedded")
    cpus, boot = spec.cpus, spec.boot
    problems = []
    if cpus.model is not None:
        problems.append(SpecProblem("cpus.model", cpus.model, "left out: there is one model"))
    for field in ("sockets", "cores", "threads"):
        if getattr(cpus, field) not in {None, 1, cpus.count}:
            expected = "left out: harts are not told apart"
            problems.append(SpecProblem(f"cpus.{field}", getattr(cpus, field), expected))
    if boot.kernel is None and boot.firmware is None:
        problems.append(SpecProblem("boot.kernel", None, "a kernel, or firmware to boot by"))
    serial = [console for console in spec.consoles if console.kind == "serial"]
    if len(serial) > 1:
        expected = "at most one serial one; others of the kind virtio"
        problems.append(SpecProblem("consoles", len(serial), expected))
    if spec.memory.size % 4096:
        problems.append(SpecProblem("memory.size", spec.memory.size, "whole pages of 4096 bytes"))
    blocks = sum(disk.bus == "virtio" for disk in spec.disks)
    if blocks + len(spec.nics) > SLOTS:
        expected = f"at most {SLOTS} NICs and disks, besides disks on the bus scsi"
        problems.append(SpecProblem("disks", blocks + len(spec.nics), expected))
    if problems:
        raise InvalidSpec(
            problems,
            machine=spec.name,
            hypervisor="embedded",
            hint="`--hypervisor qemu` has other machines",
        )


def configuration(launch: Launch) -> Configuration:
    """What the process builds."""
    spec = launch.spec
    serial = [console for console in spec.consoles if console.kind == "serial"]
    return Configuration(
        name=spec.name,
        memory=spec.memory.size,
        qmp=QMP_SOCKET,
        harts=spec.cpus.count,
        boot=_boot(spec),
        serial=_console(serial[0], launch.logs) if serial else None,
        consoles=[
            _console(console, launch.logs) for console in spec.consoles if console.kind == "virtio"
        ],
        channels=[SocketPort(channel_socket(name), name) for name in spec.channels],
        disks=[_disk(spec, disk) for disk in launch.disks],
        nics=[_nic(launch, nic) for nic in spec.nics],
        execution=Execution(spec.accelerator or EXECUTORS[0]),
        # Nothing of the guest runs before everything watches it, and one that has powered off is
        # looked at before its process ends.
        paused=True,
        no_shutdown=True,
        time=Time(mode=TimeMode.DETERMINISTIC, idle=Idle.WAIT) if spec.deterministic else Time(),
        seed=spec.seed if spec.deterministic else None,
        gdb=Gdb(str(launch.debugger)) if launch.debugger is not None else None,
    )


def _boot(spec: specs.MachineSpec) -> Boot:
    boot = spec.boot
    words = (console_argument(spec), boot.cmdline)
    return Boot(
        kernel=_absolute(boot.kernel),
        initrd=_absolute(boot.initrd),
        cmdline=" ".join(filter(None, words)) if boot.kernel is not None else "",
        firmware=_absolute(boot.firmware),
    )


def _absolute(path: Path | None) -> str | None:
    return str(path.absolute()) if path is not None else None


def _console(console: specs.Console, logs: Path) -> SocketPort:
    return SocketPort(console_socket(console.name), console.name, str(logs / console_log(console)))


def _disk(spec: specs.MachineSpec, disk: disks.DiskFile) -> DiskFile:
    specified = spec.disk(disk.name)
    return DiskFile(
        name=disk.node,
        file=str(disk.path),
        format=ImageFormat(disk.format),
        read_only=disk.readonly,
        serial=disk.serial_number,
        bus=DiskBus(specified.bus if specified is not None else "virtio"),
        device=disk_device(disk.name),
    )


def _nic(launch: Launch, nic: specs.Nic) -> Nic:
    kind, _, name = nic.network.partition(":")
    segment, path, forwards = SegmentKind.NONE, "", list[Forward]()
    if kind == "user":
        segment = SegmentKind.USER
        forwards = [
            Forward(forward.guest, forward.host, protocol=forward.protocol)
            for forward in nic.forwards
        ]
    elif kind == "segment":
        group, port = segment_group(launch.owner, name)
        segment, path = SegmentKind.MULTICAST, f"{group}:{port}"
    elif kind == "tap":
        segment, path = SegmentKind.TAP, name
    elif kind == "bridge":
        # The process makes the tap, which goes when it does.
        segment, path = SegmentKind.TAP, bridge_port(launch.owner, launch.id, nic.name)
    return Nic(nic_device(nic.name), launch.macs[nic.name], segment, path, forwards=forwards)
