"""A hart's state and memory as operands of native code.

The counterpart of the reference executor's core: what the routines of vmlab.engine.cpu do becomes
LLVM functions here. The sets of the TLB are native code's own affair and are here too.

A set holds entries of 16 bytes in three tables: reads, writes, and code. A data entry is {tag,
addend}: the tag is compared with the address whose bits 3 to 11 are masked out, so that only an
aligned access to the right page matches, and the addend makes the host's address of the guest's. A
code entry is {page, decode records}. An unused entry's tag is all ones, which matches nothing. What
happens to a set is counted behind its tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from vmlab.engine.compile.emitter import METADATA, FunctionEmitter
from vmlab.engine.cpu import layout, sleeping
from vmlab.engine.cpu.core import Core, Routine
from vmlab.engine.cpu.interrupts import LOCK, shared_place
from vmlab.engine.cpu.layout import Field
from vmlab.engine.cpu.mmu import MPP_SHIFT, MPRV, MXR, SUM, WRITE
from vmlab.engine.cpu.watching import is_page_watched
from vmlab.engine.isa.cpu import AtomicOperation, Trap
from vmlab.engine.isa.values import Value
from vmlab.engine.memory.ram import ROM

UNUSED = -1

PAGE_MASK = -4096
# Loops stay loops: a call of memset would be a symbol that the engine does not have.
ATTRIBUTES = 'nounwind "no-builtins"'


class ModuleEmitter:
    """Collects the functions of a module, routines as they are called.

    Args:
        host_fuses: the host that it is for has a fused multiply-add.
    """

    def __init__(self, *, host_fuses: bool) -> None:
        self.host_fuses = host_fuses
        self._functions: dict[str, str] = {}
        self._wanted: list[Routine] = []

    def add(self, name: str, text: str) -> None:
        """Add a function's text."""
        assert name not in self._functions, name
        self._functions[name] = text

    def need(self, routine: Routine) -> None:
        """Make sure that a routine is there."""
        if routine.name not in self._functions:
            self._functions[routine.name] = ""
            self._wanted.append(routine)

    def text(self) -> str:
        """The module, complete with the routines that are needed."""
        while self._wanted:
            routine = self._wanted.pop()
            self._functions[routine.name] = _routine_text(self, routine)
        return "".join(self._functions.values()) + METADATA


def _routine_text(module: ModuleEmitter, routine: Routine) -> str:
    function = FunctionEmitter()
    core = NativeCore(module, function)
    arguments = [Value(f"%a{index}", 64, function) for index in range(routine.arguments)]

    def body() -> None:
        try:
            result = routine.body(core, *arguments)
        except Trap as trap:
            if not routine.traps:
                raise
            core[layout.TRAP_CAUSE] = trap.cause
            core[layout.TRAP_VALUE] = trap.value
            function.effect("ret {i64, i64} {i64 0, i64 1}")
            return
        if routine.traps:
            pair = function.operation(
                f"insertvalue {{i64, i64}} zeroinitializer, {result.typed}, 0"
            )
            function.effect(f"ret {{i64, i64}} {pair}")
        else:
            function.effect(f"ret {result.typed}")

    function.explore(body)
    kind = "{i64, i64}" if routine.traps else "i64"
    parameters = "".join(f", i64 %a{index}" for index in range(routine.arguments))
    header = f"define internal fastcc {kind} @{routine.name}(ptr noalias %s{parameters})"
    return function.text(f"{header} {ATTRIBUTES} noinline")


