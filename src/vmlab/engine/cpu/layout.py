"""The state block of a hart: where each register lies, for every executor alike.

The block is an array of 64-bit words. The integer registers are its first 32 words and the
floating-point registers 32 words from FLOATING on; the fields below follow. Writes to x0 go to the
word DISCARD, which nothing reads.

What other threads write lies in a second block, the shared words, because native code assumes that
nobody but itself changes the state block while it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

WORD = (1 << 64) - 1  # all bits of a register
DISCARD = 32
FLOATING = 64
_FIRST_FIELD = 96


@dataclass(frozen=True)
class Field:
    """A 64-bit word of the state block."""

    name: str
    index: int

    @property
    def offset(self) -> int:
        """Its distance from the block's start in bytes."""
        return self.index * 8


FIELDS: dict[str, Field] = {}
INTEGER = tuple(Field(f"x{number}", number) for number in range(32))


def _field(name: str) -> Field:
    FIELDS[name] = Field(name, _FIRST_FIELD + len(FIELDS))
    return FIELDS[name]


# What a guest can see. Privilege is 0 (U), 1 (S) or 3 (M).
PC = _field("pc")
PRIVILEGE = _field("privilege")
MSTATUS = _field("mstatus")
MEDELEG = _field("medeleg")
MIDELEG = _field("mideleg")
MIE = _field("mie")
MIP = _field("mip")  # the bits that software sets; lines and timers are added when it is read
MTVEC = _field("mtvec")
MSCRATCH = _field("mscratch")
MEPC = _field("mepc")
MCAUSE = _field("mcause")
MTVAL = _field("mtval")
MCOUNTEREN = _field("mcounteren")
MENVCFG = _field("menvcfg")
STVEC = _field("stvec")
SSCRATCH = _field("sscratch")
SEPC = _field("sepc")
SCAUSE = _field("scause")
STVAL = _field("stval")
SCOUNTEREN = _field("scounteren")
SENVCFG = _field("senvcfg")
SATP = _field("satp")
STIMECMP = _field("stimecmp")
FFLAGS = _field("fflags")
FRM = _field("frm")
PMPCFG0 = _field("pmpcfg0")
PMPCFG2 = _field("pmpcfg2")
PMPADDR = tuple(_field(f"pmpaddr{index}") for index in range(16))
HARTID = _field("mhartid")
RESERVATION_VALID = _field("reservation_valid")
RESERVATION_ADDRESS = _field("reservation_address")
RESERVATION_SIZE = _field("reservation_size")
RESERVATION_VALUE = _field("reservation_value")
# Added to the count of retired instructions to give the CSR.
MINSTRET_OFFSET = _field("minstret_offset")
MCYCLE_OFFSET = _field("mcycle_offset")
RETIRED = _field("retired")
ARCHITECTURAL = tuple(FIELDS.values())

# What is derived, and what the host sets.
PMP_OPEN = _field("pmp_open")  # see vmlab.engine.cpu.pmp
TRAP_CAUSE = _field("trap_cause")
TRAP_VALUE = _field("trap_value")
TRAP_RETIRED = _field("trap_retired")  # RETIRED at the last trap
TRAPS_IN_A_ROW = _field("traps_in_a_row")  # traps since an instruction retired
RAM_BASE = _field("ram_base")
RAM_SIZE = _field("ram_size")
RAM_HOST = _field("ram_host")  # the host's address of the first byte
FIRMWARE_CALLS = _field("firmware_calls")  # 1: a call from S mode leaves the machine (SBI)
TIME_DIVISOR = _field("time_divisor")  # instructions per tick of `time`; 0: the host's clock
# What is added: ticks to the host's clock, or instructions to RETIRED before they are divided.
TIME_OFFSET = _field("time_offset")
CLOCK = _field("clock")  # address of clock_gettime
SYSTEM_CALL = _field("system_call")  # address of syscall, for vmlab.engine.cpu.sleeping
SHARED = _field("shared")  # address of the shared words
INTERRUPTS = _field("interrupts")  # address of the interrupt controller's block, or 0

# How the last run ended.
REASON = _field("reason")
EXIT_ADDRESS = _field("exit_address")
EXIT_PC = _field("exit_pc")  # of the instruction that accessed a device
EXIT_SIZE = _field("exit_size")
EXIT_DATA = _field("exit_data")  # of CODE: 0 where protection differs within the page
EXIT_REGISTER = _field("exit_register")  # index of the word that a loaded datum goes to
EXIT_EXTENSION = _field("exit_extension")

