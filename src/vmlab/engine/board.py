"""The "virt" board: where its devices are, which interrupts they have, and what the guest is told.

Memory map, interrupt numbers and device tree are those of QEMU's riscv "virt" machine, so that the
same kernels boot; what is not here (PCI, flash, fw_cfg, the platform bus) is not in the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from vmlab.engine.cpu.interrupts import MSWI_BASE, NOWHERE
from vmlab.engine.devices import aclint, plic, rtc, syscon, uart
from vmlab.engine.devices.bus import Bus, Device, Window
from vmlab.engine.devices.clock import TIMEBASE_HZ, Clock
from vmlab.engine.devices.virtio import mmio
from vmlab.engine.devices.virtio.device import VirtioDevice
from vmlab.engine.devicetree import Node, cells, flatten
from vmlab.engine.memory.ram import RAM_BASE, Ram
from vmlab.machine.errors import VmlabError

SYSCON_BASE: Final = 0x10_0000
RTC_BASE: Final = 0x10_1000
CLINT_BASE: Final = 0x200_0000
SSWI_BASE: Final = 0x2F0_0000
PLIC_BASE: Final = 0xC00_0000
UART_BASE: Final = 0x1000_0000
VIRTIO_BASE: Final = 0x1000_1000
VIRTIO_STRIDE: Final = 0x1000

UART_SOURCE: Final = 10
RTC_SOURCE: Final = 11
QEMU_SLOTS: Final = 8
MAX_SLOTS: Final = 28
"""QEMU's board has 8 virtio-mmio slots. More are put behind them, up to the sources of PCI."""
MAX_HARTS: Final = 512
_UART_HZ: Final = 3_686_400
_CACHE_BLOCK: Final = 64
_SOFTWARE_M: Final = 3
_TIMER_M: Final = 7
_EXTERNAL_M: Final = 11
_EXTERNAL_S: Final = 9
_SOFTWARE_S: Final = 1

BASE_EXTENSIONS: Final = ("i", "m", "a", "f", "d", "c")
EXTENSIONS: Final = (
    "zicbom", "zicbop", "zicboz", "zicntr", "zicsr", "zifencei", "zihintpause",
    "zba", "zbb", "zbs", "sstc", "svinval",
)  # fmt: skip
"""What the guest is told beside rv64imafdc."""


def virtio_source(slot: int) -> int:
    """The interrupt source of a virtio-mmio slot: 1 to 8 as on QEMU, then 12 and up."""
    return 1 + slot if slot < QEMU_SLOTS else 12 + slot - QEMU_SLOTS


@dataclass(frozen=True)
class Chosen:
    """What the loader tells the kernel.

    Args:
        bootargs: The kernel's command line.
        initrd: (first address, address behind the last) of the initial RAM disk.
        rng_seed: Random bytes for the kernel's entropy pool, or none.
    """

    bootargs: str = ""
    initrd: tuple[int, int] | None = None
    rng_seed: bytes = b""


