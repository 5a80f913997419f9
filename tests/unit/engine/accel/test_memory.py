"""Page tables, physical memory protection, misaligned accesses and changing code, by programs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vmlab.engine.accel.lockstep import Executor
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.exits import Reason
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.memory.ram import CODE, LOGGED, ROM

BASE = 0x8000_0000
ROOT = BASE + 0x10_0000
PAGE = 4096
BUDGET = 20_000
V, R, W, X, U, G, A, D = (1 << bit for bit in range(8))
SUPERVISOR, SUM, MXR, MPRV = 1, 1 << 18, 1 << 19, 1 << 17
SV39, SV48 = 8 << 60, 9 << 60
CAUSES = {"fetch": 12, "read": 13, "write": 15}
OPEN_PMP = (1 << 54) - 1


class Tables:
    """Page tables in RAM, built from their root down."""

    def __init__(self, hart: Hart, levels: int = 3) -> None:
        self.hart = hart
        self.levels = levels
        self._next = ROOT + PAGE

    @property
    def satp(self) -> int:
        return (SV39 if self.levels == 3 else SV48) | ROOT >> 12

    def map(self, virtual: int, physical: int, flags: int, level: int = 0) -> int:
        """Map a page; the physical address of its entry."""
        table = ROOT
        for step in range(self.levels - 1, level, -1):
            place = table + 8 * (virtual >> 12 + 9 * step & 511)
            entry = self.hart.ram.load64(place)
            if not entry & V:
                entry = self._next >> 12 << 10 | V
                self.hart.ram.write(place, entry.to_bytes(8, "little"))
                self._next += PAGE
            table = entry >> 10 << 12
        place = table + 8 * (virtual >> 12 + 9 * level & 511)
        self.hart.ram.write(place, (physical >> 12 << 10 | flags).to_bytes(8, "little"))
        return place


def supervisor(executor: Executor, tables: Tables, pc: int, code: bytes) -> Hart:
    """A hart about to run code in S mode, whose traps all go to a `wfi` of M mode."""
    hart = executor.hart
    hart.ram.write(BASE, code)
    hart.ram.write(BASE + 0x800, (0x10500073).to_bytes(4, "little"))
    hart[layout.MTVEC] = BASE + 0x800
    hart[layout.PMPADDR[0]] = OPEN_PMP
    hart[layout.PMPCFG0] = 0x1F
    hart[layout.PMP_OPEN] = 1
    hart[layout.SATP] = tables.satp
    hart[layout.PRIVILEGE] = SUPERVISOR
    hart.pc = pc
    return hart


PROGRAMS = {
    "read": "ld a1, (a0)\n ebreak",
    "write": "sd a1, (a0)\n ebreak",
    "fetch": "jr a0",
}
CODE_AT = 0x40_0000
DATA_AT = 0x80_3000
EBREAK = 3


@pytest.mark.parametrize("levels", [3, 4])
@pytest.mark.parametrize("access", ["read", "write", "fetch"])
@pytest.mark.parametrize(
    ("flags", "status", "allowed"),
    [
        (V | R | W | X, 0, "read write fetch"),
        (V | R, 0, "read"),
        (V | R | W, 0, "read write"),
        (V | X, 0, "fetch"),
        (V | X, MXR, "read fetch"),
        (V | R | W | X | U, 0, ""),
        (V | R | W | X | U, SUM, "read write"),
        (R | W | X, 0, ""),
        (V | W, 0, ""),
        (V | R | W | X | 1 << 61, 0, ""),
    ],
)
def test_permissions_of_a_page(executor, assemble, levels, access, flags, status, allowed) -> None:
    tables = Tables(executor.hart, levels)
    tables.map(CODE_AT, BASE, V | R | X)
    place = tables.map(DATA_AT, BASE + 0x2000, flags)
    executor.hart.ram.write(BASE + 0x2000, bytes.fromhex("73001000"))  # ebreak
    hart = supervisor(executor, tables, CODE_AT, assemble(PROGRAMS[access]))
    hart[layout.MSTATUS] = status
    hart.set_x(10, DATA_AT)
    assert executor.run(BUDGET).reason is Reason.WAIT
    entry = hart.ram.load64(place)
    if access in allowed.split():
        assert hart[layout.MCAUSE] == EBREAK
        assert entry & A
        assert bool(entry & D) == (access == "write")
    else:
        assert (hart[layout.MCAUSE], hart[layout.MTVAL]) == (CAUSES[access], DATA_AT)
        assert not entry & (A | D)


def test_user_mode_needs_user_pages(executor, assemble) -> None:
    tables = Tables(executor.hart)
    tables.map(CODE_AT, BASE, V | R | X | U)
    tables.map(DATA_AT, BASE + 0x2000, V | R | W)
    hart = supervisor(executor, tables, CODE_AT, assemble(PROGRAMS["read"]))
    hart[layout.PRIVILEGE] = 0
    hart.set_x(10, DATA_AT)
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert (hart[layout.MCAUSE], hart[layout.MTVAL]) == (13, DATA_AT)


@pytest.mark.parametrize(("level", "size"), [(1, 1 << 21), (2, 1 << 30)])
def test_large_pages_translate_and_must_be_aligned(executor, assemble, level, size) -> None:
    tables = Tables(executor.hart)
    tables.map(CODE_AT, BASE, V | R | X)
    virtual = 5 << 30
    tables.map(virtual, BASE, V | R, level)
    executor.hart.ram.write(BASE + 0x12_3458, (77).to_bytes(8, "little"))
    hart = supervisor(executor, tables, CODE_AT, assemble(PROGRAMS["read"]))
    hart.set_x(10, virtual + 0x12_3458)
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert (hart[layout.MCAUSE], hart.x(11)) == (EBREAK, 77)
    other = virtual + size
    tables.map(other, BASE + PAGE, V | R, level)
    hart[layout.PRIVILEGE] = SUPERVISOR
    hart.pc = CODE_AT
    hart.set_x(10, other)
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert (hart[layout.MCAUSE], hart[layout.MTVAL]) == (13, other)


def test_an_address_that_is_not_canonical_faults(executor, assemble) -> None:
    tables = Tables(executor.hart)
    tables.map(CODE_AT, BASE, V | R | X)
    hart = supervisor(executor, tables, CODE_AT, assemble(PROGRAMS["read"]))
    hart.set_x(10, 1 << 39 | DATA_AT)
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert (hart[layout.MCAUSE], hart[layout.MTVAL]) == (13, 1 << 39 | DATA_AT)


@pytest.mark.parametrize("fence", ["sfence.vma", "sfence.vma a0", "sfence.vma a0, a3"])
def test_a_fence_makes_a_changed_mapping_seen(executor, assemble, fence) -> None:
    tables = Tables(executor.hart)
    tables.map(CODE_AT, BASE, V | R | X)
    place = tables.map(DATA_AT, BASE + 0x2000, V | R | W)
    tables.map(DATA_AT + PAGE, place & -PAGE, V | R | W)
    for page, content in ((0x2000, 11), (0x3000, 22)):
        executor.hart.ram.write(BASE + page, content.to_bytes(8, "little"))
    code = assemble(f"ld a1, (a0)\n sd a2, (a4)\n {fence}\n ld a2, (a0)\n ebreak")
    hart = supervisor(executor, tables, CODE_AT, code)
    hart.set_x(10, DATA_AT)
    hart.set_x(12, (BASE + 0x3000) >> 12 << 10 | V | R | W)
    hart.set_x(14, DATA_AT + PAGE + (place & 0xFFF))
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert (hart[layout.MCAUSE], hart.x(11), hart.x(12)) == (EBREAK, 11, 22)


def test_one_code_page_runs_at_two_addresses(executor, assemble) -> None:
    tables = Tables(executor.hart)
    elsewhere = 0x7F_FFFF_F000 - (1 << 39) & (1 << 64) - 1
    for virtual in (CODE_AT, elsewhere):
        tables.map(virtual, BASE, V | R | X)
    code = assemble("auipc a1, 0\n bnez a2, 1f\n mv a3, a1\n li a2, 1\n jr a0\n 1: ebreak")
    hart = supervisor(executor, tables, CODE_AT, code)
    hart.set_x(10, elsewhere)
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert hart[layout.MCAUSE] == EBREAK
    assert (hart.x(13), hart.x(11)) == (CODE_AT, elsewhere)


@pytest.mark.parametrize("exchanged", [False, True])
def test_an_instruction_may_lie_across_pages_wherever_they_are(
    executor, assemble, exchanged
) -> None:
    tables = Tables(executor.hart)
    first, second = (BASE + 0x3000, BASE + 0x2000) if exchanged else (BASE + 0x2000, BASE + 0x3000)
    tables.map(CODE_AT, first, V | R | X)
    tables.map(CODE_AT + PAGE, second, V | R | X)
    # addi a0,a0,1 begins in a page's last halfword; then addi a0,a0,2 and ebreak.
    text = bytes.fromhex("13051500 13052500 73001000")
    hart = supervisor(executor, tables, CODE_AT + PAGE - 2, b"")
    hart.ram.write(first + PAGE - 2, text[:2])
    hart.ram.write(second, text[2:])
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert (hart[layout.MCAUSE], hart.x(10)) == (EBREAK, 3)
    # Without the second page, the fault is at its address and the pc is the instruction's.
    tables.map(CODE_AT + PAGE, second, 0)
    hart.executor = None
    hart[layout.PRIVILEGE] = SUPERVISOR
    hart.pc = CODE_AT + PAGE - 2
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert (hart[layout.MCAUSE], hart[layout.MTVAL]) == (12, CODE_AT + PAGE)
    assert hart[layout.MEPC] == CODE_AT + PAGE - 2


def test_misaligned_accesses_cross_pages(executor, assemble) -> None:
    tables = Tables(executor.hart)
    tables.map(CODE_AT, BASE, V | R | X)
    tables.map(DATA_AT, BASE + 0x3000, V | R | W)
    tables.map(DATA_AT + PAGE, BASE + 0x2000, V | R | W)
    hart = supervisor(executor, tables, CODE_AT, assemble("sd a1, -3(a0)\n ld a2, -3(a0)\n ebreak"))
    hart.set_x(10, DATA_AT + PAGE)
    hart.set_x(11, 0x1122_3344_5566_7788)
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert (hart[layout.MCAUSE], hart.x(12)) == (EBREAK, 0x1122_3344_5566_7788)
    assert hart.ram.read(BASE + 0x3FFD, 3) == bytes.fromhex("887766")
    assert hart.ram.read(BASE + 0x2000, 5) == bytes.fromhex("5544332211")


def test_a_misaligned_store_writes_nothing_where_its_second_half_faults(executor, assemble) -> None:
    tables = Tables(executor.hart)
    tables.map(CODE_AT, BASE, V | R | X)
    tables.map(DATA_AT, BASE + 0x3000, V | R | W)
    hart = supervisor(executor, tables, CODE_AT, assemble("sd a1, -3(a0)\n ebreak"))
    hart.set_x(10, DATA_AT + PAGE)
    hart.set_x(11, -1)
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert (hart[layout.MCAUSE], hart[layout.MTVAL]) == (15, DATA_AT + PAGE)
    assert hart.ram.read(BASE + 0x3FF8, 8) == bytes(8)


@pytest.mark.parametrize(
    ("configuration", "address", "outside"),
    [
        (0x18 | 0x7, BASE + 0x2000 >> 2 | 0x1FF, BASE + 0x3000),  # NAPOT, 4 KiB
        (0x10 | 0x7, BASE + 0x2000 >> 2, BASE + 0x2004),  # NA4
        (0x08 | 0x7, BASE + 0x2004 >> 2, BASE + 0x2008),  # TOR, from 0 on
    ],
)
def test_pmp_lets_s_mode_no_further(executor, assemble, configuration, address, outside) -> None:
    code = assemble(
        f"""
        li t0, {address}
        csrw pmpaddr1, t0
        li t0, {configuration << 8}
        csrw pmpcfg0, t0
        li t0, {BASE >> 2 | 0x1FF}
        csrw pmpaddr0, t0
        li t0, {configuration << 8 | 0x1F}
        csrw pmpcfg0, t0
        la t0, trap
        csrw mtvec, t0
        li t0, 1 << 11
        csrw mstatus, t0
        la t0, 1f
        csrw mepc, t0
        li a0, {BASE + 0x2000}
        li a1, {outside}
        mret
        1: lw a2, (a0)
        li a3, 1
        lw a2, (a1)
        .balign 4
        trap: wfi
        """
    )
    hart = executor.hart
    hart.ram.write(BASE, code)
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert hart.x(13) == 1
    assert (hart[layout.MCAUSE], hart[layout.MTVAL]) == (5, outside)


def test_a_locked_pmp_entry_binds_m_mode_and_stays(executor, assemble) -> None:
    code = assemble(
        f"""
        la t0, trap
        csrw mtvec, t0
        li t0, {BASE + 0x2000 >> 2 | 0x1FF}
        csrw pmpaddr0, t0
        li t0, 0x99
        csrw pmpcfg0, t0
        csrw pmpaddr0, zero
        csrw pmpcfg0, zero
        csrr a1, pmpaddr0
        csrr a2, pmpcfg0
        li a0, {BASE + 0x2000}
        lw a3, (a0)
        sw a3, (a0)
        .balign 4
        trap: wfi
        """
    )
    hart = executor.hart
    hart.ram.write(BASE, code)
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert (hart.x(11), hart.x(12)) == (BASE + 0x2000 >> 2 | 0x1FF, 0x99)
    assert (hart[layout.MCAUSE], hart[layout.MTVAL]) == (7, BASE + 0x2000)


def test_mprv_lends_m_mode_the_eyes_of_s_mode(executor, assemble) -> None:
    tables = Tables(executor.hart)
    tables.map(DATA_AT, BASE + 0x2000, V | R)
    executor.hart.ram.write(BASE + 0x2000, (55).to_bytes(8, "little"))
    hart = supervisor(executor, tables, BASE, assemble("ld a1, (a0)\n wfi"))
    hart[layout.PRIVILEGE] = 3
    hart[layout.MSTATUS] = MPRV | SUPERVISOR << 11
    hart.set_x(10, DATA_AT)
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert hart.x(11) == 55


# --------------------------------------------------------------------------- code that changes

Assemble = Callable[[str], bytes]


def test_code_that_writes_itself_runs_as_written(executor, assemble: Assemble) -> None:
    code = assemble(
        """
        .option norvc
        lw t1, patch
        la t0, 1f
        li a1, 3
        again: call 1f
        sw t1, (t0)
        fence.i
        addi a1, a1, -1
        bnez a1, again
        wfi
        .balign 4
        1: addi a0, a0, 1
        ret
        patch: addi a0, a0, 100
        """
    )
    executor.hart.ram.write(BASE, code)
    assert executor.run(BUDGET).reason is Reason.WAIT
    assert executor.hart.x(10) == 201


def test_a_device_that_writes_code_is_seen(executor, assemble) -> None:
    hart = executor.hart
    hart.ram.write(BASE, assemble("1: addi a0, a0, 1\n j 1b"))
    assert executor.run(100).reason is Reason.BUDGET
    hart.ram.write(BASE, assemble("li a0, 7\n wfi"))
    hart.pc = BASE
    assert executor.run(100).reason is Reason.WAIT
    assert hart.x(10) == 7


def test_rom_is_not_written_and_a_logged_page_is_noticed(executor, assemble) -> None:
    hart = executor.hart
    code = assemble(
        "ld a3, (a0)\n sd a2, (a0)\n ld a1, (a0)\n sd a2, (a4)\n amoadd.d a3, a2, (a5)\n wfi"
    )
    hart.ram.write(BASE, code)
    hart.ram.start_dirty_log()
    hart.ram.protect(2, 1, ROM)
    for register, page in ((10, 2), (14, 3), (15, 5)):
        hart.set_x(register, BASE + page * PAGE)
    hart.set_x(12, 9)
    assert executor.run(100).reason is Reason.WAIT
    executor.run(1)  # what native code did by itself is told at the next poll
    assert hart.x(11) == 0
    assert hart.ram.read(BASE + 2 * PAGE, 8) == bytes(8)
    dirty = hart.ram.collect_dirty()
    assert {3, 5} <= set(dirty)
    assert not {4, 6} & set(dirty)
    assert hart.ram.flags(3) & LOGGED
    assert CODE not in (hart.ram.flags(4), hart.ram.flags(6))
