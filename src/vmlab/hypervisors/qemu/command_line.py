"""The command line of a QEMU process: from a machine's specification to its arguments.

A pure function, so that what will run can be read here and in the machine's `command-line` file.
Sockets are named relative to the directory that QEMU is started in, which keeps their paths short.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmlab.hypervisors.monitored.boot import console_argument, refuse_image
from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.monitored.emulator import QMP_SOCKET
from vmlab.hypervisors.monitored.names import disk_device, nic_backend, nic_device
from vmlab.hypervisors.monitored.streams import channel_socket, console_log, console_socket
from vmlab.hypervisors.qemu.boards import BOARDS, Board
from vmlab.hypervisors.qemu.disks import device_options
from vmlab.hypervisors.qemu.layout import Layout, dimm_device, memory_object
from vmlab.hypervisors.qemu.virtiofs import socket_name
from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import MachineSpec, Share, ShareKind

_MODULES: Final = 16
"""Memory modules that may be added."""
SECOND_QMP_SOCKET: Final = "qmp-2.sock"
"""For another process that finds the machine while the first one talks to it: QEMU serves one
client of a socket at a time."""
PID_FILE: Final = "qemu.pid"
"""Which QEMU takes away when it exits, and leaves when it is killed."""
_FIRST_PORT_SLOT: Final = 0x10
"""Slot of the first root ports on pcie.0; what lies below is for the devices of the board."""


@dataclass(frozen=True, slots=True)
class Launch:
    """All that a QEMU process is started with.

    Attributes:
        id: The machine's id, 32 hexadecimal digits.
        spec: The machine.
        accelerator: "tcg", "kvm", ...
        layout: Where its devices are.
        disks: The files of its disks, in the order of the specification.
        netdevs: The host's side of each NIC, as `networks.backend` gives it.
        logs: Directory of the consoles' logs.
        program: QEMU's program.
        memory: Files that its memory is in; empty is fresh memory.
        private: Whether those files stay as they are, and what is written is the process's own.
        incoming: Whether it waits for the state of another process.
        debugger: Unix socket that a debugger connects to (docs/system/gdb.rst), if one may.
        ticks_khz: How fast the guest's counter runs, where it cannot learn it from the machine.
    """

    id: str
    spec: MachineSpec
    accelerator: str
    layout: Layout
    disks: tuple[DiskFile, ...]
    netdevs: tuple[Mapping[str, Any], ...]
    logs: Path
    program: str
    memory: tuple[Path, ...] = ()
    private: bool = False
    incoming: bool = False
    debugger: Path | None = None
    ticks_khz: int | None = None


def keyval(values: Mapping[str, Any]) -> str:
    """Options as QEMU's command line has them: the first value alone, then key=value."""
    items = list(values.items())
    words = [_text(items[0][1])]
    words += [f"{key}={_text(value)}" for key, value in items[1:]]
    return ",".join(words)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(",", ",,")


def arguments(launch: Launch) -> list[str]:
    """The arguments, the program first."""
    board = BOARDS[launch.spec.architecture]
    return [
        launch.program,
        *("-name", f"guest={launch.spec.name},debug-threads=on"),
        *("-uuid", str(uuid.UUID(launch.id))),
        *("-nodefaults", "-no-user-config"),
        *("-display", "none"),
        *_processor(launch, board),
        *_memory(launch, board),
        *_boot(launch),
        # A guest that powers down or panics is looked at before its process ends.
        *("-action", "reboot=reset,shutdown=pause,panic=pause"),
        *("-msg", "timestamp=on"),
        *("-qmp", f"unix:{QMP_SOCKET},server=on,wait=off"),
        *("-qmp", f"unix:{SECOND_QMP_SOCKET},server=on,wait=off"),
        *("-pidfile", PID_FILE),
        # Nothing of the guest runs before everything watches it.
        "-S",
        *_debugger(launch.debugger),
        *_ports(launch.layout, board),
        *_consoles(launch.spec, board, launch.logs),
        *_channels(launch.spec),
        *_always(board),
        *_disks(launch, board),
        *_nics(launch, board),
        *_shares(launch),
        *_display(launch.spec, board),
        *(("-incoming", "defer") if launch.incoming else ()),
    ]


def _debugger(socket: Path | None) -> list[str]:
    return [] if socket is None else ["-gdb", f"unix:{_text(socket)},server=on,wait=off"]


