"""What QEMU's machine types need that differs between architectures, as data.

The boards are those that Linux distributions' kernels boot without further help: q35 (x86_64),
virt (riscv64, aarch64) and pseries (ppc64le).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from vmlab.machine.architecture import Architecture

SPARE_PORTS: Final = 8
"""Root ports that are left free for devices plugged in later."""


@dataclass(frozen=True, slots=True)
class Board:
    """A machine type of QEMU's.

    Attributes:
        machine: Value of `-machine`, without the memory backend.
        cpu: CPU model under TCG; None is the board's own.
        hotplug: How disks and NICs come and go while it runs: "port" is behind root ports of PCI
            Express, "scsi" is disks on virtio-scsi only, because the guests have no PCI hot-plug.
        bus: The PCI bus of the devices that do not come and go.
        serials: Serial ports.
        panic: Device that tells of a guest's panic, if the board does not by itself.
        generation: Device that tells a guest that it was cloned (VM generation id), if there is.
        display: Devices for a display and a keyboard.
        grows: Whether vCPUs and memory can be added while it runs.
        power_key: Whether a key of a keyboard is the power button, since the board has none.
    """

    machine: str
    cpu: str | None
    hotplug: Literal["port", "scsi"]
    serials: int
    panic: str | None
    generation: str | None
    display: tuple[str, ...]
    power_key: bool = False
    grows: bool = False
    bus: str = "pcie.0"


BOARDS: Final[dict[Architecture, Board]] = {
    Architecture.X86_64: Board(
        machine="q35",
        # TCG executes "rep movsb" byte by byte; kernels that do not see ERMS copy by words.
        cpu="max,-erms",
        hotplug="port",
        serials=4,
        panic="pvpanic",
        generation="vmgenid,guid=auto",
        display=("VGA", "virtio-keyboard-pci"),
        grows=True,
    ),
    # Debian's riscv64 kernel is built without CONFIG_HOTPLUG_PCI.
    Architecture.RISCV64: Board(
        machine="virt",
        cpu=None,
        hotplug="scsi",
        serials=1,
        panic="pvpanic-pci",
        generation=None,
        display=("bochs-display",),
        power_key=True,
    ),
    Architecture.AARCH64: Board(
        machine="virt",
        # TCG spends most of its time on the pointer authentication of "max".
        cpu="cortex-a72",
        hotplug="port",
        serials=1,
        panic="pvpanic-pci",
        generation=None,
        display=("bochs-display", "virtio-keyboard-pci"),
    ),
    # The capabilities that TCG does not have (docs/system/ppc/pseries.rst) are left out, or QEMU
    # warns of each.
    Architecture.PPC64LE: Board(
        machine="pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off",
        cpu="power9",
        # Its PCI hot-plug needs a daemon in the guest (rtas_errd).
        hotplug="scsi",
        bus="pci.0",
        serials=4,
        panic=None,
        generation=None,
        display=("bochs-display", "virtio-keyboard-pci"),
    ),
}
