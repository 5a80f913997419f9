"""A hart: its state block, the words it shares with other threads, and the RAM it works on.

Who executes it is in vmlab.engine.accel; a hart can change executors between two runs.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

from vmlab.engine.cpu import layout, sleeping
from vmlab.engine.cpu.execution import extend
from vmlab.engine.cpu.exits import Exit, Reason
from vmlab.engine.cpu.interrupts import InterruptBlock
from vmlab.engine.cpu.layout import Field
from vmlab.engine.cpu.pmp import UNUSED
from vmlab.engine.isa.cpu import Extension
from vmlab.engine.isa.values import Value, mask
from vmlab.engine.memory.pages import own_memory
from vmlab.engine.memory.ram import Ram

_NEVER = layout.WORD
EXTENSIONS = tuple(Extension)  # an exit names one by its place here


class Hart:
    """A hart in the state after reset: M mode, no translation, everything zero.

    Args:
        ram: its memory.
        hart_id: its number.
        interrupts: the interrupt controller that it polls, if there is one.
    """

    def __init__(
        self, ram: Ram, hart_id: int = 0, interrupts: InterruptBlock | None = None
    ) -> None:
        self.ram = ram
        self.hart_id = hart_id
        self.interrupts = interrupts
        self._block = own_memory(-(-layout.STATE_SIZE // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._shared_block = own_memory(mmap.PAGESIZE)
        self.words = memoryview(self._block).cast("Q")
        self.shared = memoryview(self._shared_block).cast("Q")
        self._anchors = [ctypes.c_char.from_buffer(self._block)]
        self._anchors.append(ctypes.c_char.from_buffer(self._shared_block))
        self.address, self.shared_address = map(ctypes.addressof, self._anchors)
        self._lines = threading.Lock()
        if interrupts is not None:
            interrupts.join(hart_id, self.shared, self.shared_address)
        self.executor: object = None  # who ran it last
        self.reset(ram.base)

    def reset(self, pc: int) -> None:
        """As after power-on, about to execute the instruction at a physical address."""
        self.executor = None  # whoever runs it next forgets what it remembers
        for index in range(layout.STATE_SIZE // 8):
            self.words[index] = 0
        self[layout.PC] = pc
        self[layout.PRIVILEGE] = 3
        self[layout.HARTID] = self.hart_id
        self[layout.RAM_BASE] = self.ram.base
        self[layout.RAM_SIZE] = self.ram.size
        self[layout.RAM_HOST] = self.ram.host_address
        self[layout.SHARED] = self.shared_address
        self[layout.INTERRUPTS] = self.interrupts.address if self.interrupts is not None else 0
        self[layout.STIMECMP] = _NEVER
        self[layout.PMP_OPEN] = UNUSED
        self[layout.TRAP_RETIRED] = _NEVER
        self.shared[layout.SHARED_MTIMECMP] = _NEVER
        self.shared[layout.SHARED_SOFTWARE] = self.shared[layout.SHARED_ASLEEP] = 0

    # ------------------------------------------------------------------------------------- state

    def __getitem__(self, field: Field) -> int:
        return self.words[field.index]

    def __setitem__(self, field: Field, value: int) -> None:
        self.words[field.index] = value & _NEVER

    @property
    def pc(self) -> int:
        """Address of the next instruction."""
        return self[layout.PC]

    @pc.setter
    def pc(self, value: int) -> None:
        self[layout.PC] = value

    def x(self, number: int) -> int:
        """An integer register, 0 to 31."""
        return self.words[number]

    def set_x(self, number: int, value: int) -> None:
        """Set an integer register; x0 stays 0."""
        if number:
            self.words[number] = value & _NEVER

    def f(self, number: int) -> int:
        """The bits of a floating-point register, 0 to 31."""
        return self.words[layout.FLOATING + number]

    def set_f(self, number: int, value: int) -> None:
        """Set the bits of a floating-point register."""
        self.words[layout.FLOATING + number] = value & _NEVER

    @property
    def asleep_address(self) -> int:
        """The host's address of SHARED_ASLEEP."""
        return self.shared_address + 8 * layout.SHARED_ASLEEP

    @property
    def retired(self) -> int:
        """Instructions that retired since reset."""
        return self[layout.RETIRED]

    def architectural(self) -> dict[str, int]:
        """All that the guest can see of itself, by name."""
        registers = {f"x{number}": self.x(number) for number in range(1, 32)}
        registers |= {f"f{number}": self.f(number) for number in range(32)}
        return registers | {field.name: self[field] for field in layout.ARCHITECTURAL}

    # ------------------------------------------------------------------------------ from any thread

    def set_pending(self, bit: int, level: bool) -> None:
        """Raise or lower an interrupt line: a bit of mip (3 software, 7 timer, 9, 11 external)."""
        with self._lines:
            lines = self.shared[layout.SHARED_LINES]
            self.shared[layout.SHARED_LINES] = lines | 1 << bit if level else lines & ~(1 << bit)

    def set_timer_compare(self, ticks: int) -> None:
        """When the machine timer's interrupt is pending (mtimecmp), in ticks of `time`."""
        self.shared[layout.SHARED_MTIMECMP] = ticks & _NEVER

    def rouse(self) -> None:
        """Let its thread go on that waits on its word."""
        if self.shared[layout.SHARED_ASLEEP] == layout.ASLEEP_WAITS:
            self.shared[layout.SHARED_ASLEEP] = 0
            sleeping.wake(self.asleep_address)

    def request_exit(self) -> None:
        """Make `run` return soon with Reason.REQUEST, now or the next time."""
        self._request(layout.REQUEST_EXIT)

    def request_service(self) -> None:
        """Make native code return soon to its executor."""
        self._request(layout.REQUEST_SERVICE)

    def _request(self, bit: int) -> None:
        with self._lines:
            self.shared[layout.SHARED_REQUESTS] |= bit

    def clear_request(self) -> None:
        """The exit was noticed."""
        with self._lines:
            self.shared[layout.SHARED_REQUESTS] &= ~layout.REQUEST_EXIT

    def clear_service(self) -> bool:
        """The executor noticed; whether the host wants the hart back."""
        with self._lines:
            self.shared[layout.SHARED_REQUESTS] &= ~layout.REQUEST_SERVICE
            return self.shared[layout.SHARED_REQUESTS] != 0

    # ---------------------------------------------------------------------------------------- exits

    def exit(self) -> Exit:
        """How the last run ended."""
        reason = Reason(self[layout.REASON])
        if reason in (Reason.READ, Reason.WRITE):
            address, size = self[layout.EXIT_ADDRESS], self[layout.EXIT_SIZE]
            data = self[layout.EXIT_DATA] & mask(8 * size) if reason is Reason.WRITE else 0
            return Exit(reason, address, size, data)
        if reason is Reason.WATCHPOINT:
            where = self[layout.EXIT_ADDRESS], self[layout.EXIT_SIZE]
            return Exit(reason, *where, self[layout.EXIT_DATA])
        return Exit(reason)

    def complete_read(self, value: int) -> None:
        """Give the load that left with Reason.READ its datum."""
        size = self[layout.EXIT_SIZE]
        datum = Value(value & mask(8 * size), 64)
        extension = EXTENSIONS[self[layout.EXIT_EXTENSION]]
        self.words[self[layout.EXIT_REGISTER]] = extend(datum, size, extension).number
