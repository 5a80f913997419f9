"""Linux, on QEMU's board, is given the device tree of the embedded engine's board."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from vmlab.engine.board import Board, Chosen
from vmlab.engine.devices.clock import ManualClock
from vmlab.engine.memory.ram import Ram
from vmlab.images import Image
from vmlab.machine.architecture import Architecture

MIB = 1 << 20
# What QEMU 7.2's harts have of what the engine's have.
EXTENSIONS = ("zicsr", "zifencei", "zihintpause", "zba", "zbb", "zbs", "sstc")


@pytest.mark.boots
@pytest.mark.slow
@pytest.mark.timeout(660)
@pytest.mark.parametrize("separate_aclint", [False, True])
def test_linux_finds_every_device_in_the_engines_device_tree(
    images: Callable[[Architecture], Image], tmp_path: Path, separate_aclint: bool
) -> None:
    ram = Ram(256 * MIB)
    board = Board(
        ram,
        2,
        ManualClock(),
        lambda hart, bit, level: None,
        lambda kind, code: None,
        separate_aclint=separate_aclint,
        extensions=EXTENSIONS,
    )
    ram.close()
    # No init: the kernel panics at the end of its boot, restarts, and QEMU ends.
    tree = tmp_path / "board.dtb"
    tree.write_bytes(
        board.device_tree(Chosen("console=ttyS0 panic=-1 rdinit=/none", rng_seed=bytes(range(32))))
    )
    missing = [
        "Machine model: riscv-virtio,vmlab",
        "Brought up 1 node, 2 CPUs",
        "plic@c000000: mapped 96 interrupts with 2 handlers for 4 contexts",
        "10000000.serial: ttyS0 at MMIO 0x10000000",
        "is a 16550A",
        "goldfish_rtc 101000.rtc: setting system clock to",
        "crng init done",
        "Unable to mount root fs",
    ]
    # Harts that take turns: how QEMU's threads get on with each other is not asked here, and
    # one boot of many hundreds, each hart on a thread of its own, stood still for ten minutes.
    command = [
        "qemu-system-riscv64", "-M", "virt" + (",aclint=on" if separate_aclint else ""),
        "-accel", "tcg,thread=single",
        "-smp", "2", "-m", "256M", "-nographic", "-no-reboot",
        "-dtb", str(tree), "-kernel", str(images(Architecture.RISCV64).kernel),
        "-device", "virtio-rng-device",
    ]  # fmt: skip
    text = ""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdout is not None
        too_long = threading.Timer(600, qemu.kill)
        too_long.start()
        try:
            for line in qemu.stdout:
                text += line.decode(errors="replace")
                missing = [expected for expected in missing if expected not in text]
                if not missing:
                    break
        finally:
            too_long.cancel()
            qemu.kill()
    assert not missing, f"{missing} not in:\n{text}"
