"""The interpreter: a native function per instruction, each of which jumps to the next one's.

Every handler has the signature

    tailcc void handler(ptr noalias state, ptr record, i64 pc_base, i64 budget, ptr tlb)

and ends with a tail call of the handler in the record that follows. A decode record is 16 bytes per
halfword of code: {ptr handler, i32 imm, u8 rd, u8 rs1, u8 rs2, u8 rs3}, and `pc` is `pc_base` plus
an eighth of the record's address. `budget` counts instructions down. `tlb` is the set of
translations in use. Compiled regions have the same signature and take handlers' places.

An instruction that touches memory has two handlers: one that expects a hit in the TLB and does
nothing else, and one that it jumps to at a miss, which walks, traps or leaves to the host. So has
one that computes with floating-point numbers: on the host's unit, and by softfloat. One that
branches has two: for a target in the same page, whose record is at a known distance, and for any.
What looks something up in the TLB has another one that counts the hits; records that are made with
the handlers' addresses of that kind are for statistics.

Everything is made from the bodies in vmlab.engine.isa; nothing here knows what an instruction does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

from vmlab.engine.compile.decoder import decoder_text
from vmlab.engine.compile.emitter import FunctionEmitter
from vmlab.engine.compile.native import (
    ATTRIBUTES,
    LOOPS,
    PAGE_MASK,
    UNUSED,
    ModuleEmitter,
    NativeCore,
    drop_writes,
    remember_large,
)
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.access import DeviceAccess, reserve, take_reservation
from vmlab.engine.cpu.core import Rare
from vmlab.engine.cpu.execution import (
    CoreCpu,
    DeviceLoad,
    Jump,
    Resume,
    Wait,
    Watched,
    extend,
)
from vmlab.engine.cpu.exits import Reason
from vmlab.engine.cpu.hart import EXTENSIONS
from vmlab.engine.cpu.interrupts import HOST_ROUTINES
from vmlab.engine.cpu.mmu import FETCH
from vmlab.engine.cpu.pmp import allows
from vmlab.engine.cpu.polling import poll
from vmlab.engine.cpu.system import FirmwareCall
from vmlab.engine.cpu.traps import fetchable, take_trap
from vmlab.engine.isa.cpu import AtomicOperation, Cause, Extension, Trap
from vmlab.engine.isa.encoding import Instruction, InstructionSet
from vmlab.engine.isa.values import Value

SIGNATURE = "ptr noalias %s, ptr %r, i64 %p, i64 %b, ptr %t"
RECORD_OPERANDS = {"rd": 12, "rs1": 13, "rs2": 14, "rs3": 15}
RECORD_IMMEDIATE = 8

HOST_PREFIX = "host."
# Handlers that are no instruction's.
PAGE_END, NEAR_END, CROSSING, ILLEGAL, BREAKPOINT, STALE = (
    "page_end",
    "near_end",
    "crossing",
    "illegal",
    "breakpoint",
    "stale",
)


class _NearJump(Exception):
    """A jump by the record's immediate within the page."""


@dataclass(frozen=True)
class Variant:
    """Which of an instruction's handlers."""

    length: int
    near: bool = False  # a branch stays in the page
    slow: bool = False  # in all cases: memory without the TLB, floating point by softfloat
    counted: bool = False  # hits are counted