class NativeCore(Core):
    """A hart's state and memory in a function being generated, whose state pointer is `%s`.

    Args:
        module: where routines go.
        function: where code goes.
        hurried: as the base says.
    """

    def __init__(
        self, module: ModuleEmitter, function: FunctionEmitter, *, hurried: bool = False
    ) -> None:
        self.module = module
        self.function = function
        self.hurried = hurried
        self.host_fuses = module.host_fuses

    def likely(self, condition: Value) -> bool:
        return self.function.likely(condition)

    # ------------------------------------------------------------------------------------- state

    def element(self, pointer: str, offset: Value | int) -> str:
        """The address `offset` bytes after a pointer."""
        text = offset.text if isinstance(offset, Value) else offset
        return self.function.operation(f"getelementptr i8, ptr {pointer}, i64 {text}")

    def pointer(self, address: Value) -> str:
        """A number as a pointer."""
        return self.function.operation(f"inttoptr {address.typed} to ptr")

    def __getitem__(self, field: Field) -> Value:
        return self.function.value(f"load i64, ptr {self.element('%s', field.offset)}")

    def __setitem__(self, field: Field, value: Value | int) -> None:
        word = value if isinstance(value, Value) else Value(value, 64)
        assert word.width == 64, field
        self.function.effect(f"store {word.typed}, ptr {self.element('%s', field.offset)}")

    def _shared(self, words: Value, index: int) -> str:
        return self.element(self.pointer(words), 8 * index)

    def shared(self, index: int) -> Value:
        address = self._shared(self[layout.SHARED], index)
        return self.function.value(f"load atomic i64, ptr {address} acquire, align 8")

    def take_shared(self, index: int) -> Value:
        address = self._shared(self[layout.SHARED], index)
        return self.function.value(f"atomicrmw xchg ptr {address}, i64 0 seq_cst")

    def shared_of(self, hart: Value, index: int) -> Value:
        address = self._shared(self.device_word(shared_place(hart)), index)
        return self.function.value(f"load atomic i64, ptr {address} seq_cst, align 8")

    def post(self, hart: Value, index: int) -> None:
        address = self._shared(self.device_word(shared_place(hart)), index)
        self.function.operation(f"atomicrmw xchg ptr {address}, i64 1 seq_cst")

    def count_up(self, hart: Value, index: int) -> None:
        address = self._shared(self.device_word(shared_place(hart)), index)
        self.function.operation(f"atomicrmw add ptr {address}, i64 1 seq_cst")

    def set_shared(self, index: int, value: Value) -> None:
        address = self._shared(self[layout.SHARED], index)
        self.function.effect(f"store atomic {value.typed}, ptr {address} release, align 8")

    def rouse(self, hart: Value) -> None:
        address = self._shared(self.device_word(shared_place(hart)), layout.SHARED_ASLEEP)
        waits = self.function.value(f"atomicrmw xchg ptr {address}, i64 0 seq_cst")
        if waits.ne(0):  # nobody else was quicker
            call = self.pointer(self[layout.SYSTEM_CALL])
            self.function.operation(
                f"call i64 (i64, ...) {call}(i64 {sleeping.NUMBER}, ptr {address}, "
                f"i64 {sleeping.WAKE}, i64 1, i64 0, i64 0, i64 0)"
            )

    def host_time(self) -> Value:
        clock = self.pointer(self[layout.CLOCK])
        buffer = self.element("%s", layout.CLOCK_SECONDS.offset)
        self.function.operation(f"call i32 {clock}(i32 {time.CLOCK_MONOTONIC}, ptr {buffer})")
        nanoseconds = self[layout.CLOCK_NANOSECONDS]
        return self[layout.CLOCK_SECONDS] * 10_000_000 + nanoseconds.divide_unsigned(100)

    # ------------------------------------------------------------------------------------ memory

    def ram_pointer(self, address: Value) -> str:
        """The host's address of a physical one."""
        return self.pointer(address - self[layout.RAM_BASE] + self[layout.RAM_HOST])

    def _page_byte(self, table: Field, address: Value) -> str:
        page = (address - self[layout.RAM_BASE]) >> 12
        return self.element(self.pointer(self[table]), page)

    def flags(self, address: Value) -> Value:
        """The flag byte of a page of RAM."""
        pointer = self._page_byte(layout.PAGE_FLAGS, address)
        return self.function.value(f"load i8, ptr {pointer}", 8)

    def is_observed(self, address: Value) -> Value:
        return self.flags(address).ne(0)

    def physical_read(self, address: Value, size: int) -> Value:
        pointer = self.ram_pointer(address)
        datum = self.function.value(f"load i{8 * size}, ptr {pointer}, align 1", 8 * size)
        return datum.zero_extend(64)

    def physical_write(self, address: Value, size: int, value: Value) -> None:
        self.call(_WRITES[size], address, value)

    def write_quietly(self, address: Value, size: int, value: Value) -> None:
        """Write without looking at the page's flags."""
        datum = value.low(8 * size)
        self.function.effect(f"store {datum.typed}, ptr {self.ram_pointer(address)}, align 1")

    def note(self, address: Value) -> None:
        """Let the host know at the next poll that this page was written."""
        pointer = self._page_byte(layout.NOTES, address)
        self.function.effect(f"store i8 1, ptr {pointer}")
        self[layout.NOTED] = 1

    def physical_compare_exchange(self, address: Value, expected: Value, new: Value) -> Value:
        done = self.compare_exchange_at(self.ram_pointer(address), expected, new)
        self.call(_NOTE_IF_OBSERVED, address)
        return done

    def physical_atomic(self, operation: AtomicOperation, address: Value, operand: Value) -> Value:
        old = self.atomic_at(self.ram_pointer(address), operation, operand)
        self.call(_NOTE_IF_OBSERVED, address)
        return old

    def compare_exchange_at(self, pointer: str, expected: Value, new: Value) -> Value:
        """Compare and exchange at a host's address: one bit, whether it was done."""
        pair = self.function.operation(
            f"cmpxchg ptr {pointer}, {expected.typed}, {new.typed} seq_cst seq_cst"
        )
        return self.function.value(f"extractvalue {{i{new.width}, i1}} {pair}, 1", 1)

    def atomic_at(self, pointer: str, operation: AtomicOperation, operand: Value) -> Value:
        """Read, modify and write at a host's address; the old content."""
        return self.function.value(
            f"atomicrmw {operation.value} ptr {pointer}, {operand.typed} seq_cst", operand.width
        )

    # ------------------------------------------------------------------------------------ devices

    def _device_word(self, index: Value | int) -> str:
        offset = index << 3 if isinstance(index, Value) else 8 * index
        return self.element(self.pointer(self[layout.INTERRUPTS]), offset)

    def device_word(self, index: Value) -> Value:
        return self.function.value(
            f"load atomic i64, ptr {self._device_word(index)} acquire, align 8"
        )

    def set_device_word(self, index: Value, value: Value) -> None:
        pointer = self._device_word(index)
        self.function.effect(f"store atomic {value.typed}, ptr {pointer} monotonic, align 8")

    def post_device_word(self, index: Value, value: Value) -> None:
        pointer = self._device_word(index)
        self.function.operation(f"atomicrmw xchg ptr {pointer}, {value.typed} seq_cst")

    def lock_devices(self) -> Value:
        pair = self.function.operation(
            f"cmpxchg ptr {self._device_word(LOCK)}, i64 0, i64 1 acquire monotonic"
        )
        return self.function.value(f"extractvalue {{i64, i1}} {pair}, 1", 1)

    def unlock_devices(self) -> None:
        self.function.effect(f"store atomic i64 0, ptr {self._device_word(LOCK)} release, align 8")

    # ----------------------------------------------------------------------------------- routines

    def call(self, routine: Routine, *arguments: Value) -> Value:
        assert len(arguments) == routine.arguments, routine.name
        assert all(argument.width == 64 for argument in arguments), routine.name
        self.module.need(routine)
        values = "".join(f", {argument.typed}" for argument in arguments)
        if not routine.traps:
            return self.function.value(f"call fastcc i64 @{routine.name}(ptr %s{values})")
        pair = self.function.operation(f"call fastcc {{i64, i64}} @{routine.name}(ptr %s{values})")
        trapped = self.function.value(f"extractvalue {{i64, i64}} {pair}, 1")
        if self.function.unlikely(trapped.ne(0)):
            raise Trap(self[layout.TRAP_CAUSE], self[layout.TRAP_VALUE])
        return self.function.value(f"extractvalue {{i64, i64}} {pair}, 0")

    # --------------------------------------------------------------------------------------- TLB

    def fill_translation(self, access: Value, address: Value, physical: Value) -> None:
        self.call(_FILL, access, address, physical)

    def select_translations(self) -> None:
        self.call(_SELECT)

    def flush_translations(
        self, by_address: Value, address: Value, by_space: Value, space: Value
    ) -> None:
        self.call(_FLUSH, by_address, address, by_space, space)

    def entry(self, tlb: str, table: int, address: Value) -> str:
        """The entry that an address would have in a table of a set."""
        entries = layout.TLB_CODE_ENTRIES if table == layout.TLB_CODE else layout.TLB_DATA_ENTRIES
        # The page's number times the size of an entry, in one shift and one mask.
        offset = (address >> 8) & ((entries - 1) * layout.TLB_ENTRY_SIZE)
        return self.element(self.element(tlb, table), offset)

    def store_at(self, pointer: str, value: Value, offset: int = 0) -> None:
        """Store a word some bytes after a pointer."""
        target = self.element(pointer, offset) if offset else pointer
        self.function.effect(f"store {value.typed}, ptr {target}")

    def count(self, tlb: str, counter: int) -> None:
        """Count something that happened to a set."""
        pointer = self.element(tlb, layout.TLB_COUNTERS + 8 * counter)
        self.store_at(pointer, self.function.value(f"load i64, ptr {pointer}") + 1)

    def clear_set(self, tlb: Value) -> None:
        """Make all entries of a set unused."""
        self.function.effect(f"call fastcc void @clear_set(ptr {self.pointer(tlb)})")

    def clear_region(self, tlb: Value, address: Value, shift: Value) -> None:
        """Make the entries of a set unused whose addresses from bit `shift` on are this one's."""
        self.function.effect(
            f"call fastcc void @clear_region(ptr {self.pointer(tlb)}, "
            f"{address.typed}, {shift.typed})"
        )

    def clear_writes(self, tlb: Value, host: Value) -> None:
        """Make a set's entries unused that write to the page at an address of the host's."""
        table = self.element(self.pointer(tlb), layout.TLB_WRITE)
        self.function.effect(f"call fastcc void @clear_writes(ptr {table}, {host.typed})")