# The interpreter's own.
SLICE_END = _field("slice_end")  # RETIRED when the budget of the present slice is 0
BUDGET_LEFT = _field("budget_left")  # instructions after the present slice
STEPPING = _field("stepping")  # bits of STEP_*, below
TLB = _field("tlb")  # address of the present set
TLB_SETS = _field("tlb_sets")  # address of the first set
TLB_NEXT = _field("tlb_next")  # the set to be replaced next
NOTES = _field("notes")  # address of one byte per page of RAM: written, to be told
NOTED = _field("noted")  # 1: there are notes
CODE_MAP = _field("code_map")  # address of one word per page of RAM: its decode records, or 0
PAGE_FLAGS = _field("page_flags")  # address of one byte per page of RAM
SCRATCH = _field("scratch")  # address of a decode record of one instruction
NEAR_SCRATCH = 256  # bytes from there to another one, which no poll point follows
HANDLERS = _field("handlers")  # address of the handlers' addresses
TLB_SET_COUNT = 8
# Per set: the address space (satp), and who accesses it how; the second is 0 for an unused set.
TLB_KEYS = tuple(_field(f"tlb_key{index}") for index in range(2 * TLB_SET_COUNT))
# Per set: first and last address of the large pages that it has pieces of.
TLB_LARGE = tuple(_field(f"tlb_large{index}") for index in range(2 * TLB_SET_COUNT))
# Per set: the bits of an address within the largest of those pages.
TLB_LARGE_SHIFT = tuple(_field(f"tlb_large_shift{index}") for index in range(TLB_SET_COUNT))
WALK_LEVEL = _field("walk_level")  # of the last translation's leaf; 0 where there was no walk
CLOCK_SECONDS = _field("clock_seconds")  # a struct timespec, the clock's answer
CLOCK_NANOSECONDS = _field("clock_nanoseconds")

# What a debugger wants to see. A bit for each sixty-fourth page: code there is the host's to offer.
BREAK_PAGES = _field("break_pages")
OFFERED_PAGE = _field("offered_page")  # address of the page of code that it offers
OFFERED_RECORDS = _field("offered_records")  # and of the records that are to be executed there
NO_OFFER = 1  # no page's address
WATCHING = _field("watching")  # 1: there are watchpoints
WATCHPOINTS = 8
# Per watchpoint: first address, bytes, and the kinds of access (below; 0 for none).
WATCHED = tuple(_field(f"watched{index}") for index in range(3 * WATCHPOINTS))
WATCH_READS, WATCH_WRITES = 1, 2

# Counters of the memory management unit.
WALKS = _field("walks")
FILLS = _field("fills")
FLUSHES = _field("flushes")
SET_FLUSHES = _field("set_flushes")
REGION_FLUSHES = _field("region_flushes")
CODE_FILLS = _field("code_fills")
SET_SWITCHES = _field("set_switches")
SET_MISSES = _field("set_misses")

# Of STEPPING: decode an instruction from memory and leave after it; take no interrupt; ignore
# watchpoints.
STEP, STEP_MASKED, STEP_UNWATCHED = 1, 2, 4

STATE_SIZE = (_FIRST_FIELD + len(FIELDS)) * 8

# Shared words.
SHARED_REQUESTS = 0  # return from native code, for one of the reasons below
SHARED_LINES = 1  # interrupt lines, as bits of mip
SHARED_MTIMECMP = 2
SHARED_SOFTWARE = 3  # 1: SSIP is to be set, as another hart has asked
SHARED_ASLEEP = 4  # the hart waits for an interrupt, in one of the ways below; 0: it does not
# Fences that other harts have asked this one for, counted; those that it has made; and whether it
# is where accesses go by translations that it remembers (vmlab.engine.cpu.fences).
SHARED_FENCES, SHARED_FENCED, SHARED_INSIDE = 5, 6, 7
# Its host wants to be told of one; or its thread waits on this word (vmlab.engine.cpu.sleeping).
ASLEEP_TOLD, ASLEEP_WAITS = 1, 2
REQUEST_EXIT, REQUEST_SERVICE = 1, 2  # from whoever runs the hart; from within its executor

# The interpreter's tables (vmlab.engine.compile.native says what is in them). Sizes in bytes.
TLB_ENTRY_SIZE = 16
TLB_DATA_ENTRIES, TLB_CODE_ENTRIES = 512, 256
TLB_READ = 0
TLB_WRITE = TLB_READ + TLB_DATA_ENTRIES * TLB_ENTRY_SIZE
TLB_CODE = TLB_WRITE + TLB_DATA_ENTRIES * TLB_ENTRY_SIZE
TLB_COUNTERS = TLB_CODE + TLB_CODE_ENTRIES * TLB_ENTRY_SIZE
# Counters of a set, by number; those of hits count only in code that was decoded to count them.
(
    READ_HITS,
    WRITE_HITS,
    CODE_HITS,
    READ_MISSES,
    WRITE_MISSES,
    CODE_MISSES,
    SET_FILLS,
    WHOLE_FLUSHES,
    PART_FLUSHES,
    SET_TAKEN,
) = range(10)
TLB_COUNTER_COUNT = 10
TLB_SET_SIZE = TLB_COUNTERS + 8 * TLB_COUNTER_COUNT
RECORD_SIZE = 16
