"""The handlers of instructions, each made from the instruction's body in vmlab.engine.isa.

An instruction that touches memory has two handlers: one that expects a hit in the TLB and does
nothing else, and one that it jumps to at a miss, which walks, traps or leaves to the host. So has
one that computes with floating-point numbers: on the host's unit, and by softfloat. One that
branches has two: for a target in the same page, whose record is at a known distance, and for any.
What looks something up in the TLB has another one that counts the hits; records that are made with
the handlers' addresses of that kind are for statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmlab.engine.compile.dispatch import (
    RECORD_IMMEDIATE,
    SIGNATURE,
    dispatch,
    leave,
    note_trap,
    pc_of_record,
    remaining,
    tail_call,
)
from vmlab.engine.compile.emitter import FunctionEmitter
from vmlab.engine.compile.native import ATTRIBUTES, PAGE_MASK, ModuleEmitter, NativeCore
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
from vmlab.engine.cpu.system import FirmwareCall
from vmlab.engine.isa.cpu import AtomicOperation, Extension, Trap
from vmlab.engine.isa.encoding import Instruction, InstructionSet
from vmlab.engine.isa.values import Value

RECORD_OPERANDS = {"rd": 12, "rs1": 13, "rs2": 14, "rs3": 15}


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
        after = remaining(function) - 1
        length = cpu.variant.length
        if instruction.system:
            core[layout.RETIRED] = core[layout.SLICE_END] - remaining(function)
        try:
            instruction.body(cpu)
        except Rare:
            cpu.gave_up = True
            tail_call(function, f'@"h.{name}.slow"')
        except _NearJump:
            distance = cpu.imm << 3
            record = core.element("%r", distance)
            if function.unlikely(after.less(1)):
                tail_call(function, "@poll_near", record=record, budget=after)
            else:
                dispatch(function, record, budget=after)
        except Resume as resume:
            tail_call(function, "@poll_at", base=resume.target, budget=after)
        except Jump as jump:
            cpu.jumped = True
            lookup = "@lookup.counted" if cpu.variant.counted else "@lookup"
            tail_call(function, lookup, base=jump.target, budget=after)
        except Watched as watched:
            core[layout.EXIT_ADDRESS] = watched.address
            core[layout.EXIT_SIZE] = watched.size
            core[layout.EXIT_DATA] = watched.kinds
            leave(core, cpu.pc, remaining(function), Reason.WATCHPOINT)
        except Trap as trap:
            note_trap(core, trap)
            tail_call(function, "@trap")
        except Wait:
            leave(core, cpu.next_pc, after, Reason.WAIT)
        except FirmwareCall:
            leave(core, cpu.next_pc, after, Reason.FIRMWARE_CALL)
        except DeviceLoad as load:
            _device(core, load.access)
            file = layout.FLOATING if load.extension is Extension.BOX else 0
            core[layout.EXIT_REGISTER] = cpu.field("rd") + file
            core[layout.EXIT_EXTENSION] = EXTENSIONS.index(load.extension)
            leave(core, cpu.next_pc, after, Reason.READ)
        except DeviceAccess as access:
            _device(core, access)
            leave(core, cpu.next_pc, after, Reason.WRITE)
        else:
            dispatch(function, core.element("%r", layout.RECORD_SIZE // 2 * length), budget=after)


def handler_name(instruction: str, length: int) -> str:
    """The name of an instruction's handler for its encodings of this many bytes."""
    return f"{instruction}.{length}"