def _loop_text(name: str, parameters: str, size: int, step: str) -> str:
    """A function that does something with each entry from `%first` on, `%size` bytes of them."""
    return f"""define internal fastcc void @{name}(ptr %set{parameters}) {ATTRIBUTES} noinline {{
entry:
  br label %loop
loop:
  %offset = phi i64 [0, %entry], [%next, %loop]
  %pointer = getelementptr i8, ptr %set, i64 %offset
{step}
  store i64 %tag, ptr %pointer
  %next = add i64 %offset, {layout.TLB_ENTRY_SIZE}
  %more = icmp ult i64 %next, {size}
  br i1 %more, label %loop, label %done
done:
  ret void
}}
"""


LOOPS = "".join(
    (
        # All entries of a set.
        _loop_text("clear_set", "", layout.TLB_COUNTERS, f"  %tag = add i64 0, {UNUSED}"),
        # Those of pages whose addresses from bit %shift on are the given one's.
        _loop_text(
            "clear_region",
            ", i64 %address, i64 %shift",
            layout.TLB_COUNTERS,
            f"""  %old = load i64, ptr %pointer
  %difference = xor i64 %old, %address
  %distance = lshr i64 %difference, %shift
  %inside = icmp eq i64 %distance, 0
  %tag = select i1 %inside, i64 {UNUSED}, i64 %old""",
        ),
        # Those of writes to the page at an address of the host's.
        _loop_text(
            "clear_writes",
            ", i64 %host",
            layout.TLB_DATA_ENTRIES * layout.TLB_ENTRY_SIZE,
            f"""  %old = load i64, ptr %pointer
  %addend.pointer = getelementptr i8, ptr %pointer, i64 8
  %addend = load i64, ptr %addend.pointer
  %page = add i64 %old, %addend
  %same = icmp eq i64 %page, %host
  %tag = select i1 %same, i64 {UNUSED}, i64 %old""",
        ),
    )
)


