"""What the privileged architecture may use of a hart, and routines over it.

A routine is a function over `Core` and values that is written once: called with the reference
executor's core it runs; called while native code is generated it becomes a native function and a
call of it. A routine that raises `Trap` does so in both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

from vmlab.engine.cpu.layout import Field
from vmlab.engine.isa.cpu import AtomicOperation
from vmlab.engine.isa.values import Value


class Rare(Exception):
    """Code for the usual case has met another one; code for all cases is to do it, from anew."""


class DeviceCore(ABC):
    """What routines over the state of devices that harts share may use."""

    @abstractmethod
    def device_word(self, index: Value) -> Value:
        """A word of the interrupt controller's block, which must be there."""

    @abstractmethod
    def set_device_word(self, index: Value, value: Value) -> None:
        """Write a word of the block; its lock is held."""

    @abstractmethod
    def post_device_word(self, index: Value, value: Value) -> None:
        """Write one that needs no lock, before anything is read that comes after."""

    @abstractmethod
    def lock_devices(self) -> Value:
        """Take the block's lock: one bit, whether it was to be had."""

    @abstractmethod
    def unlock_devices(self) -> None:
        """Give the lock back."""

    @abstractmethod
    def call(self, routine: Routine, *arguments: Value) -> Value:
        """Run a routine, or generate a call of it."""


class Core(DeviceCore):
    """A hart's state and memory, below the level of instructions.

    Attributes:
        hurried: Code for the usual case is being generated, which may raise `Rare` while nothing
            has been changed yet.
        host_fuses: Such code may use the host's fused multiply-add.
    """

    hurried = False
    host_fuses = False

    def likely(self, condition: Value) -> bool:
        """Branch on one bit that is nearly always set."""
        return bool(condition)

    def expect(self, condition: Value) -> None:
        """Go on where a bit is set; for code that is `hurried`.

        Raises:
            Rare: it is not.
        """
        if not self.likely(condition):
            raise Rare

    @abstractmethod
    def __getitem__(self, field: Field) -> Value:
        """A word of the state block."""

    @abstractmethod
    def __setitem__(self, field: Field, value: Value | int) -> None:
        """Write a word of the state block."""

    @abstractmethod
    def shared(self, index: int) -> Value:
        """A word that other threads write."""

    @abstractmethod
    def take_shared(self, index: int) -> Value:
        """Such a word, which becomes 0 at once."""

    @abstractmethod
    def shared_of(self, hart: Value, index: int) -> Value:
        """Such a word of any hart that shares the interrupt controller."""

    @abstractmethod
    def post(self, hart: Value, index: int) -> None:
        """Set such a word of any of them to 1, before anything is read that comes after."""

    @abstractmethod
    def count_up(self, hart: Value, index: int) -> None:
        """Add 1 to such a word, before anything is read that comes after."""

    @abstractmethod
    def set_shared(self, index: int, value: Value) -> None:
        """Write a shared word of this hart's, after all that comes before."""

    @abstractmethod
    def rouse(self, hart: Value) -> None:
        """Let the thread of one of them go on that waits on its SHARED_ASLEEP, which becomes 0."""

    @abstractmethod
    def host_time(self) -> Value:
        """The host's monotonic clock in units of 100 ns, the tick of `time` (10 MHz)."""

    @abstractmethod
    def physical_read(self, address: Value, size: int) -> Value:
        """Read RAM; 64 bits, the upper ones zero. The address must be one of RAM."""

    @abstractmethod
    def is_observed(self, address: Value) -> Value:
        """One bit: a store to this page of RAM is the host's to do."""

    @abstractmethod
    def physical_write(self, address: Value, size: int, value: Value) -> None:
        """Write the lowest `size` bytes to RAM, telling whoever watches the page."""

    @abstractmethod
    def physical_compare_exchange(self, address: Value, expected: Value, new: Value) -> Value:
        """Replace aligned RAM if it is as expected: one bit, whether it was.

        The two values are equally wide, 32 or 64 bits.
        """

    @abstractmethod
    def physical_atomic(self, operation: AtomicOperation, address: Value, operand: Value) -> Value:
        """Read, modify and write aligned RAM at once; the old content, as wide as the operand."""

    @abstractmethod
    def fill_translation(self, access: Value, address: Value, physical: Value) -> None:
        """Remember that the page of a virtual address may be accessed so without a walk."""

    @abstractmethod
    def select_translations(self) -> None:
        """The address space, the privilege or what they allow may have changed."""

    @abstractmethod
    def flush_translations(
        self, by_address: Value, address: Value, by_space: Value, space: Value
    ) -> None:
        """Forget translations: of one address or all, of one address space or all."""


@dataclass(frozen=True)
class Routine:
    """A function of up to six 64-bit values with a 64-bit result."""

    name: str
    body: Callable[..., Value]
    arguments: int
    traps: bool


def routine(*, traps: bool = False) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Make a function over a core and values a routine.

    Args:
        traps: whether it can raise `Trap`.
    """

    def decorate(body: Callable[..., Value]) -> Callable[..., Value]:
        made = Routine(body.__name__, body, body.__code__.co_argcount - 1, traps)

        @wraps(body)
        def call(core: Core, *arguments: Value) -> Value:
            return core.call(made, *arguments)

        return call

    return decorate
