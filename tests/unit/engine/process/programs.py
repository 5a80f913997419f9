"""Guests of a few instructions, put together word by word. They begin in S mode, two MiB in."""

from __future__ import annotations

from vmlab.engine.isa.riscv64 import RISCV64
from vmlab.engine.memory.ram import RAM_BASE

START = RAM_BASE + 0x20_0000
T0, T1, T2, A0, A1, A2, A6, A7 = 5, 6, 7, 10, 11, 12, 16, 17
POWEROFF, REBOOT, FAIL = 0x5555, 0x7777, 0x3333
SSTATUS, SIE, STVEC, SCAUSE, SIP, STIMECMP, TIME = 0x100, 0x104, 0x105, 0x142, 0x144, 0x14D, 0xC01


def word(name: str, **operands: int) -> bytes:
    return RISCV64[name].encode(**operands).to_bytes(4, "little")


def number(register: int, value: int) -> bytes:
    """Put a number of 32 bits, zero-extended, into a register."""
    low = (value & 0xFFF) - ((value & 0x800) << 1)
    high = (value - low) & 0xFFFF_FFFF
    code = word("lui", rd=register, imm=high - ((high & 1 << 31) << 1))
    code += word("addi", rd=register, rs1=register, imm=low)
    if value >> 31:
        code += word("slli", rd=register, rs1=register, imm=32)
        code += word("srli", rd=register, rs1=register, imm=32)
    return code


def jump(offset: int) -> bytes:
    return word("jal", rd=0, imm=offset)


def csr(name: str, number_: int, register: int, rd: int = 0) -> bytes:
    return word(name, rd=rd, rs1=register, imm=number_)


def end(command: int) -> bytes:
    """Tell the system controller, and wait for what comes of it."""
    return number(T0, 0x10_0000) + number(T1, command) + word("sw", rs1=T0, rs2=T1) + jump(0)


def say(text: bytes) -> bytes:
    """Print by the UART."""
    code = number(T0, 0x1000_0000)
    for character in text:
        code += number(T1, character) + word("sb", rs1=T0, rs2=T1)
    return code


def call(extension: int, function: int, *arguments: int) -> bytes:
    """Ask firmware; the arguments that are not given stay as they are."""
    code = number(A7, extension) + number(A6, function)
    for register, argument in enumerate(arguments, A0):
        code += number(register, argument)
    return code + word("ecall")


def say_by_firmware(text: bytes) -> bytes:
    """Print by the debug console of SBI, a byte at a time."""
    return b"".join(call(0x4442_434E, 2, character) for character in text)


def say_in_an_emergency(text: bytes) -> bytes:
    """Print by the virtio console in the first slot, whose driver has not come up."""
    code = number(T0, 0x1000_1100)
    for character in text:
        code += number(T1, character) + word("sw", rs1=T0, rs2=T1, imm=8)
    return code


SPIN = word("addi", rd=T0, rs1=T0, imm=1) + jump(-4)
IDLE = word("wfi") + jump(-4)
ECHO = (
    number(T0, 0x1000_0000)
    + word("lbu", rd=T1, rs1=T0, imm=5)
    + word("andi", rd=T1, rs1=T1, imm=1)
    + word("beq", rs1=T1, rs2=0, imm=-8)
    + word("lbu", rd=T2, rs1=T0, imm=0)
    + word("sb", rs2=T2, rs1=T0, imm=0)
    + jump(-20)
)
TRAPS = bytes(4)
"""No instruction, and no handler either."""


def handled(code: bytes, handler: bytes) -> bytes:
    """A guest whose traps go to `handler`, which lies in front of it."""
    skip = jump(4 + len(handler))
    address = word("auipc", rd=T2, imm=0) + word("addi", rd=T2, rs1=T2, imm=-len(handler))
    return skip + handler + address + csr("csrrw", STVEC, T2) + code


REPORT_CAUSE = (
    csr("csrrs", SCAUSE, 0, rd=T1)
    + word("slli", rd=T1, rs1=T1, imm=16)
    + number(T2, FAIL)
    + word("or", rd=T1, rs1=T1, rs2=T2)
    + number(T0, 0x10_0000)
    + word("sw", rs1=T0, rs2=T1)
    + jump(0)
)
LOADS_FROM_NOWHERE = handled(
    number(T0, 0x4000_0000) + word("ld", rd=T1, rs1=T0) + end(POWEROFF), REPORT_CAUSE
)
STORES_NOWHERE = handled(
    number(T0, 0x4000_0000) + word("sd", rs2=T1, rs1=T0) + end(POWEROFF), REPORT_CAUSE
)
WAKES_BY_TIMER = handled(
    csr("csrrs", TIME, 0, rd=T0)
    + number(T1, 50_000)
    + word("add", rd=T0, rs1=T0, rs2=T1)
    + csr("csrrw", STIMECMP, T0)
    + number(T1, 1 << 5)
    + csr("csrrs", SIE, T1)
    + word("addi", rd=T1, rs1=0, imm=2)
    + csr("csrrs", SSTATUS, T1)
    + IDLE,
    end(POWEROFF),
)
_SECOND = number(T0, START + 0x1000) + word("sw", rs1=T0, rs2=A1) + IDLE
STARTS_ANOTHER = (
    jump(4 + len(_SECOND))
    + _SECOND
    + call(0x48_534D, 0, 1, START + 4, 77)
    + number(T0, START + 0x1000)
    + number(T1, 77)
    + word("lw", rd=T2, rs1=T0)
    + word("bne", rs1=T2, rs2=T1, imm=-4)
    + end(POWEROFF)
)
"""The second hart writes what it was given, and the first one waits for that."""