def _native(body: Callable[..., Value], arguments: int, name: str | None = None) -> Routine:
    return Routine(name or body.__name__.lstrip("_"), body, arguments, traps=False)


def _write(size: int) -> Routine:
    def body(core: NativeCore, address: Value, value: Value) -> Value:
        flags = core.flags(address)
        if core.function.likely(flags.eq(0)):
            core.write_quietly(address, size, value)
        elif (flags & ROM).eq(0):
            core.write_quietly(address, size, value)
            core.note(address)
        return Value(0, 64)

    return _native(body, 2, f"write_{size}")


_WRITES = {size: _write(size) for size in (1, 2, 4, 8)}


def _note_if_observed(core: NativeCore, address: Value) -> Value:
    if core.function.unlikely(core.flags(address).ne(0)):
        core.note(address)
    return Value(0, 64)


_NOTE_IF_OBSERVED = _native(_note_if_observed, 1)


def _fill(core: NativeCore, access: Value, address: Value, physical: Value) -> Value:
    """Enter a page of RAM into the present set, unless writes to it must be seen."""
    if access.eq(0):
        return Value(0, 64)  # code has entries of another kind
    writing = access.eq(WRITE)
    if writing & core.flags(physical).ne(0):
        return Value(0, 64)
    if core.function.unlikely(is_page_watched(core, address).ne(0)):
        return Value(0, 64)
    core[layout.FILLS] = core[layout.FILLS] + 1
    tlb = core.pointer(core[layout.TLB])
    core.count(tlb, layout.SET_FILLS)
    entry = core.entry(tlb, 0, address)
    entry = core.element(entry, writing.select(Value(layout.TLB_WRITE), layout.TLB_READ))
    host = physical - core[layout.RAM_BASE] + core[layout.RAM_HOST]
    core.store_at(entry, host - address, 8)
    core.store_at(entry, address & PAGE_MASK)
    remember_large(core, address)
    return Value(0, 64)