class Board:
    """The devices of one machine on one bus.

    Args:
        ram: The guest's memory, at 0x80000000.
        harts: Number of harts, 1 to 512.
        clock: The machine's time.
        set_pending: Called with (hart, bit of mip, level) from any thread.
        end: Called when the guest asks to be powered off or restarted, or fails, with its code.
        separate_aclint: Show MSWI, MTIMER and SSWI in the device tree, as `-M virt,aclint=on`
            does, instead of a CLINT.
        slots: virtio-mmio slots, 8 to 28.
        extensions: What the harts have beside rv64imafdc.
        set_compare: Called with (hart, ticks) for `mtimecmp`, if the harts do the comparing.
        line_changed: Called instead of `set_pending` for the lines of the PLIC and of MSWI, if the
            harts look at their block themselves.
    """

    def __init__(
        self,
        ram: Ram,
        harts: int,
        clock: Clock,
        set_pending: Callable[[int, int, bool], None],
        end: Callable[[syscon.End, int], None],
        *,
        separate_aclint: bool = False,
        slots: int = QEMU_SLOTS,
        extensions: tuple[str, ...] = EXTENSIONS,
        set_compare: Callable[[int, int], None] | None = None,
        line_changed: Callable[[int, int, bool], None] | None = None,
    ) -> None:
        if not 1 <= harts <= MAX_HARTS:
            raise VmlabError(
                f"a machine of {harts} harts cannot be made",
                hint=f"the virt board has 1 to {MAX_HARTS}",
            )
        if not QEMU_SLOTS <= slots <= MAX_SLOTS:
            raise VmlabError(
                f"a board with {slots} virtio slots cannot be made",
                hint=f"it has {QEMU_SLOTS} to {MAX_SLOTS}; a SCSI host needs one for all its disks",
            )
        self.ram = ram
        self.harts = harts
        self.separate_aclint = separate_aclint
        self.extensions = extensions
        self.bus = Bus([("RAM", ram.base, ram.end)])
        self.plic = plic.Plic(harts, line_changed or set_pending)
        self.aclint = aclint.Aclint(
            harts,
            clock,
            set_pending,
            set_compare,
            software=self.plic.block.software,
            software_changed=line_changed,
        )
        self.uart = uart.Uart(self.plic.line(UART_SOURCE))
        self.rtc = rtc.GoldfishRtc(clock, self.plic.line(RTC_SOURCE))
        self.syscon = syscon.Syscon(end)
        self.slots: list[mmio.VirtioMmio] = [
            mmio.VirtioMmio(None, self.plic.line(virtio_source(slot))) for slot in range(slots)
        ]
        words = frozenset({4})
        attach = self.bus.attach
        attach(Window("syscon", SYSCON_BASE, syscon.SIZE, frozenset({2, 4})), self.syscon)
        attach(Window("rtc", RTC_BASE, rtc.SIZE, words), self.rtc)
        attach(Window("aclint", CLINT_BASE, aclint.CLINT_SIZE, frozenset({4, 8})), self.aclint)
        self.bus.tell("aclint", self._aclint_answers)
        if separate_aclint:
            sswi = aclint.Sswi(harts, set_pending)
            attach(Window("sswi", SSWI_BASE, aclint.SSWI_SIZE, words), sswi)
        attach(Window("plic", PLIC_BASE, plic.SIZE, words), self.plic)
        self.bus.tell("plic", self._plic_answers)
        attach(Window("uart", UART_BASE, uart.SIZE), self.uart)
        self.bus.tell("uart", self._uart_answers)
        for slot, transport in enumerate(self.slots):
            base = VIRTIO_BASE + VIRTIO_STRIDE * slot
            attach(Window(f"virtio{slot}", base, mmio.SIZE), transport)

    def _plic_answers(self, device: Device) -> None:
        """Harts claim and complete by themselves unless something stands before the PLIC."""
        self.plic.answer_at(PLIC_BASE if device is self.plic else None)

    def _aclint_answers(self, device: Device) -> None:
        """So they interrupt each other by MSWI."""
        self.plic.block.words[MSWI_BASE] = CLINT_BASE if device is self.aclint else NOWHERE

    def _uart_answers(self, device: Device) -> None:
        """So they do with the UART's line status."""
        place = UART_BASE + uart.LINE_STATUS if device is self.uart else None
        self.uart.publish = lambda status: self.plic.show_status(place, status)
        self.uart.tell_status()

    def plug(self, device: VirtioDevice) -> int:
        """Put a virtio device into the next free slot, before the machine starts.

        Raises:
            VmlabError: all slots are taken.
        """
        for slot, transport in enumerate(self.slots):
            if transport.device is None:
                line = self.plic.line(virtio_source(slot))
                self.slots[slot] = mmio.VirtioMmio(device, line)
                self.bus.replace(f"virtio{slot}", self.slots[slot])
                return slot
        raise VmlabError(
            f"there is no slot left for {device.name!r}: all {len(self.slots)} are taken",
            hint="disks beyond the first few go behind a SCSI host, which needs one slot for all",
        )

    def devices(self) -> Iterable[VirtioDevice]:
        """The virtio devices, in the order of their slots."""
        return [slot.device for slot in self.slots if slot.device is not None]

    def reset(self) -> None:
        """All devices as at power-on; RAM keeps its content."""
        for slot in self.slots:
            slot.reset()
        self.uart.reset()
        self.rtc.reset()
        self.aclint.reset()
        self.plic.reset()

    # --------------------------------------------------------------------------- device tree

    def device_tree(self, chosen: Chosen) -> bytes:
        """The flattened device tree of this board."""
        root = Node("")
        root.set("#address-cells", 2)
        root.set("#size-cells", 2)
        root.set("compatible", "riscv-virtio")
        root.set("model", "riscv-virtio,vmlab")
        node = root.add("chosen", stdout_path=f"/soc/serial@{UART_BASE:x}")
        if chosen.bootargs:
            node.set("bootargs", chosen.bootargs)
        if chosen.rng_seed:
            node.set("rng-seed", chosen.rng_seed)
        if chosen.initrd is not None:
            node.set("linux,initrd-start", cells(chosen.initrd[0]))
            node.set("linux,initrd-end", cells(chosen.initrd[1]))
        root.add(
            f"memory@{RAM_BASE:x}",
            device_type="memory",
            reg=[*cells(self.ram.base), *cells(self.ram.size)],
        )
        intc = self._add_cpus(root)
        self._add_soc(root, intc)
        return flatten(root)

    def _add_cpus(self, root: Node) -> list[int]:
        """The nodes of the harts; the phandles of their interrupt controllers."""
        cpus = root.add("cpus", timebase_frequency=TIMEBASE_HZ)
        cpus.set("#address-cells", 1)
        cpus.set("#size-cells", 0)
        cluster = Node("cluster0")
        controllers = []
        for hart in range(self.harts):
            cpu_handle, intc_handle = 1 + 2 * hart, 2 + 2 * hart
            cpu = cpus.add(f"cpu@{hart:x}", device_type="cpu", reg=hart, status="okay",
                           compatible="riscv", phandle=cpu_handle)  # fmt: skip
            cpu.set("mmu-type", "riscv,sv48")
            cpu.set("riscv,isa", "_".join(["rv64" + "".join(BASE_EXTENSIONS), *self.extensions]))
            cpu.set("riscv,isa-base", "rv64i")
            cpu.set("riscv,isa-extensions", [*BASE_EXTENSIONS, *self.extensions])
            for kind in ("cbom", "cbop", "cboz"):
                if f"zi{kind}" in self.extensions:
                    cpu.set(f"riscv,{kind}-block-size", _CACHE_BLOCK)
            intc = cpu.add("interrupt-controller", interrupt_controller=None,
                           compatible="riscv,cpu-intc", phandle=intc_handle)  # fmt: skip
            intc.set("#interrupt-cells", 1)
            cluster.add(f"core{hart}", cpu=cpu_handle)
            controllers.append(intc_handle)
        cpu_map = cpus.add("cpu-map")
        cpu_map.children.append(cluster)
        return controllers

    def _add_soc(self, root: Node, intc: list[int]) -> None:
        plic_handle, test_handle = 2 * self.harts + 1, 2 * self.harts + 2
        soc = root.add("soc", compatible="simple-bus", ranges=None)
        soc.set("#address-cells", 2)
        soc.set("#size-cells", 2)

        def add(name: str, base: int, size: int, source: int, compatible: str) -> Node:
            node = soc.add(f"{name}@{base:x}", compatible=compatible,
                           reg=[*cells(base), *cells(size)])  # fmt: skip
            if source:
                node.set("interrupts", source)
                node.set("interrupt-parent", plic_handle)
            return node

        add("rtc", RTC_BASE, rtc.SIZE, RTC_SOURCE, "google,goldfish-rtc")
        serial = add("serial", UART_BASE, uart.SIZE, UART_SOURCE, "ns16550a")
        serial.set("clock-frequency", _UART_HZ)
        test = add("test", SYSCON_BASE, syscon.SIZE, 0, "sifive,test1")
        test.set("compatible", ["sifive,test1", "sifive,test0", "syscon"])
        test.set("phandle", test_handle)
        for slot in range(len(self.slots)):
            add("virtio_mmio", VIRTIO_BASE + VIRTIO_STRIDE * slot, mmio.SIZE,
                virtio_source(slot), "virtio,mmio")  # fmt: skip
        controller = add("plic", PLIC_BASE, plic.SIZE, 0, "sifive,plic-1.0.0")
        controller.set("compatible", ["sifive,plic-1.0.0", "riscv,plic0"])
        controller.set("phandle", plic_handle)
        controller.set("riscv,ndev", plic.SOURCES)
        controller.set("interrupt-controller", None)
        controller.set("#interrupt-cells", 1)
        controller.set("#address-cells", 0)
        controller.set("interrupts-extended", _wires(intc, _EXTERNAL_M, _EXTERNAL_S))
        self._add_aclint(soc, intc)
        for name, value in (("poweroff", syscon.POWEROFF), ("reboot", syscon.REBOOT)):
            root.add(name, compatible=f"syscon-{name}", regmap=test_handle, offset=0, value=value)

    def _add_aclint(self, soc: Node, intc: list[int]) -> None:
        if not self.separate_aclint:
            clint = soc.add(f"clint@{CLINT_BASE:x}",
                            reg=[*cells(CLINT_BASE), *cells(aclint.CLINT_SIZE)])  # fmt: skip
            clint.set("compatible", ["sifive,clint0", "riscv,clint0"])
            clint.set("interrupts-extended", _wires(intc, _SOFTWARE_M, _TIMER_M))
            return
        for name, base, size, wire in (
            ("mswi", CLINT_BASE, 0x4000, _SOFTWARE_M),
            ("sswi", SSWI_BASE, aclint.SSWI_SIZE, _SOFTWARE_S),
        ):
            node = soc.add(f"{name}@{base:x}", compatible=f"riscv,aclint-{name}",
                           reg=[*cells(base), *cells(size)], interrupt_controller=None)  # fmt: skip
            node.set("#interrupt-cells", 0)
            node.set("interrupts-extended", _wires(intc, wire))
        mtimer = CLINT_BASE + 0x4000
        node = soc.add(f"mtimer@{mtimer:x}", compatible="riscv,aclint-mtimer")
        # First `mtime`, then the comparators.
        node.set("reg", [*cells(CLINT_BASE + 0xBFF8), *cells(0x4008),
                         *cells(mtimer), *cells(0x7FF8)])  # fmt: skip
        node.set("interrupts-extended", _wires(intc, _TIMER_M))


def _wires(controllers: list[int], *lines: int) -> list[int]:
    """interrupts-extended: every hart's controller with each of the lines."""
    return [cell for handle in controllers for line in lines for cell in (handle, line)]
