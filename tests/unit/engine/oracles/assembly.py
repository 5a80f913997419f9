"""The programs of tests/assembly, and where QEMU 7.2 and the specification part.

A program's output is text, line by line the same on the engine and on QEMU, but for what is listed
here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from vmlab.engine.isa.riscv64 import RISCV64

SOURCES = Path(__file__).parents[3] / "assembly"
PREFIX = "riscv64-linux-gnu-"
MARCH = "rv64gc_zicsr_zifencei_svinval"
BASE = 0x8000_0000
PROGRAMS = ("translation", "traps", "interrupts", "pmp")
QEMU = shutil.which("qemu-system-riscv64")
_PROCESSOR = "rv64,h=false,svinval=true,sstc=true"


@dataclass(frozen=True)
class Difference:
    """Lines that differ, and why ours is right.

    Attributes:
        program: whose output.
        theirs: a pattern for QEMU's line.
        ours: a pattern for the engine's.
        lines: how many there are.
        reason: what the specification says (RISC-V privileged 1.12, if nothing else is named).
    """

    program: str
    theirs: str
    ours: str
    lines: int
    reason: str


DIFFERENCES = (
    Difference(
        "translation",
        r"pointer to nowhere.* cause 0+[cdf]",
        r"pointer to nowhere.* cause 0+[157]",
        6,
        "4.3.2, step 2: an entry that is no memory is an access fault, not a page fault",
    ),
    Difference(
        "traps",
        r"(short_)?breakpoint.* s?tval 0+",
        r"(short_)?breakpoint.* s?tval 00000000800.*",
        10,
        "3.1.16: the address of the instruction; 0 is allowed as well",
    ),
    Difference(
        "traps",
        r".*invalidate_supervisor.* s?tval 0+",
        r".*invalidate_supervisor.* s?tval 0*16000073",
        3,
        "3.1.16: the instruction, as for all other illegal ones; 0 is allowed as well",
    ),
    Difference(
        "traps",
        r"(atomic|conditional)_misaligned.* s?cause 0+4",
        r"(atomic|conditional)_misaligned.* s?cause 0+6",
        10,
        "table 3.6: an AMO's exceptions are those of stores",
    ),
    Difference(
        "traps",
        r"conditional_misaligned.* (s?tval|s?epc) .*",
        r"conditional_misaligned.* (s?tval|s?epc) .*",
        10,
        "unprivileged 8.2: a misaligned sc is an exception, also without a reservation",
    ),
    Difference(
        "traps",
        r"atomic_nowhere.* s?cause 0+5",
        r"atomic_nowhere.* s?cause 0+7",
        5,
        "table 3.6: an AMO's exceptions are those of stores",
    ),
    Difference(
        "traps",
        r"(mret from|MPP of 2|mstatus|MPP of 2 after 3) 0+a00001[0-9a-f]*",
        r"(mret from|MPP of 2|mstatus|MPP of 2 after 3) 0+a0000[01][0-9a-f]*",
        7,
        "3.1.6.1: MPP holds only privileges that there are",
    ),
    Difference(
        "traps",
        r"sret leaves 0+a00020.*",
        r"sret leaves 0+a00000.*",
        8,
        "3.1.6.3: sret to less than M mode clears MPRV",
    ),
    Difference(
        "traps",
        r"[ms]epc after .*[5f]",
        r"[ms]epc after .*[4e]",
        4,
        "3.1.14: the lowest bit is always 0",
    ),
    Difference(
        "traps",
        r"registers (0+7|0+3e0000)",
        r"registers 0+",
        4,
        "unprivileged 9.1: csrrs with a register that holds 0 is a write, illegal if read-only",
    ),
    Difference(
        "interrupts",
        r"stimecmp past, not lent: [ms]ip 0+20",
        r"stimecmp past, not lent: [ms]ip 0+",
        2,
        "Sstc 1.0, 2: where STCE is 0 there is no stimecmp",
    ),
    Difference(
        "interrupts",
        r"(one completed|higher priority|priority 0): .*",
        r"(one completed|higher priority|priority 0): .*",
        5,
        "PLIC 1.0.0, 4: what is still high at its completion is pending again",
    ),
    Difference(
        "pmp",
        r"walk through 1 (cause 0+9|tval 0+|epc 0+2)",
        r"walk through 1 (cause 0+1|tval 0+8.*|epc 0+)",
        3,
        "4.3.2, step 7: setting A is a store, which PMP must allow",
    ),
    Difference("pmp", r"entry .*4f", r"entry .*0f", 1, "4.3.2, step 7: setting A is a store"),
    Difference(
        "pmp",
        r"configuration 0+[01][26ae]00",
        r"configuration 0+",
        8,
        "3.7.1: W without R is reserved, and the field WARL",
    ),
    Difference(
        "pmp",
        r"address after .*",
        r"address after .* 00.*",
        3,
        "3.7.1, figure 3.31: the ten highest bits are 0",
    ),
    Difference(
        "pmp", r"reserved bits 0+6060", r"reserved bits 0+", 1, "3.7.1, figure 3.33: they are 0"
    ),
    Difference(
        "pmp",
        r"the others can be written f{8}8df{4}99",
        r"the others can be written (9f){4}8d9f9f99",
        1,
        "3.7.1, figure 3.33: bits 5 and 6 are 0",
    ),
)


def build(program: str, folder: Path, *, quick: bool = False) -> Path:
    """Assemble a program; `quick` with fewer cases, for an executor that is slow."""
    made = folder / f"{program}.elf"
    command = [PREFIX + "gcc", "-march=rv64gc", f"-Wa,-march={MARCH}", "-mabi=lp64d", "-nostdlib"]
    command += ["-static", "-Wl,--build-id=none", f"-Wl,-Ttext={BASE:#x}", "-Wl,-N"]
    command += ["-Wl,--no-warn-rwx-segments", *(["-DQUICK"] if quick else [])]
    subprocess.run([*command, "-o", made, SOURCES / f"{program}.S"], check=True)
    return made


def used(program: str, folder: Path) -> Counter[str]:
    """How often each instruction stands in a program's code."""
    image = folder / f"{program}.bin"
    source = build(program, folder)
    subprocess.run([PREFIX + "objcopy", "-O", "binary", "-j", ".text", source, image], check=True)
    code = image.read_bytes()
    count: Counter[str] = Counter()
    at = 0
    while at < len(code):
        word = int.from_bytes(code[at : at + 4].ljust(4, b"\0"), "little")
        found = RISCV64.find(word)
        at += found.pattern.length if found is not None else 2
        count.update([found.name] if found is not None else [])
    return count


def in_qemu(program: str, made: Path) -> list[str]:
    """What a program tells on QEMU."""
    assert QEMU is not None
    # Without its interrupt architecture QEMU takes the interrupt of the lowest number first,
    # where the specification (3.1.9) has an order of its own.
    processor = _PROCESSOR + (",x-smaia=true,x-ssaia=true" if program == "interrupts" else "")
    command = [QEMU, "-M", "virt", "-m", "64M", "-cpu", processor, "-nographic", "-nodefaults"]
    command += ["-monitor", "none", "-serial", "stdio", "-bios", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def unexplained(program: str, ours: list[str], theirs: list[str]) -> tuple[list[str], Counter[int]]:
    """Lines that differ for no known reason, and how many for each of the known ones."""
    found, seen = [], Counter[int]()
    if len(ours) != len(theirs):
        found.append(f"{len(ours)} lines, there {len(theirs)}")
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one == other:
            continue
        for index, known in enumerate(DIFFERENCES):
            if (
                known.program == program
                and re.fullmatch(known.theirs, other)
                and re.fullmatch(known.ours, one)
            ):
                seen[index] += 1
                break
        else:
            found.append(f"line {number}: {one!r}, there {other!r}")
    return found, seen