_FILL = _native(_fill, 3)


def remember_large(core: NativeCore, address: Value) -> None:
    """Widen the range of the large pages of which the present set has pieces.

    A fence for one address of a large page must find all its pieces: where the address is in the
    range, it looks through the set for what may be of the same page.
    """
    large = core[layout.WALK_LEVEL].ne(0)
    set_index = (core[layout.TLB] - core[layout.TLB_SETS]).divide_unsigned(layout.TLB_SET_SIZE)
    pair = core.element("%s", set_index << 4)
    low = core.element(pair, layout.TLB_LARGE[0].offset)
    high = core.element(pair, layout.TLB_LARGE[1].offset)
    shift = core[layout.WALK_LEVEL] * 9 + 12
    first = (address >> shift) << shift
    last = first + ((Value(1, 64) << shift) - 1)
    lowest = core.function.value(f"load i64, ptr {low}")
    core.store_at(low, (large & first.below(lowest)).select(first, lowest))
    highest = core.function.value(f"load i64, ptr {high}")
    core.store_at(high, (large & highest.below(last)).select(last, highest))
    place = core.element("%s", set_index << 3)
    widest = core.element(place, layout.TLB_LARGE_SHIFT[0].offset)
    known = core.function.value(f"load i64, ptr {widest}")
    core.store_at(widest, known.below(shift).select(shift, known))