_COUNT, _READY = START + 0x1000, START + 0x1008
_INTERRUPTED = handled(
    number(T1, 2)
    + csr("csrrs", SIE, T1)
    + csr("csrrs", SSTATUS, T1)
    + number(T0, _READY)
    + word("sw", rs1=T0, rs2=T1)
    + IDLE,
    number(T1, 2)
    + csr("csrrc", SIP, T1)
    + number(T0, _COUNT)
    + word("lw", rd=T1, rs1=T0)
    + word("addi", rd=T1, rs1=T1, imm=1)
    + word("sw", rs1=T0, rs2=T1)
    + word("sret"),
)


def _until_not_zero(address: int) -> bytes:
    return number(T0, address) + word("lw", rd=T2, rs1=T0) + word("beq", rs1=T2, rs2=0, imm=-4)


_STARTS_ANOTHER = jump(4 + len(_INTERRUPTED)) + _INTERRUPTED + call(0x48_534D, 0, 1, START + 4, 0)
INTERRUPTS_ANOTHER = (
    _STARTS_ANOTHER
    + _until_not_zero(_READY)
    + call(0x73_5049, 0, 2, 0)
    + _until_not_zero(_COUNT)
    + number(T1, 20_000)
    + word("addi", rd=T1, rs1=T1, imm=-1)
    + word("bne", rs1=T1, rs2=0, imm=-4)
    + word("lw", rd=T2, rs1=T0)
    + number(T1, 1)
    + word("bne", rs1=T2, rs2=T1, imm=4 + len(end(POWEROFF)))
    + end(POWEROFF)
    + end(FAIL | 1 << 16)
)
"""The first hart interrupts the second one, which counts how often that is seen."""

WAKE = START + 0x1010
WAKES_ANOTHER = (
    _STARTS_ANOTHER
    + _until_not_zero(WAKE)
    + call(0x73_5049, 0, 2, 0)
    + _until_not_zero(_COUNT)
    + end(POWEROFF)
)
"""The same, when somebody else has written to WAKE."""

_DEADLINE = START + 0x1000
_RESUMED = (
    number(T2, _DEADLINE)
    + word("ld", rd=T1, rs1=T2)
    + csr("csrrs", TIME, 0, rd=T0)
    + word("bltu", rs1=T0, rs2=T1, imm=len(number(T2, 99)) + 8 + len(end(POWEROFF)))
    + number(T2, 99)
    + word("bne", rs1=A1, rs2=T2, imm=4 + len(end(POWEROFF)))
    + end(POWEROFF)
    + end(FAIL | 1 << 16)
)
SUSPENDS = (
    jump(4 + len(_RESUMED))
    + _RESUMED
    + csr("csrrs", TIME, 0, rd=T0)
    + number(T1, 50_000)
    + word("add", rd=T0, rs1=T0, rs2=T1)
    + number(T2, _DEADLINE)
    + word("sd", rs1=T2, rs2=T0)
    + csr("csrrw", STIMECMP, T0)
    + number(T1, 1 << 5)
    + csr("csrrs", SIE, T1)
    + call(0x48_534D, 3, 0x8000_0000, START + 4, 99)
    + end(FAIL | 2 << 16)
)
"""The hart loses its state until a timer's interrupt, and begins anew (SBI 2.0, 9.4)."""

_SLEEPER = (
    number(T1, 2)
    + csr("csrrs", SIE, T1)
    + call(0x48_534D, 3, 0)
    + number(T1, 2)
    + csr("csrrc", SIP, T1)
    + number(T0, _READY)
    + word("sw", rs1=T0, rs2=T1)
    + IDLE
)
_STATUS = call(0x48_534D, 2, 1)
IS_SUSPENDED = (
    jump(4 + len(_SLEEPER))
    + _SLEEPER
    + call(0x48_534D, 0, 1, START + 4, 0)
    + number(T1, 4)
    + _STATUS
    + word("bne", rs1=A1, rs2=T1, imm=-len(_STATUS))
    + call(0x73_5049, 0, 2, 0)
    + _until_not_zero(_READY)
    + number(T2, 500)
    + _STATUS
    + word("bne", rs1=A1, rs2=0, imm=12 + len(end(POWEROFF)))
    + word("addi", rd=T2, rs1=T2, imm=-1)
    + word("bne", rs1=T2, rs2=0, imm=-8 - len(_STATUS))
    + end(POWEROFF)
    + end(FAIL | 1 << 16)
)
"""The first hart sees the second one suspended, wakes it, and sees it started, also in a WFI."""


# ------------------------------------------------------------------------ for deterministic time