class _HandlerCpu(CoreCpu):
    """The processor as operands of a handler."""

    core: NativeCore

    def __init__(self, core: NativeCore, variant: Variant) -> None:
        super().__init__(core)
        self.core = core
        self.variant = variant
        self.branched = False
        self.jumped = False
        self.used_tlb = False
        self.gave_up = False  # it knows rare cases

    # ------------------------------------------------------------------------------- operands

    def field(self, name: str) -> Value:
        pointer = self.core.element("%r", RECORD_OPERANDS[name])
        return self.core.function.value(f"load i8, ptr {pointer}", 8).zero_extend(64)

    @property
    def imm(self) -> Value:
        pointer = self.core.element("%r", RECORD_IMMEDIATE)
        return self.core.function.value(f"load i32, ptr {pointer}", 32).sign_extend(64)

    @property
    def pc(self) -> Value:
        return pc_of_record(self.core.function)

    @property
    def next_pc(self) -> Value:
        return self.pc + self.variant.length

    def _register(self, operand: str, *, floating: bool) -> str:
        pointer = self.core.element("%s", 8 * layout.FLOATING if floating else 0)
        return self.core.element(pointer, self.field(operand) << 3)

    def read_register(self, operand: str, *, floating: bool = False) -> Value:
        pointer = self._register(operand, floating=floating)
        return self.core.function.value(f"load i64, ptr {pointer}")

    def write_register(self, value: Value, *, floating: bool = False) -> None:
        assert value.width == 64
        self.core.store_at(self._register("rd", floating=floating), value)

    # -------------------------------------------------------------------------------- memory

    def _translate(self, address: Value, size: int, table: int) -> str:
        """The host's address of a virtual one, out of the TLB."""
        core, function = self.core, self.core.function
        entry = core.entry("%t", table, address)
        tag = function.value(f"load i64, ptr {entry}")
        core.expect(tag.eq(address & (PAGE_MASK | (size - 1))))
        self.used_tlb = True
        if self.variant.counted:
            hits = layout.WRITE_HITS if table == layout.TLB_WRITE else layout.READ_HITS
            core.count("%t", hits)
        addend = function.value(f"load i64, ptr {core.element(entry, 8)}")
        return core.pointer(address + addend)

    def _load(self, pointer: str, size: int) -> Value:
        return self.core.function.value(f"load i{8 * size}, ptr {pointer}", 8 * size)

    def load(self, address: Value, size: int, extension: Extension) -> Value:
        if self.variant.slow:
            self.core.count("%t", layout.READ_MISSES)
            return super().load(address, size, extension)
        datum = self._load(self._translate(address, size, layout.TLB_READ), size)
        return extend(datum.zero_extend(64), size, extension)

    def store(self, address: Value, size: int, value: Value) -> None:
        if self.variant.slow:
            self.core.count("%t", layout.WRITE_MISSES)
            super().store(address, size, value)
            return
        pointer = self._translate(address, size, layout.TLB_WRITE)
        self.core.function.effect(f"store {value.low(8 * size).typed}, ptr {pointer}")

    def atomic(self, operation: AtomicOperation, address: Value, size: int, value: Value) -> Value:
        if self.variant.slow:
            self.core.count("%t", layout.WRITE_MISSES)
            return super().atomic(operation, address, size, value)
        return self.core.atomic_at(
            self._translate(address, size, layout.TLB_WRITE), operation, value
        )

    def load_reserved(self, address: Value, size: int) -> Value:
        if self.variant.slow:
            self.core.count("%t", layout.READ_MISSES)
            return super().load_reserved(address, size)
        pointer = self._translate(address, size, layout.TLB_READ)
        value = self.core.function.value(
            f"load atomic i{8 * size}, ptr {pointer} seq_cst, align {size}", 8 * size
        )
        reserve(self.core, address, value)
        return value

    def store_conditional(self, address: Value, size: int, value: Value) -> Value:
        if self.variant.slow:
            self.core.count("%t", layout.WRITE_MISSES)
            return super().store_conditional(address, size, value)
        pointer = self._translate(address, size, layout.TLB_WRITE)
        held, expected = take_reservation(self.core, address, size)
        if not held:
            return Value(1, 64)
        done = self.core.compare_exchange_at(pointer, expected, value)
        return done.zero_extend(64) ^ 1

    def fence(self) -> None:
        self.core.function.effect("fence seq_cst")

    # --------------------------------------------------------------------------- control flow

    def jump_relative(self, offset: Value) -> None:
        self.branched = True
        if self.variant.near:
            raise _NearJump
        super().jump_relative(offset)


# --------------------------------------------------------------------------------- ends of handlers


def pc_of_record(function: FunctionEmitter) -> Value:
    """The address of the instruction whose record is `%r`."""
    record = function.value("ptrtoint ptr %r to i64")
    return Value("%p", 64, function) + (record >> 3)


def _tail_call(
    function: FunctionEmitter,
    handler: str,
    *,
    record: str = "%r",
    base: Value | str = "%p",
    budget: Value | str = "%b",
    tlb: str = "%t",
) -> None:
    base = base.text if isinstance(base, Value) else base
    budget = budget.text if isinstance(budget, Value) else budget
    function.effect(
        f"musttail call tailcc void {handler}"
        f"(ptr %s, ptr {record}, i64 {base}, i64 {budget}, ptr {tlb})"
    )
    function.effect("ret void")


def _dispatch(
    function: FunctionEmitter,
    record: str,
    *,
    base: Value | str = "%p",
    budget: Value | str = "%b",
) -> None:
    handler = function.operation(f"load ptr, ptr {record}")
    _tail_call(function, handler, record=record, base=base, budget=budget)


