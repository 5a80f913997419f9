"""The engine's interpreter beside QEMU's TCG, on the same bare-metal programs.

CPU seconds of whole processes (start-up included), in interleaved pairs; the figure is the median
of the pairs' ratios. The programs are in engine_guest/; they need riscv64-linux-gnu-gcc and
qemu-system-riscv64. Promise: integer, floating-point and memory code at 0.35 of TCG's speed or
more; accesses of devices are told, whatever they are. The table is kept in results/.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

COMPILER = "riscv64-linux-gnu-gcc"
OBJCOPY = "riscv64-linux-gnu-objcopy"
QEMU = "qemu-system-riscv64"
SOURCES = Path(__file__).parent / "engine_guest"
PAIRS = 7
PROMISE = 0.35  # of TCG's speed, for what computes
RESULTS = Path(__file__).parent / "results" / "engine-interpreter.json"


@dataclass(frozen=True)
class Kernel:
    """A program: how often it is repeated, so that it outweighs the start of a process.

    Attributes:
        accesses: of devices in one repetition; 0 where it computes.
    """

    repeat: int
    accesses: int = 0


KERNELS = {
    "integer": Kernel(400),
    "floating": Kernel(2500),
    "roots": Kernel(120),
    "memory": Kernel(12),
    "device": Kernel(30, 2000),
    "claim": Kernel(300, 3000),
}
MEMORY = 64 << 20


def build(folder: Path, kernel: str, repeat: int) -> Path:
    """Compile a kernel; the ELF file."""
    made = folder / f"{kernel}.elf"
    options = "-O2 -march=rv64gc -mabi=lp64d -mcmodel=medany -fno-pic -nostdlib -static"
    subprocess.run(
        [
            *(COMPILER, *options.split(), "-ffreestanding", "-Wl,--build-id=none", "-w"),
            *(f"-DKERNEL_{kernel.upper()}", f"-DREPEAT={repeat}"),
            *("-T", SOURCES / "bare.ld", SOURCES / "kernels.c", "-o", made),
        ],
        check=True,
    )
    return made


def run_guest(path: str) -> None:
    """Run a raw image on the interpreter, in this process, and print its output."""
    from vmlab.engine.accel.interpreter import InterpreterExecutor
    from vmlab.engine.board import Board
    from vmlab.engine.cpu.exits import Reason
    from vmlab.engine.cpu.hart import Hart
    from vmlab.engine.devices.clock import ManualClock
    from vmlab.engine.memory.ram import Ram

    ram = Ram(MEMORY)
    ends: list[str] = []
    board = Board(ram, 1, ManualClock(), lambda *_: None, lambda end, _code: ends.append(end))
    hart = Hart(ram, 0, board.plic.block)
    ram.load_image(ram.base, Path(path).read_bytes())
    executor = InterpreterExecutor(hart)
    output = bytearray()
    board.uart.send = output.extend
    while not ends:
        left = executor.run(1 << 40)
        if left.reason is Reason.READ:
            hart.complete_read(board.bus.read(left.address, left.size))
        elif left.reason is Reason.WRITE:
            board.bus.write(left.address, left.size, left.data)
        else:
            sys.exit(f"the guest left for {left} at {hart.pc:#x}")
    print(f"{output.decode().strip()} {hart.retired}")


def measure(command: list[str]) -> tuple[float, str]:
    """CPU seconds and output of a process."""
    before = os.times()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = os.times()
    used = after.children_user + after.children_system
    return used - before.children_user - before.children_system, done.stdout.strip()


@dataclass(frozen=True)
class Row:
    """A kernel's medians in CPU seconds, and the ratio of speeds."""

    kernel: str
    retired: int
    accesses: int
    tcg: float
    engine: float
    ratio: float


def compare(elf: Path) -> tuple[list[float], list[float], int]:
    """CPU seconds of TCG and of the engine, pair by pair, and the instructions that retired."""
    qemu = [QEMU, "-M", "virt", "-m", "64M", "-bios", "none", "-kernel", str(elf)]
    qemu += ["-display", "none", "-monitor", "none", "-serial", "stdio"]
    image = elf.with_suffix(".bin")
    subprocess.run([OBJCOPY, "-O", "binary", elf, image], check=True)
    engine = [sys.executable, __file__, "--guest", str(image)]
    measure(engine)  # compiles the interpreter, if nobody has
    theirs, ours, retired = [], [], 0
    for _ in range(PAIRS):
        seconds, expected = measure(qemu)
        theirs.append(seconds)
        seconds, output = measure(engine)
        ours.append(seconds)
        result, _, count = output.partition(" ")
        retired = int(count)
        if result != expected:
            sys.exit(f"{elf.stem}: the engine computes {result}, QEMU {expected}")
    return theirs, ours, retired


def measured(folder: Path, name: str, kernel: Kernel) -> Row:
    """Build and run a kernel."""
    theirs, ours, retired = compare(build(folder, name, kernel.repeat))
    return Row(
        name,
        retired,
        kernel.repeat * kernel.accesses,
        statistics.median(theirs),
        statistics.median(ours),
        statistics.median(a / b for a, b in zip(theirs, ours, strict=True)),
    )


def main() -> int:
    """Print the table; 1 if the promise is broken."""
    missing = [program for program in (COMPILER, QEMU) if shutil.which(program) is None]
    if missing:
        print(f"not measured: {', '.join(missing)} not installed")
        return 0
    print(f"CPU seconds of {PAIRS} interleaved pairs (median), and the median ratio of speeds")
    print(f"{'kernel':10} {'TCG':>7} {'engine':>7} {'of TCG':>7}  rate of the engine")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, kernel in KERNELS.items():
            row = measured(Path(folder), name, kernel)
            rows.append(row)
            rate = f"{row.retired / row.engine / 1e6:.0f} million instructions a second"
            if row.accesses:
                rate = f"{row.accesses / row.engine:.0f} accesses of a device a second"
            print(f"{name:10} {row.tcg:7.2f} {row.engine:7.2f} {row.ratio:6.2f}x  {rate}")
    host = {"processor": processor(), "load": os.getloadavg()[0], "pairs": PAIRS}
    kept = {"host": host, "kernels": [asdict(row) for row in rows]}
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
    return 0 if all(row.accesses or row.ratio >= PROMISE for row in rows) else 1


def processor() -> str:
    """What /proc/cpuinfo calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "CPU part")):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--guest"]:
        run_guest(sys.argv[2])
    else:
        sys.exit(main())
