"""What instructions ask of the processor, in terms of the privileged architecture below them.

`CoreCpu` is the part of `Cpu` that is the same for every executor; what is left to them is where
operands and registers are.
"""

from __future__ import annotations

from vmlab.engine.cpu import access
from vmlab.engine.cpu.access import DeviceAccess
from vmlab.engine.cpu.core import Core
from vmlab.engine.cpu.layout import WATCH_READS, WATCH_WRITES
from vmlab.engine.cpu.mmu import READ, WRITE
from vmlab.engine.cpu.system import SYSTEM
from vmlab.engine.cpu.watching import is_watched
from vmlab.engine.isa.cpu import AtomicOperation, Cpu, Extension
from vmlab.engine.isa.values import Value, mask


class Leave(Exception):
    """The instruction ends otherwise than by going on to the next one."""


class Jump(Leave):
    """It went to an address, by a taken branch or a jump."""

    def __init__(self, target: Value) -> None:
        self.target = target
        super().__init__()


class Resume(Jump):
    """It went to an address, and interrupts are to be looked for."""


class Wait(Leave):
    """It retires, and the hart has nothing to do."""


class DeviceLoad(Leave):
    """It retires when a device has answered."""

    def __init__(self, access: DeviceAccess, extension: Extension) -> None:
        self.access = access
        self.extension = extension
        super().__init__()


class Watched(Leave):
    """It would access what a debugger watches, and has not been executed."""

    def __init__(self, address: Value, size: int, kinds: int) -> None:
        self.address = address
        self.size = size
        self.kinds = kinds
        super().__init__()


def extend(datum: Value, size: int, extension: Extension) -> Value:
    """What a register holds after `size` bytes, zero-extended in `datum`, were loaded."""
    if extension is Extension.SIGN:
        return datum.low(8 * size).sign_extend(64)
    if extension is Extension.BOX and size < 8:
        return datum | (mask(64) & ~mask(8 * size))
    return datum


class CoreCpu(Cpu):
    """A processor whose memory and system are those of a core.

    Args:
        core: the hart below.
    """

    def __init__(self, core: Core) -> None:
        self.core = core

    def _show(self, address: Value, size: int, kinds: int) -> None:
        """Leave if a debugger watches for such an access."""
        if is_watched(self.core, address, Value(size), Value(kinds)).ne(0):
            raise Watched(address, size, kinds)

    def load(self, address: Value, size: int, extension: Extension) -> Value:
        self._show(address, size, WATCH_READS)
        try:
            return extend(access.load(self.core, address, size), size, extension)
        except DeviceAccess as device:
            raise DeviceLoad(device, extension) from None

    def store(self, address: Value, size: int, value: Value) -> None:
        self._show(address, size, WATCH_WRITES)
        access.store(self.core, address, size, value)

    def atomic(self, operation: AtomicOperation, address: Value, size: int, value: Value) -> Value:
        self._show(address, size, WATCH_READS | WATCH_WRITES)
        physical = access.atomic_address(self.core, address, size, WRITE)
        return self.core.physical_atomic(operation, physical, value)

    def load_reserved(self, address: Value, size: int) -> Value:
        self._show(address, size, WATCH_READS)
        physical = access.atomic_address(self.core, address, size, READ)
        value = self.core.physical_read(physical, size).low(8 * size)
        access.reserve(self.core, address, value)
        return value

    def store_conditional(self, address: Value, size: int, value: Value) -> Value:
        self._show(address, size, WATCH_WRITES)
        physical = access.atomic_address(self.core, address, size, WRITE)
        held, expected = access.take_reservation(self.core, address, size)
        if not held:
            return Value(1, 64)
        done = self.core.physical_compare_exchange(physical, expected, value)
        return done.zero_extend(64) ^ 1

    def zero_block(self, address: Value) -> None:
        self._show(address & -access.BLOCK, access.BLOCK, WATCH_WRITES)
        access.zero_block(self.core, address)

    def check_block(self, address: Value) -> None:
        access.check_block(self.core, address)

    def system_call(self, name: str, *arguments: Value) -> Value:
        return SYSTEM[name](self.core, *arguments)

    def jump(self, target: Value) -> None:
        raise Jump(target)

    def jump_relative(self, offset: Value) -> None:
        raise Jump(self.pc + offset)

    def resume_at(self, target: Value) -> None:
        raise Resume(target)

    def wait(self) -> None:
        raise Wait