def _budget(function: FunctionEmitter) -> Value:
    return Value("%b", 64, function)


def _commit(core: NativeCore, pc: Value, budget: Value, reason: Reason) -> None:
    """Leave to the host with `pc` next."""
    core[layout.PC] = pc
    core[layout.RETIRED] = core[layout.SLICE_END] - budget
    core[layout.REASON] = reason.value
    core.function.effect("ret void")


def _raise(core: NativeCore, trap: Trap) -> None:
    core[layout.TRAP_CAUSE] = trap.cause
    core[layout.TRAP_VALUE] = trap.value


def _device(core: NativeCore, access: DeviceAccess) -> None:
    core[layout.EXIT_PC] = pc_of_record(core.function)
    core[layout.EXIT_ADDRESS] = access.address
    core[layout.EXIT_SIZE] = access.size
    core[layout.EXIT_DATA] = access.data if access.data is not None else 0


class HandlerWriter:
    """Writes the handlers of an instruction set into a module.

    Args:
        instructions: the set.
        module: where they go.
    """

    def __init__(self, instructions: InstructionSet, module: ModuleEmitter) -> None:
        self.instructions = instructions
        self.module = module
        self.names: list[str] = []  # of the handlers that records may name, by number

    def write(self) -> None:
        """Write all of them."""
        lengths: dict[str, set[int]] = {}
        for instruction in self.instructions:
            base = instruction.base or instruction.name
            lengths.setdefault(base, set()).add(instruction.pattern.length)
        for name, own in lengths.items():
            for length in sorted(own):
                self._write_instruction(self.instructions[name], length)

    def _write_instruction(self, instruction: Instruction, length: int) -> None:
        name = handler_name(instruction.name, length)
        fast = self._write_handler(instruction, name, Variant(length))
        if fast.branched:
            self._write_handler(instruction, name + ".near", Variant(length, near=True))
        if fast.used_tlb or fast.jumped:
            self._write_handler(instruction, name, Variant(length, counted=True))
        if fast.gave_up:
            self._write_handler(
                instruction, name + ".slow", Variant(length, slow=True), named=False
            )

    def _write_handler(
        self, instruction: Instruction, name: str, variant: Variant, *, named: bool = True
    ) -> _HandlerCpu:
        function = FunctionEmitter()
        core = NativeCore(self.module, function, hurried=not variant.slow)
        cpu = _HandlerCpu(core, variant)
        function.explore(lambda: self._run(instruction, cpu, name))
        if variant.counted:
            symbol = f"c.{self.names.index(name)}.{name}"
        elif named:
            symbol = f"h.{len(self.names)}.{name}"
            self.names.append(name)
        else:
            symbol = f"h.{name}"
        linkage = "hidden" if named else "internal"
        header = f'define {linkage} tailcc void @"{symbol}"({SIGNATURE}) {ATTRIBUTES}'
        self.module.add(symbol, function.text(header))
        return cpu

    @staticmethod
    def _run(instruction: Instruction, cpu: _HandlerCpu, name: str) -> None:
        core, function = cpu.core, cpu.core.function
        after = _budget(function) - 1
        length = cpu.variant.length
        if instruction.system:
            core[layout.RETIRED] = core[layout.SLICE_END] - _budget(function)
        try:
            instruction.body(cpu)
        except Rare:
            cpu.gave_up = True
            _tail_call(function, f'@"h.{name}.slow"')
        except _NearJump:
            distance = cpu.imm << 3
            record = core.element("%r", distance)
            if function.unlikely(after.less(1)):
                _tail_call(function, "@poll_near", record=record, budget=after)
            else:
                _dispatch(function, record, budget=after)
        except Resume as resume:
            _tail_call(function, "@poll_at", base=resume.target, budget=after)
        except Jump as jump:
            cpu.jumped = True
            lookup = "@lookup.counted" if cpu.variant.counted else "@lookup"
            _tail_call(function, lookup, base=jump.target, budget=after)
        except Watched as watched:
            core[layout.EXIT_ADDRESS] = watched.address
            core[layout.EXIT_SIZE] = watched.size
            core[layout.EXIT_DATA] = watched.kinds
            _commit(core, cpu.pc, _budget(function), Reason.WATCHPOINT)
        except Trap as trap:
            _raise(core, trap)
            _tail_call(function, "@trap")
        except Wait:
            _commit(core, cpu.next_pc, after, Reason.WAIT)
        except FirmwareCall:
            _commit(core, cpu.next_pc, after, Reason.FIRMWARE_CALL)
        except DeviceLoad as load:
            _device(core, load.access)
            file = layout.FLOATING if load.extension is Extension.BOX else 0
            core[layout.EXIT_REGISTER] = cpu.field("rd") + file
            core[layout.EXIT_EXTENSION] = EXTENSIONS.index(load.extension)
            _commit(core, cpu.next_pc, after, Reason.READ)
        except DeviceAccess as access:
            _device(core, access)
            _commit(core, cpu.next_pc, after, Reason.WRITE)
        else:
            _dispatch(function, core.element("%r", layout.RECORD_SIZE // 2 * length), budget=after)


def handler_name(instruction: str, length: int) -> str:
    """The name of an instruction's handler for its encodings of this many bytes."""
    return f"{instruction}.{length}"


# ------------------------------------------------------------------------- what is no instruction's


class _Glue:
    """The functions between handlers; of each, `%p` is the next instruction's address where its
    `%r` means nothing."""

    def __init__(self, module: ModuleEmitter) -> None:
        self.module = module

    def add(self, name: str, body: Callable[[NativeCore], None], linkage: str = "internal") -> None:
        function = FunctionEmitter()
        core = NativeCore(self.module, function)
        function.explore(lambda: body(core))
        header = f'define {linkage} tailcc void @"{name}"({SIGNATURE}) {ATTRIBUTES}'
        self.module.add(name, function.text(header))


def _pc_argument(core: NativeCore) -> Value:
    return Value("%p", 64, core.function)


def _poll_at(core: NativeCore) -> None:
    function = core.function
    left = poll(core, _pc_argument(core), _budget(function))
    if function.unlikely(left.eq(0)):
        function.effect("ret void")
        return
    tlb = core.pointer(core[layout.TLB])
    _tail_call(function, "@find", base=core[layout.PC], budget=left, tlb=tlb)


def _poll_near(core: NativeCore) -> None:
    _tail_call(core.function, "@poll_at", base=pc_of_record(core.function))


def _lookup(core: NativeCore, *, counted: bool = False) -> None:
    if core.function.unlikely(_budget(core.function).less(1)):
        _tail_call(core.function, "@poll_at")
        return
    _find(core, counted=counted)


def _dispatch_at(core: NativeCore, records: Value, pc: Value) -> None:
    """Go on with the instruction at `pc`, whose page's first record is at `records`."""
    function = core.function
    record = core.element(core.pointer(records), (pc & 4095) << 3)
    base = (pc & PAGE_MASK) - (records >> 3)
    _dispatch(function, record, base=base)


def _find(core: NativeCore, *, counted: bool = False) -> None:
    function = core.function
    pc = _pc_argument(core)
    entry = core.entry("%t", layout.TLB_CODE, pc)
    page = function.value(f"load i64, ptr {entry}")
    if function.likely(page.eq(pc & PAGE_MASK)):
        if counted:
            core.count("%t", layout.CODE_HITS)
        records = function.value(f"load i64, ptr {core.element(entry, 8)}")
        _dispatch_at(core, records, pc)
    else:
        _tail_call(function, "@find_slowly")


def _find_slowly(core: NativeCore) -> None:
    function = core.function
    pc = _pc_argument(core)
    try:
        physical = fetchable(core, pc)
    except Trap as trap:
        _raise(core, trap)
        _tail_call(function, "@trap_at")
        return
    # Protection that differs within a page is looked at for each instruction.
    whole = allows(core, physical & PAGE_MASK, Value(4096), Value(FETCH), core[layout.PRIVILEGE])
    if core[layout.STEPPING].ne(0) | ~whole:
        _tail_call(function, "@single")
        return
    if function.unlikely((core[layout.BREAK_PAGES] >> ((pc >> 12) & 63)).low(1)):
        if core[layout.OFFERED_PAGE].eq(pc & PAGE_MASK):
            core[layout.OFFERED_PAGE] = layout.NO_OFFER
            _enter_page(core, core[layout.OFFERED_RECORDS], pc)
        else:
            core[layout.EXIT_ADDRESS] = physical
            _commit(core, pc, _budget(function), Reason.CODE)
        return
    page = (physical - core[layout.RAM_BASE]) >> 12
    slot = core.element(core.pointer(core[layout.CODE_MAP]), page << 3)
    records = function.value(f"load atomic i64, ptr {slot} acquire, align 8")
    if records.eq(0):
        core[layout.EXIT_ADDRESS] = physical
        _commit(core, pc, _budget(function), Reason.CODE)
        return
    _enter_page(core, records, pc)


def _enter_page(core: NativeCore, records: Value, pc: Value) -> None:
    """Remember where the records of a page are, and go on with the instruction at `pc` there."""
    entry = core.entry("%t", layout.TLB_CODE, pc)
    core.store_at(entry, records, 8)
    core.store_at(entry, pc & PAGE_MASK)
    remember_large(core, pc)
    core[layout.CODE_FILLS] = core[layout.CODE_FILLS] + 1
    core.count("%t", layout.CODE_MISSES)
    _dispatch_at(core, records, pc)


def _single(core: NativeCore) -> None:
    """Decode one instruction from memory and execute it from a record of its own."""
    function = core.function
    pc = _pc_argument(core)
    length = Value(2, 64)
    try:
        word = core.physical_read(fetchable(core, pc), 2)
        if (word & 3).eq(3):
            word = word | (core.physical_read(fetchable(core, pc + 2), 2) << 16)
            length = Value(4, 64)
    except Trap as trap:
        _raise(core, trap)
        _tail_call(function, "@trap_at")
        return
    # What follows is a poll point only at the end of a page, or of a step.
    near = core[layout.STEPPING].eq(0) & (((pc + length) ^ pc) & PAGE_MASK).eq(0)
    scratch = core[layout.SCRATCH] + near.select(Value(layout.NEAR_SCRATCH), 0)
    record = core.pointer(scratch)
    handlers = core.pointer(core[layout.HANDLERS])
    # An offset that is in no page: every branch goes far.
    function.effect(
        f"call fastcc void @decode(i32 {word.low(32).text}, ptr {record}, "
        f"i64 1048576, ptr {handlers})"
    )
    _dispatch(function, record, base=pc - (scratch >> 3))


def _trap(core: NativeCore) -> None:
    _tail_call(core.function, "@trap_at", base=pc_of_record(core.function))


def _trap_at(core: NativeCore) -> None:
    function = core.function
    core[layout.RETIRED] = core[layout.SLICE_END] - _budget(function)
    handler = take_trap(core, core[layout.TRAP_CAUSE], core[layout.TRAP_VALUE], _pc_argument(core))
    if core[layout.STEPPING].ne(0):
        _commit(core, handler, _budget(function), Reason.BUDGET)
    else:
        _tail_call(function, "@poll_at", base=handler)


def _page_end(core: NativeCore) -> None:
    _tail_call(core.function, "@lookup", base=pc_of_record(core.function))


def _page_end_counted(core: NativeCore) -> None:
    _tail_call(core.function, "@lookup.counted", base=pc_of_record(core.function))


def _near_end(core: NativeCore) -> None:
    _tail_call(core.function, "@find", base=pc_of_record(core.function))


def _crossing(core: NativeCore) -> None:
    _tail_call(core.function, "@single", base=pc_of_record(core.function))


def _illegal(core: NativeCore) -> None:
    pointer = core.element("%r", RECORD_IMMEDIATE)
    word = core.function.value(f"load i32, ptr {pointer}", 32).zero_extend(64)
    _raise(core, Trap(Cause.ILLEGAL, word))
    _tail_call(core.function, "@trap")


def _breakpoint(core: NativeCore) -> None:
    _commit(core, pc_of_record(core.function), _budget(core.function), Reason.BREAKPOINT)


def _stale(core: NativeCore) -> None:
    pc = pc_of_record(core.function)
    core.store_at(core.entry("%t", layout.TLB_CODE, pc), Value(UNUSED, 64))
    _tail_call(core.function, "@find", base=pc)


def _entry_text(name: str, target: str, *, first: str = "") -> str:
    """A C function `void name(state)` that goes to a glue function with what the state says.

    Args:
        name: its own.
        target: the glue function's.
        first: a C function of the state that is called before.
    """
    fields = {
        "pc": layout.PC,
        "end": layout.SLICE_END,
        "retired": layout.RETIRED,
        "tlb": layout.TLB,
    }
    loads = "".join(
        f"  %{register}.p = getelementptr i8, ptr %s, i64 {field.offset}\n"
        f"  %{register} = load i64, ptr %{register}.p\n"
        for register, field in fields.items()
    )
    return (
        f"define hidden void @{name}(ptr %s) {ATTRIBUTES} {{\n"
        + (f"  call void @{first}(ptr %s)\n" if first else "")
        + f"{loads}"
        "  %budget = sub i64 %end, %retired\n"
        "  %t = inttoptr i64 %tlb to ptr\n"
        f"  call tailcc void @{target}(ptr %s, ptr null, i64 %pc, i64 %budget, ptr %t)\n"
        "  ret void\n}\n"
    )


def _void_entry(
    module: ModuleEmitter, name: str, body: Callable[[NativeCore], None], parameters: str = ""
) -> None:
    """A C function `void name(state, ...)`."""
    function = FunctionEmitter()
    core = NativeCore(module, function)

    def run() -> None:
        body(core)
        function.effect("ret void")

    function.explore(run)
    module.add(name, function.text(f"define hidden void @{name}(ptr %s{parameters}) {ATTRIBUTES}"))


def _host_entry(module: ModuleEmitter, operation: Callable[..., Value]) -> None:
    """A C function of a routine's name, `u64 name(state, u64 ...)`."""
    function = FunctionEmitter()
    core = NativeCore(module, function)
    count = len(signature(operation).parameters) - 1
    arguments = [Value(f"%a{index}", 64, function) for index in range(count)]

    def run() -> None:
        function.effect(f"ret {operation(core, *arguments).typed}")

    function.explore(run)
    parameters = "".join(f", i64 %a{index}" for index in range(count))
    name = f"{HOST_PREFIX}{operation.__name__}"
    header = f'define hidden i64 @"{name}"(ptr %s{parameters}) {ATTRIBUTES}'
    module.add(name, function.text(header))


def interpreter_text(instructions: InstructionSet, *, host_fuses: bool) -> str:
    """The whole interpreter of an instruction set as LLVM IR.

    Args:
        instructions: the set.
        host_fuses: the host that it is for has a fused multiply-add.

    Its symbols: `h.NUMBER.NAME` for the handlers that records may name, `c.NUMBER.NAME` for those
    that count hits and take their places; `run(state)` which polls
    and then executes; `go_on(state)` which only executes, `go_on_elsewhere(state)` which comes from
    another page and polls if the budget is used up; `run_changed(state)` and
    `flush_all(state)` for the host that changed registers or memory; `drop_writes(state, page)` for
    a page of the host's that must not be written unseen any more; `host.NAME(state, ...)` for what
    the host does to interrupts; and `decode_page(code, records, handlers)`.
    """
    module = ModuleEmitter(host_fuses=host_fuses)
    writer = HandlerWriter(instructions, module)
    writer.write()
    glue = _Glue(module)
    for name, body in (
        (PAGE_END, _page_end),
        (NEAR_END, _near_end),
        (CROSSING, _crossing),
        (ILLEGAL, _illegal),
        (BREAKPOINT, _breakpoint),
        (STALE, _stale),
    ):
        glue.add(f"h.{len(writer.names)}.{name}", body, "hidden")
        writer.names.append(name)
    glue.add(f"c.{writer.names.index(PAGE_END)}.{PAGE_END}", _page_end_counted, "hidden")
    for name, body in (
        ("poll_at", _poll_at),
        ("poll_near", _poll_near),
        ("lookup", _lookup),
        ("lookup.counted", lambda core: _lookup(core, counted=True)),
        ("find", _find),
        ("find_slowly", _find_slowly),
        ("single", _single),
        ("trap", _trap),
        ("trap_at", _trap_at),
    ):
        glue.add(name, body)
    module.add("loops", LOOPS)
    module.add("run", _entry_text("run", "poll_at"))
    module.add("run_changed", _entry_text("run_changed", "poll_at", first="select_set"))
    module.add("go_on", _entry_text("go_on", "find"))
    module.add("go_on_elsewhere", _entry_text("go_on_elsewhere", "lookup"))
    zero = Value(0, 64)
    _void_entry(module, "select_set", lambda core: core.select_translations())
    _void_entry(module, "flush_all", lambda core: core.flush_translations(zero, zero, zero, zero))
    _void_entry(
        module,
        "drop_writes",
        lambda core: drop_writes(core, Value("%host", 64, core.function)),
        ", i64 %host",
    )
    for operation in HOST_ROUTINES:
        _host_entry(module, operation)
    module.add("decode", decoder_text(instructions, writer.names))
    return module.text()