def _processor(launch: Launch, board: Board) -> list[str]:
    cpus = launch.spec.cpus
    came = launch.layout.vcpus
    at_start = cpus.count - len(came)
    topology: dict[str, Any] = {"cpus": at_start}
    if cpus.sockets or cpus.cores or cpus.threads:
        topology |= {
            "sockets": cpus.sockets or 1,
            "cores": cpus.cores or 1,
            "threads": cpus.threads or 1,
        }
    elif cpus.maximum is not None and cpus.maximum > at_start:
        topology["maxcpus"] = cpus.maximum
    model = cpus.model or (board.cpu if launch.accelerator == "tcg" else "host")
    return [
        *("-accel", launch.accelerator),
        *(("-cpu", model) if model is not None else ()),
        *("-smp", keyval(topology)),
        *(word for options in came for word in ("-device", keyval(options))),
    ]


def _memory(launch: Launch, board: Board) -> list[str]:
    """The memory, of one object or one for each NUMA node."""
    memory = launch.spec.memory
    modules = launch.layout.modules
    at_start = memory.size - sum(modules)
    sizes = [node.memory for node in memory.nodes] or [at_start]
    text = f"{at_start // MIB}M" if at_start % MIB == 0 else f"{at_start}B"
    if board.grows and memory.maximum is not None and memory.maximum > at_start:
        text += f",slots={_MODULES},maxmem={memory.maximum}B"
    words = ["-m", text]
    single = not memory.nodes
    words += ["-machine", board.machine + (",memory-backend=ram0" if single else "")]
    for number, size in enumerate((*sizes, *modules)):
        backend: dict[str, Any] = {
            "qom-type": "memory-backend-memfd",
            "id": memory_object(number),
        }
        if launch.memory:
            backend["qom-type"] = "memory-backend-file"
            backend["mem-path"] = str(launch.memory[number])
        backend |= {"size": size, "share": not launch.private}
        if number < len(memory.nodes) and memory.nodes[number].host_node is not None:
            backend |= {"host-nodes": [memory.nodes[number].host_node], "policy": "bind"}
        words += ["-object", json.dumps(backend)]
    for number, node in enumerate(memory.nodes):
        cpus = "".join(f",cpus={cpu}" for cpu in node.cpus)
        words += ["-numa", f"node,nodeid={number}{cpus},memdev=ram{number}"]
    for number in range(len(sizes), len(sizes) + len(modules)):
        module = f"pc-dimm,id={dimm_device(number)},memdev={memory_object(number)}"
        words += ["-device", module]
    return words


def _boot(launch: Launch) -> list[str]:
    spec, boot = launch.spec, launch.spec.boot
    refuse_image(spec, "qemu")
    words = ["-bios", str(boot.firmware.absolute())] if boot.firmware is not None else []
    if boot.kernel is None:
        return words
    words += ["-kernel", str(boot.kernel.absolute())]
    if boot.initrd is not None:
        words += ["-initrd", str(boot.initrd.absolute())]
    # What the specification says comes last, and so counts.
    own = (console_argument(spec), _growing(spec), _ticking(launch))
    cmdline = " ".join(filter(None, (*own, boot.cmdline)))
    return [*words, "-append", cmdline] if cmdline else words


def _ticking(launch: Launch) -> str:
    """Tell the kernel how fast its counter runs: see `host_ticks`."""
    return f"tsc_early_khz={launch.ticks_khz}" if launch.ticks_khz is not None else ""


def _growing(spec: MachineSpec) -> str:
    """Have the kernel use memory that comes later at once (its admin-guide/kernel-parameters)."""
    memory = spec.memory
    comes = memory.maximum is not None and memory.maximum > memory.size
    return "memhp_default_state=online" if comes else ""


def _ports(layout: Layout, board: Board) -> list[str]:
    words: list[str] = []
    for port in range(layout.ports):
        slot, function = divmod(port, 8)
        device: dict[str, Any] = {
            "driver": "pcie-root-port",
            "id": f"port{port}",
            "bus": board.bus,
            "chassis": port + 1,
            "addr": f"{_FIRST_PORT_SLOT + slot:#x}.{function}",
        }
        if function == 0:
            device["multifunction"] = True
        words += ["-device", keyval(device)]
    return words


def _chardev(kind: str, name: str, socket: str, log: Path | None = None) -> list[str]:
    """A socket that somebody may connect to at any time, and again."""
    chardev = f"socket,id={kind}-{name},path={socket},server=on,wait=off"
    if log is not None:
        chardev += f",logfile={_text(log)},logappend=on"
    return ["-chardev", chardev]