def _select(core: NativeCore) -> Value:
    """Make the set of the present address space and privilege the one in use."""
    status, privilege = core[layout.MSTATUS], core[layout.PRIVILEGE]
    lent = (status & (1 << MPRV)).ne(0)
    shown = status & (1 << SUM | 1 << MXR)
    how = privilege | shown | lent.select(status & (1 << MPRV | 3 << MPP_SHIFT), 0) | 1 << 63
    # M mode on its own account does not translate: one set serves all address spaces.
    untranslated = privilege.eq(3) & ~lent
    space = untranslated.select(0, core[layout.SATP])
    how = untranslated.select(Value(3 | 1 << 63), how)
    core[layout.SET_SWITCHES] = core[layout.SET_SWITCHES] + 1
    base = core[layout.TLB_SETS]
    for index in range(layout.TLB_SET_COUNT):
        keys = layout.TLB_KEYS[2 * index], layout.TLB_KEYS[2 * index + 1]
        if core[keys[0]].eq(space) & core[keys[1]].eq(how):
            core[layout.TLB] = base + index * layout.TLB_SET_SIZE
            return Value(0, 64)
    core[layout.SET_MISSES] = core[layout.SET_MISSES] + 1
    victim = core[layout.TLB_NEXT]
    core[layout.TLB_NEXT] = (victim + 1) & (layout.TLB_SET_COUNT - 1)
    tlb = base + victim * layout.TLB_SET_SIZE
    core[layout.TLB] = tlb
    core.clear_set(tlb)
    core.count(core.pointer(tlb), layout.SET_TAKEN)
    pair = core.element("%s", victim << 4)
    core.store_at(pair, space, layout.TLB_KEYS[0].offset)
    core.store_at(pair, how, layout.TLB_KEYS[1].offset)
    core.store_at(pair, Value(-1, 64), layout.TLB_LARGE[0].offset)
    core.store_at(pair, Value(0, 64), layout.TLB_LARGE[1].offset)
    place = core.element("%s", victim << 3)
    core.store_at(place, Value(0, 64), layout.TLB_LARGE_SHIFT[0].offset)
    return Value(0, 64)


_SELECT = _native(_select, 0)


def _flush(
    core: NativeCore, by_address: Value, address: Value, by_space: Value, space: Value
) -> Value:
    core[layout.FLUSHES] = core[layout.FLUSHES] + 1
    for index in range(layout.TLB_SET_COUNT):
        core.call(_FLUSH_SET, Value(index, 64), by_address, address, by_space, space)
    return Value(0, 64)


_FLUSH = _native(_flush, 4)


def _flush_set(  # noqa: PLR0917 (a routine takes its values by place)
    core: NativeCore,
    index: Value,
    by_address: Value,
    address: Value,
    by_space: Value,
    space: Value,
) -> Value:
    pair = core.element("%s", index << 4)

    def word(field: Field) -> Value:
        return core.function.value(f"load i64, ptr {core.element(pair, field.offset)}")

    other_space = ((word(layout.TLB_KEYS[0]) >> 44) ^ space) & 0xFFFF
    if word(layout.TLB_KEYS[1]).eq(0) | (by_space.ne(0) & other_space.ne(0)):
        return Value(0, 64)
    tlb = core[layout.TLB_SETS] + index * layout.TLB_SET_SIZE
    low, high = word(layout.TLB_LARGE[0]), word(layout.TLB_LARGE[1])
    in_large = ~address.below(low) & ~high.below(address)
    place = core.element("%s", index << 3)
    widest = core.element(place, layout.TLB_LARGE_SHIFT[0].offset)
    if by_address.eq(0):
        core[layout.SET_FLUSHES] = core[layout.SET_FLUSHES] + 1
        core.count(core.pointer(tlb), layout.WHOLE_FLUSHES)
        core.clear_set(tlb)
        core.store_at(pair, Value(-1, 64), layout.TLB_LARGE[0].offset)
        core.store_at(pair, Value(0, 64), layout.TLB_LARGE[1].offset)
        core.store_at(widest, Value(0, 64))
        return Value(0, 64)
    core.count(core.pointer(tlb), layout.PART_FLUSHES)
    if in_large:
        core[layout.REGION_FLUSHES] = core[layout.REGION_FLUSHES] + 1
        core.clear_region(tlb, address, core.function.value(f"load i64, ptr {widest}"))
        return Value(0, 64)
    for table in (layout.TLB_READ, layout.TLB_WRITE, layout.TLB_CODE):
        entry = core.entry(core.pointer(tlb), table, address)
        core.store_at(entry, Value(UNUSED, 64))
    return Value(0, 64)


_FLUSH_SET = _native(_flush_set, 5)


def drop_writes(core: NativeCore, host: Value) -> None:
    """Forget translations, of all address spaces, for writes to the page at a host's address."""
    for index in range(layout.TLB_SET_COUNT):
        core.clear_writes(core[layout.TLB_SETS] + index * layout.TLB_SET_SIZE, host)
