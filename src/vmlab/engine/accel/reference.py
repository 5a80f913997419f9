"""The reference executor: the instruction set run as it is written, in Python.

Slow (some 50,000 instructions a second) and simple: no TLB, no decode records. It is the oracle
that native code is compared with.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vmlab.engine.accel.stopping import StoppingExecutor
from vmlab.engine.cpu import layout, sleeping
from vmlab.engine.cpu.access import DeviceAccess, combine
from vmlab.engine.cpu.core import Core, Routine
from vmlab.engine.cpu.execution import CoreCpu, DeviceLoad, Jump, Resume, Wait, Watched
from vmlab.engine.cpu.exits import Exit, Reason
from vmlab.engine.cpu.hart import EXTENSIONS, Hart
from vmlab.engine.cpu.interrupts import BlockCore, shared_place
from vmlab.engine.cpu.layout import Field
from vmlab.engine.cpu.mmu import PAGE
from vmlab.engine.cpu.polling import poll
from vmlab.engine.cpu.system import FirmwareCall
from vmlab.engine.cpu.traps import fetchable, take_trap
from vmlab.engine.isa.cpu import AtomicOperation, Cause, Extension, Trap
from vmlab.engine.isa.values import Value

if TYPE_CHECKING:
    from vmlab.engine.isa.encoding import Decoded

_MACHINE = 3  # the privilege


class ReferenceCore(Core):
    """A hart's state and memory, in numbers.

    Args:
        hart: whose they are.
    """

    def __init__(self, hart: Hart) -> None:
        self.hart = hart
        self._ram = hart.ram
        self._devices = BlockCore(hart.interrupts) if hart.interrupts is not None else None

    def __getitem__(self, field: Field) -> Value:
        return Value(self.hart.words[field.index], 64)

    def __setitem__(self, field: Field, value: Value | int) -> None:
        bits = value if isinstance(value, int) else value.number
        self.hart.words[field.index] = bits & 0xFFFF_FFFF_FFFF_FFFF

    def shared(self, index: int) -> Value:
        return Value(self.hart.shared[index], 64)

    def take_shared(self, index: int) -> Value:
        value = self.shared(index)
        self.hart.shared[index] = 0
        return value

    def _shared_of(self, hart: Value) -> memoryview:
        assert self.hart.interrupts is not None
        return self.hart.interrupts.shared[hart.number]

    def shared_of(self, hart: Value, index: int) -> Value:
        return Value(self._shared_of(hart)[index], 64)

    def post(self, hart: Value, index: int) -> None:
        self._shared_of(hart)[index] = 1

    def count_up(self, hart: Value, index: int) -> None:
        self._shared_of(hart)[index] += 1

    def set_shared(self, index: int, value: Value) -> None:
        self.hart.shared[index] = value.number

    def rouse(self, hart: Value) -> None:
        self._shared_of(hart)[layout.SHARED_ASLEEP] = 0
        sleeping.wake(self.device_word(shared_place(hart)).number + 8 * layout.SHARED_ASLEEP)

    def host_time(self) -> Value:
        return Value(time.monotonic_ns() // 100, 64)

    def physical_read(self, address: Value, size: int) -> Value:
        return Value(int.from_bytes(self._ram.read(address.number, size), "little"), 64)

    def is_observed(self, address: Value) -> Value:
        return Value(0, 1)  # physical_write minds the page's flags itself

    def physical_write(self, address: Value, size: int, value: Value) -> None:
        self._ram.write(address.number, value.low(8 * size).number.to_bytes(size, "little"))

    def physical_compare_exchange(self, address: Value, expected: Value, new: Value) -> Value:
        size = new.width // 8
        same = self.physical_read(address, size).low(new.width).eq(expected)
        if same:
            self.physical_write(address, size, new)
        return same

    def physical_atomic(self, operation: AtomicOperation, address: Value, operand: Value) -> Value:
        size = operand.width // 8
        old = self.physical_read(address, size).low(operand.width)
        self.physical_write(address, size, combine(operation, old, operand))
        return old

    def fill_translation(self, access: Value, address: Value, physical: Value) -> None:
        """There is no TLB."""

    def select_translations(self) -> None:
        """There is no TLB."""

    def flush_translations(
        self, by_address: Value, address: Value, by_space: Value, space: Value
    ) -> None:
        """There is no TLB."""

    def device_word(self, index: Value) -> Value:
        assert self._devices is not None
        return self._devices.device_word(index)

    def set_device_word(self, index: Value, value: Value) -> None:
        assert self._devices is not None
        self._devices.set_device_word(index, value)

    def post_device_word(self, index: Value, value: Value) -> None:
        self.set_device_word(index, value)

    def lock_devices(self) -> Value:
        assert self._devices is not None
        return self._devices.lock_devices()

    def unlock_devices(self) -> None:
        assert self._devices is not None
        self._devices.unlock_devices()

    def call(self, routine: Routine, *arguments: Value) -> Value:
        return routine.body(self, *arguments)


class ReferenceCpu(CoreCpu):
    """The processor at one decoded instruction."""

    decoded: Decoded

    def __init__(self, core: ReferenceCore) -> None:
        super().__init__(core)
        self._words = core.hart.words

    def field(self, name: str) -> Value:
        number: int = getattr(self.decoded, name)
        return Value(number, 64)

    @property
    def imm(self) -> Value:
        return Value(self.decoded.imm, 64)

    @property
    def pc(self) -> Value:
        return Value(self._words[layout.PC.index], 64)

    @property
    def next_pc(self) -> Value:
        return Value(self._words[layout.PC.index] + self.decoded.length, 64)

    def read_register(self, operand: str, *, floating: bool = False) -> Value:
        number: int = getattr(self.decoded, operand)
        return Value(self._words[number + (layout.FLOATING if floating else 0)], 64)

    def write_register(self, value: Value, *, floating: bool = False) -> None:
        if floating:
            self._words[layout.FLOATING + self.decoded.rd] = value.number
        elif self.decoded.rd:
            self._words[self.decoded.rd] = value.number

    def fence(self) -> None:
        """Python runs one thread at a time."""


class ReferenceExecutor(StoppingExecutor):
    """Runs a hart.

    Args:
        hart: which; it can be given to another executor between two runs.
    """

    name = "reference"

    def __init__(self, hart: Hart) -> None:
        # Engines that use native code start without all instructions' meanings.
        from vmlab.engine.isa.riscv64 import RISCV64

        super().__init__(hart)
        self._instructions = RISCV64
        self._core = ReferenceCore(hart)
        self._cpu = ReferenceCpu(self._core)

    def _run(self, budget: int) -> Exit:
        hart, breakpoints = self.hart, self.points.breakpoints
        hart.executor = self
        self._arm()
        hart[layout.BUDGET_LEFT] = budget
        hart[layout.SLICE_END] = hart[layout.RETIRED]
        left = self._poll(hart.pc, 0)
        while left is not None:
            if hart.pc in breakpoints:
                hart[layout.RETIRED] = hart[layout.SLICE_END] - left
                hart[layout.REASON] = Reason.BREAKPOINT.value
                break
            left = self._instruction(left)
        return hart.exit()

    def _step(self, how: int) -> Exit:
        hart = self.hart
        hart.executor = self
        self._arm()
        hart[layout.STEPPING] = how
        hart[layout.BUDGET_LEFT] = 1
        hart[layout.SLICE_END] = hart[layout.RETIRED]
        left = self._poll(hart.pc, 0)
        if left is not None:
            left = self._instruction(left)
            if left is not None:
                self._poll(hart.pc, left)
        hart[layout.STEPPING] = 0
        return hart.exit()

    def _poll(self, pc: int, left: int) -> int | None:
        budget = poll(self._core, Value(pc, 64), Value(left, 64)).signed_number
        return budget or None

    def _instruction(self, left: int) -> int | None:
        """Execute the next instruction; the budget after it, or None to leave."""
        hart, cpu = self.hart, self._cpu
        pc = hart.pc
        hart[layout.RETIRED] = hart[layout.SLICE_END] - left
        try:
            self._fetch(pc)
            following = pc + cpu.decoded.length
            try:
                cpu.decoded.instruction.body(cpu)
            except Resume as resume:
                return self._poll(resume.target.number, left - 1)
            except Jump as jump:
                return self._continue(jump.target.number, left - 1, poll_point=True)
            except Wait:
                self._retire(following, Reason.WAIT)
            except FirmwareCall:
                self._retire(following, Reason.FIRMWARE_CALL)
            except DeviceLoad as load:
                register = cpu.decoded.rd or layout.DISCARD
                if load.extension is Extension.BOX:
                    register = cpu.decoded.rd + layout.FLOATING
                hart[layout.EXIT_REGISTER] = register
                hart[layout.EXIT_EXTENSION] = EXTENSIONS.index(load.extension)
                self._device(following, Reason.READ, load.access)
            except DeviceAccess as access:
                self._device(following, Reason.WRITE, access)
            except Watched as watched:
                hart[layout.EXIT_ADDRESS] = watched.address.number
                hart[layout.EXIT_SIZE] = watched.size
                hart[layout.EXIT_DATA] = watched.kinds
                hart[layout.REASON] = Reason.WATCHPOINT.value
            else:
                left_page = (following ^ pc) & -PAGE != 0
                return self._continue(following & layout.WORD, left - 1, poll_point=left_page)
            return None
        except Trap as trap:
            handler = take_trap(self._core, trap.cause, trap.value, Value(pc, 64))
            if hart[layout.STEPPING]:
                hart.pc = handler.number
                hart[layout.REASON] = Reason.BUDGET.value
                return None
            return self._poll(handler.number, left)

    def _fetch(self, pc: int) -> None:
        core, hart = self._core, self.hart
        if (
            hart[layout.PRIVILEGE] == _MACHINE
            and hart[layout.PMP_OPEN]
            and hart.ram.contains(pc, 4)
        ):
            # Nothing is translated and nothing forbidden; most of the time would go by there.
            word = int.from_bytes(hart.ram.read(pc, 4), "little")
            if word & 3 != 3:
                word &= 0xFFFF
        else:
            word = core.physical_read(fetchable(core, Value(pc, 64)), 2).number
            if word & 3 == 3:
                following = Value(pc + 2, 64)
                word |= core.physical_read(fetchable(core, following), 2).number << 16
        decoded = self._instructions.decode(word)
        if decoded is None:
            raise Trap(Cause.ILLEGAL, word)
        self._cpu.decoded = decoded

    def _continue(self, target: int, left: int, *, poll_point: bool) -> int | None:
        self.hart.pc = target
        if poll_point and left <= 0:
            return self._poll(target, left)
        # 0 is None's neighbour only in `_poll`: a budget that is used up goes on to a poll point.
        return left

    def _retire(self, following: int, reason: Reason) -> None:
        self.hart.pc = following
        self.hart[layout.RETIRED] += 1
        self.hart[layout.REASON] = reason.value

    def _device(self, following: int, reason: Reason, access: DeviceAccess) -> None:
        hart = self.hart
        hart[layout.EXIT_ADDRESS] = access.address.number
        hart[layout.EXIT_PC] = hart.pc
        hart[layout.EXIT_SIZE] = access.size
        data = access.data.low(8 * access.size).number if access.data is not None else 0
        hart[layout.EXIT_DATA] = data
        self._retire(following, reason)