def _consoles(spec: MachineSpec, board: Board, logs: Path) -> list[str]:
    serials = [console for console in spec.consoles if console.kind == "serial"]
    if len(serials) > board.serials:
        raise InvalidSpec(
            [
                SpecProblem(
                    "consoles",
                    len(serials),
                    f"at most {board.serials} serial ones; others of the kind virtio",
                )
            ],
            machine=spec.name,
            hypervisor="qemu",
        )
    # The bus of the channels and of virtio consoles. Linux makes two queues for each port that
    # there may be and looks through all of them at each interrupt, so there are no spare ones:
    # port 0, which only a console can be, and as many as are used.
    used = len(spec.consoles) - len(serials) + len(spec.channels)
    words = ["-device", f"virtio-serial-pci,id=serial0,max_ports={max(2, 1 + used)}"]
    for console in spec.consoles:
        log = logs / console_log(console)
        words += _chardev("con", console.name, console_socket(console.name), log)
        if console.kind == "serial":
            words += ["-serial", f"chardev:con-{console.name}"]
        else:
            words += ["-device", f"virtconsole,bus=serial0.0,chardev=con-{console.name}"]
    return words


def _channels(spec: MachineSpec) -> list[str]:
    words: list[str] = []
    for name in spec.channels:
        words += _chardev("chan", name, channel_socket(name))
        words += ["-device", f"virtserialport,bus=serial0.0,chardev=chan-{name},name={name}"]
    return words


def _always(board: Board) -> list[str]:
    """Devices that every machine has: SCSI for what is plugged in, memory balloon, entropy."""
    devices = ["virtio-scsi-pci,id=scsi0", "virtio-balloon-pci,id=balloon0", "virtio-rng-pci"]
    devices += filter(None, (board.generation, board.panic))
    devices += ["virtio-keyboard-pci"] if board.power_key else []
    return [word for device in devices for word in ("-device", device)]


def place(board: Board, bus: str, number: int) -> dict[str, Any]:
    """Where a device at place `number` of the layout is, as `device_add` takes it."""
    if bus == "scsi":
        return {"bus": "scsi0.0", "scsi-id": number, "lun": 0}
    if board.hotplug == "port":
        return {"bus": f"port{number}"}
    slot, function = divmod(number, 8)
    device: dict[str, Any] = {"bus": board.bus, "addr": f"{_FIRST_PORT_SLOT + slot:#x}.{function}"}
    return device | ({"multifunction": True} if function == 0 else {})


def disk_options(launch_layout: Layout, board: Board, disk: DiskFile) -> dict[str, Any]:
    """A disk's device, as `device_add` takes it."""
    device, bus = disk_device(disk.name), launch_layout.buses[disk.name]
    return {
        **device_options(disk, bus),
        "id": device,
        **place(board, bus, launch_layout.places[device]),
    }


def nic_options(layout: Layout, board: Board, nic: str) -> dict[str, Any]:
    """A NIC's device, as `device_add` takes it."""
    device = nic_device(nic)
    return {
        "driver": "virtio-net-pci",
        "netdev": nic_backend(nic),
        "mac": layout.macs[nic],
        "id": device,
        # No option ROM: nothing boots from the network.
        "romfile": "",
        **place(board, "virtio", layout.places[device]),
    }


def _disks(launch: Launch, board: Board) -> list[str]:
    words: list[str] = []
    for number, disk in enumerate(launch.disks):
        options = disk_options(launch.layout, board, disk)
        if launch.spec.boot.kernel is None:
            options["bootindex"] = number
        words += ["-blockdev", json.dumps(disk.block_node()), "-device", keyval(options)]
    return words


def _nics(launch: Launch, board: Board) -> list[str]:
    words: list[str] = []
    for nic, netdev in zip(launch.spec.nics, launch.netdevs, strict=True):
        options = nic_options(launch.layout, board, nic.name)
        words += ["-netdev", json.dumps(netdev), "-device", keyval(options)]
    return words


def _shares(launch: Launch) -> list[str]:
    """The devices of the shares; one that finds its own way may have two of one tag."""
    words: list[str] = []
    for number, share in enumerate(launch.spec.shares):
        if share.kind in {ShareKind.AUTO, ShareKind.P9}:
            words += _p9(number, share)
        if share.tag in launch.layout.virtiofs:
            words += ["-chardev", f"socket,id=virtiofs{number},path={socket_name(number)}"]
            words += ["-device", f"vhost-user-fs-pci,chardev=virtiofs{number},tag={share.tag}"]
    return words


def _p9(number: int, share: Share) -> list[str]:
    options = {
        "driver": "local",
        "id": f"share{number}",
        "path": share.source.absolute(),
        # What the guest writes are files as any other, with the modes that the guest gives them.
        # Owners too where this process may do that; elsewhere all are this user's.
        "security_model": "passthrough" if os.geteuid() == 0 else "none",
        "multidevs": "remap",
        "readonly": share.readonly,
    }
    words = ["-fsdev", keyval(options)]
    return [*words, "-device", f"virtio-9p-pci,fsdev=share{number},mount_tag={share.tag}"]


def _display(spec: MachineSpec, board: Board) -> list[str]:
    return (
        [word for device in board.display for word in ("-device", device)] if spec.display else []
    )