_RACE_NEXT = START + 0x1000
RACE_LOG, RACE_ENTRIES = START + 0x2000, 2000
_RACE_PUT = number(A2, RACE_LOG) + word("add", rd=A2, rs1=A2, rs2=T1) + word("sb", rs1=A2, rs2=A0)
_RACE = (
    number(T2, RACE_ENTRIES)
    + number(T0, _RACE_NEXT)
    + word("addi", rd=A1, rs1=0, imm=1)
    + word("amoadd.w", rd=T1, rs1=T0, rs2=A1)
    + word("bgeu", rs1=T1, rs2=T2, imm=len(_RACE_PUT) + 8)
    + _RACE_PUT
    + jump(-len(_RACE_PUT) - 8)
)
RACE = (
    jump(4 + len(_RACE) + len(word("addi", rd=A0, rs1=A0, imm=1)) + len(IDLE))
    + word("addi", rd=A0, rs1=A0, imm=1)
    + _RACE
    + IDLE
    + call(0x48_534D, 0, 1, START + 4, 0)
    + word("addi", rd=A0, rs1=0, imm=1)
    + _RACE
    + end(POWEROFF)
)
"""Two harts put their numbers, from 1 on, into a log, each as often as it comes to it."""

_LOOPS = 500
INSTRUCTIONS_BETWEEN_LOOKS = 3 + 2 * _LOOPS
LOOKS_AT_CLOCKS = (
    csr("csrrs", TIME, 0, rd=A0)
    + number(T1, _LOOPS)
    + word("addi", rd=T1, rs1=T1, imm=-1)
    + word("bne", rs1=T1, rs2=0, imm=-4)
    + csr("csrrs", TIME, 0, rd=A1)
    + number(T0, 0x200_BFF8)
    + word("ld", rd=A2, rs1=T0)
    + end(POWEROFF)
)
"""`time` before and after some instructions, and `mtime`: in a0 to a2."""

LOOKS_AT_THE_DATE = number(T0, 0x10_1000) + word("lw", rd=T1, rs1=T0) + jump(0)


def sleeps(ticks: int, *, or_device: bool = False) -> bytes:
    """Power off after a power of two of ticks; or at an external interrupt, if that may be."""
    return handled(
        csr("csrrs", TIME, 0, rd=T0)
        + word("addi", rd=T1, rs1=0, imm=1)
        + word("slli", rd=T1, rs1=T1, imm=ticks.bit_length() - 1)
        + word("add", rd=T0, rs1=T0, rs2=T1)
        + csr("csrrw", STIMECMP, T0)
        + number(T1, 1 << 5 | or_device << 9)
        + csr("csrrs", SIE, T1)
        + word("addi", rd=T1, rs1=0, imm=2)
        + csr("csrrs", SSTATUS, T1)
        + IDLE,
        end(POWEROFF),
    )


WAITS_FOR_A_DEVICE = handled(
    number(T1, 1 << 9)
    + csr("csrrs", SIE, T1)
    + word("addi", rd=T1, rs1=0, imm=2)
    + csr("csrrs", SSTATUS, T1)
    + IDLE,
    end(POWEROFF),
)
SEPC = 0x141
LOADS_AND_GOES_ON = handled(
    number(T0, 0x4000_0000)
    + word("ld", rd=T1, rs1=T0) * 3
    + csr("csrrs", TIME, 0, rd=A1)
    + end(POWEROFF),
    csr("csrrs", SEPC, 0, rd=T1)
    + word("addi", rd=T1, rs1=T1, imm=4)
    + csr("csrrw", SEPC, T1)
    + word("addi", rd=A0, rs1=A0, imm=1)
    + word("sret"),
)
"""Three loads that nothing answers."""


# ----------------------------------------------------------- code that one hart writes for another

_FUNCTION, _RESULT = START + 0x1000, START + 0x2000
RA = 1


def _until(address: int, value: int) -> bytes:
    return (
        number(T0, address)
        + number(T1, value)
        + word("lw", rd=T2, rs1=T0)
        + word("bne", rs1=T2, rs2=T1, imm=-4)
    )


def _answers(value: int) -> bytes:
    return word("addi", rd=A0, rs1=0, imm=value)


_CALLER = (
    number(T0, _FUNCTION) + word("jalr", rd=RA, rs1=T0) + number(T0, _RESULT)
    + word("sw", rs1=T0, rs2=A0)
)  # fmt: skip
_CALLER += jump(-len(_CALLER))
CHANGES_ANOTHER = (
    (
        jump(4 + len(_CALLER))
        + _CALLER
        + call(0x48_534D, 0, 1, START + 4, 0)
        + _until(_RESULT, 1)
        + number(T0, _FUNCTION)
        + number(T1, int.from_bytes(_answers(2), "little"))
        + word("sw", rs1=T0, rs2=T1)
        + word("fence.i")
        + call(0x5246_4E43, 0, 1 << 1, 0)
        + _until(_RESULT, 2)
        + end(POWEROFF)
    ).ljust(0x1000, b"\0")
    + _answers(1)
    + word("jalr", rs1=RA)
)
"""The first hart writes a function anew that the second one calls again and again."""
