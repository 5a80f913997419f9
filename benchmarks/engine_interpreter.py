"""The engine's interpreter beside QEMU's TCG, on the same bare-metal programs.

CPU seconds of whole processes (start-up included), in interleaved pairs; the figure is the median
of the pairs' ratios. The programs are in engine_guest/; they need riscv64-linux-gnu-gcc and
qemu-system-riscv64. Promise: integer code at 0.35 of TCG's speed or more.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

COMPILER = "riscv64-linux-gnu-gcc"
OBJCOPY = "riscv64-linux-gnu-objcopy"
QEMU = "qemu-system-riscv64"
SOURCES = Path(__file__).parent / "engine_guest"
PAIRS = 7
PROMISE = 0.35  # of TCG's speed, for integer code
# Kernel: how often it is repeated; what takes TCG long enough to outweigh the start.
KERNELS = {"integer": 400, "floating": 400, "memory": 10}
MEMORY = 64 << 20

UART, POWER = 0x1000_0000, 0x10_0000


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
    from vmlab.engine.cpu.exits import Reason
    from vmlab.engine.cpu.hart import Hart
    from vmlab.engine.memory.ram import Ram

    ram = Ram(MEMORY)
    hart = Hart(ram)
    ram.load_image(ram.base, Path(path).read_bytes())
    executor = InterpreterExecutor(hart)
    output = bytearray()
    while True:
        left = executor.run(1 << 40)
        if left.reason is not Reason.WRITE or left.address not in (UART, POWER):
            sys.exit(f"the guest left for {left} at {hart.pc:#x}")
        if left.address == POWER:
            break
        output.append(left.data)
    print(f"{output.decode().strip()} {hart.retired}")


def measure(command: list[str]) -> tuple[float, str]:
    """CPU seconds and output of a process."""
    before = os.times()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = os.times()
    used = after.children_user + after.children_system
    return used - before.children_user - before.children_system, done.stdout.strip()


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


def main() -> int:
    """Print the table; 1 if the promise is broken."""
    missing = [program for program in (COMPILER, QEMU) if shutil.which(program) is None]
    if missing:
        print(f"not measured: {', '.join(missing)} not installed")
        return 0
    print(f"CPU seconds of {PAIRS} interleaved pairs (median), and the median ratio of speeds")
    print(f"{'kernel':10} {'M instr.':>9} {'TCG':>7} {'engine':>7} {'MIPS':>6} {'of TCG':>7}")
    kept = True
    with tempfile.TemporaryDirectory() as folder:
        for kernel, repeat in KERNELS.items():
            theirs, ours, retired = compare(build(Path(folder), kernel, repeat))
            ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
            mips = retired / statistics.median(ours) / 1e6
            print(
                f"{kernel:10} {retired / 1e6:9.0f} {statistics.median(theirs):7.2f} "
                f"{statistics.median(ours):7.2f} {mips:6.0f} {ratio:6.2f}x"
            )
            kept = kept and (kernel != "integer" or ratio >= PROMISE)
    return 0 if kept else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--guest"]:
        run_guest(sys.argv[2])
    else:
        sys.exit(main())
