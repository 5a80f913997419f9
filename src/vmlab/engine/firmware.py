"""The built-in supervisor binary interface (SBI 2.0): what S mode gets without any firmware file.

Base, TIME, IPI, RFENCE, HSM, SRST, DBCN and PMU, called when a hart leaves with an environment
call from S mode. The harts are reached through two small interfaces; nothing here knows how
instructions are executed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from vmlab.engine.memory.ram import BadAddress, Ram

SPECIFICATION: Final = 2 << 24
IMPLEMENTATION: Final = 0x766D_6C61
"""Not one of the registered numbers (SBI 2.0, table 8)."""
IMPLEMENTATION_VERSION: Final = 1

SUCCESS: Final = 0
FAILED: Final = -1
NOT_SUPPORTED: Final = -2
INVALID_PARAM: Final = -3
DENIED: Final = -4
INVALID_ADDRESS: Final = -5
ALREADY_AVAILABLE: Final = -6
ALREADY_STARTED: Final = -7
ALREADY_STOPPED: Final = -8

BASE: Final = 0x10
TIME: Final = 0x5449_4D45
IPI: Final = 0x73_5049
RFENCE: Final = 0x5246_4E43
HSM: Final = 0x48_534D
SRST: Final = 0x5352_5354
DBCN: Final = 0x4442_434E
PMU: Final = 0x50_4D55

NAMES: Final = {
    BASE: "base",
    TIME: "time",
    IPI: "ipi",
    RFENCE: "rfence",
    HSM: "hsm",
    SRST: "srst",
    DBCN: "dbcn",
    PMU: "pmu",
}
"""Of the extensions."""

_WORD: Final = (1 << 64) - 1
_SSIP: Final = 1

_MCOUNTINHIBIT: Final = 0x320
_STIMECMP: Final = 0x14D
_MVENDORID: Final = 0xF11
_CYCLE: Final = 0
_INSTRET: Final = 2
_MCYCLE: Final = 0xB00
_USER_CYCLE: Final = 0xC00

STARTED: Final = 0
STOPPED: Final = 1
SUSPENDED: Final = 4

SetupCsr = tuple[int, int]
SUPERVISOR_SETUP: Final[tuple[SetupCsr, ...]] = (
    (0x3B0, (1 << 54) - 1),  # pmpaddr0: all of physical memory ...
    (0x3A0, 0x1F),  # pmpcfg0: ... NAPOT, readable, writable, executable
    (0x302, 0xB1FF),  # medeleg: all exceptions but calls from S mode; nobody handles them in M
    (0x303, 0x222),  # mideleg: SSI, STI, SEI
    (0x306, 0x7),  # mcounteren: cycle, time, instret
    (0x30A, 1 << 63 | 0xF0),  # menvcfg: Sstc, and cache-block instructions below M
)
"""Machine-level registers as firmware leaves them for S mode; (CSR number, value)."""

Fence = Literal["fence.i", "sfence.vma"]


class Hart(Protocol):
    """A hart that has called."""

    @property
    def hart_id(self) -> int:
        """Its number."""

    def x(self, number: int) -> int:
        """An integer register, 0 to 2^64-1."""

    def set_x(self, number: int, value: int) -> None:
        """Set an integer register."""

    def read_csr(self, number: int) -> int:
        """A control and status register, as M mode reads it."""

    def write_csr(self, number: int, value: int) -> None:
        """Set a control and status register, as M mode does."""


class Harts(Protocol):
    """All harts of the machine. Called on the thread of the hart that has called."""

    def __len__(self) -> int:
        """How many there are; their numbers are 0 and up."""

    def set_pending(self, hart: int, bit: int, level: bool) -> None:
        """Set or clear a bit of `mip`."""

    def tell_calls(self, every: bool) -> None:
        """Whether every call is to come here: harts may send interrupts themselves otherwise."""

    def start(self, hart: int, address: int, opaque: int) -> None:
        """Let a stopped hart begin in S mode: pc, a0 its number, a1 opaque, satp and SIE zero."""

    def stop(self, hart: int) -> None:
        """The calling hart executes nothing until it is started."""

    def wait(self, hart: int) -> None:
        """The calling hart sleeps until an interrupt is pending that it has enabled, as in WFI."""

    def suspend(self, hart: int, address: int, opaque: int) -> None:
        """`wait`, after which the hart goes on as one that was started; its interrupts stay."""

    def is_suspended(self, hart: int) -> bool:
        """Whether a hart sleeps because of `wait` or `suspend`."""

    def fence(
        self, harts: list[int], fence: Fence, start: int, size: int, asid: int | None
    ) -> None:
        """Have these harts fence, and return when they have.

        Args:
            harts: Their numbers.
            fence: "fence.i"; or "sfence.vma", for `size` bytes from `start` on.
            start: Virtual address.
            size: Bytes; 2^64-1 for everything.
            asid: One address space, or None for all.
        """


@dataclass
class CounterState:
    """A performance counter of one hart."""

    event: int | None = None
    """The event that it is configured for (firmware counters), or None."""
    running: bool = False
    value: int = 0


@dataclass
class FirmwareState:
    """Everything that a snapshot must hold. Lists are by hart."""

    harts: int
    status: list[int] = field(default_factory=list)
    counters: list[list[CounterState]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.status = self.status or [STOPPED] * self.harts
        self.counters = self.counters or [
            [CounterState() for _ in range(COUNTERS)] for _ in range(self.harts)
        ]


HARDWARE_COUNTERS: Final = (_CYCLE, _INSTRET)
"""Which CSR counter (0xc00 + n) the first counters of the PMU extension are."""
FIRMWARE_COUNTERS: Final = 8
COUNTERS: Final = len(HARDWARE_COUNTERS) + FIRMWARE_COUNTERS

_HARDWARE_EVENTS: Final = {1: 0, 2: 1}
"""General hardware events: CPU cycles and instructions, and the counters that count them."""
_FIRMWARE_TYPE: Final = 15
_FIRMWARE_EVENTS: Final = 22
EVENT_SET_TIMER: Final = 5
EVENT_IPI_SENT: Final = 6
EVENT_IPI_RECEIVED: Final = 7
EVENT_FENCE_I_SENT: Final = 8
EVENT_FENCE_I_RECEIVED: Final = 9
EVENT_SFENCE_SENT: Final = 10
EVENT_SFENCE_RECEIVED: Final = 11
EVENT_SFENCE_ASID_SENT: Final = 12
EVENT_SFENCE_ASID_RECEIVED: Final = 13

Result = tuple[int, int]
"""(error, value): registers a0 and a1. None instead: the call does not return."""
Arguments = tuple[int, int, int, int, int, int]


class Firmware:
    """The interface that S mode calls.

    Args:
        ram: The guest's memory, for the debug console.
        harts: All harts.
        end: Called with "poweroff" or "reboot" and the reason (0 none, 1 a failure).
        console_write: Takes bytes of the debug console; how many were taken.
        console_read: Up to so many bytes that were typed at the debug console.
    """

    def __init__(
        self,
        ram: Ram,
        harts: Harts,
        end: Callable[[Literal["poweroff", "reboot"], int], None],
        console_write: Callable[[bytes], int] = len,
        console_read: Callable[[int], bytes] = lambda size: b"",
    ) -> None:
        self.state = FirmwareState(len(harts))
        self._starting = threading.Lock()
        """Harts are threads, and two may start the same one at once."""
        self._ram = ram
        self._harts = harts
        self._end = end
        self._console_write = console_write
        self._console_read = console_read
        self._extensions: dict[int, Callable[[Hart, int, Arguments], Result | None]] = {
            BASE: self._base,
            TIME: self._time,
            IPI: self._ipi,
            RFENCE: self._rfence,
            HSM: self._hsm,
            SRST: self._srst,
            DBCN: self._dbcn,
            PMU: self._pmu,
        }

    def boot(self, hart: Hart, entry: int, device_tree: int) -> None:
        """Begin: `hart` at `entry` in S mode, all others stopped."""
        self.state = FirmwareState(len(self._harts))
        self._harts.tell_calls(False)
        self.state.status[hart.hart_id] = STARTED
        self._harts.start(hart.hart_id, entry, device_tree)

    def call(self, hart: Hart) -> None:
        """Answer the call that `hart` has left with: a7 the extension, a6 the function.

        a0 and a1 are set unless the call does not return; all else stays as it is.
        """
        x = hart.x
        arguments = (x(10), x(11), x(12), x(13), x(14), x(15))
        extension = self._extensions.get(x(17) & 0xFFFF_FFFF)
        result: Result | None = (NOT_SUPPORTED, 0)
        if extension is not None:
            result = extension(hart, x(16) & 0xFFFF_FFFF, arguments)
        if result is not None:
            hart.set_x(10, result[0] & _WORD)
            hart.set_x(11, result[1] & _WORD)

    # ------------------------------------------------------------------------ small extensions

    def _base(self, hart: Hart, function: int, arguments: Arguments) -> Result:
        if function == 0:
            return SUCCESS, SPECIFICATION
        if function == 1:
            return SUCCESS, IMPLEMENTATION
        if function == 2:
            return SUCCESS, IMPLEMENTATION_VERSION
        if function == 3:
            return SUCCESS, int(arguments[0] in self._extensions)
        if function in {4, 5, 6}:  # mvendorid, marchid, mimpid
            return SUCCESS, hart.read_csr(_MVENDORID + function - 4)
        return NOT_SUPPORTED, 0

    def _time(self, hart: Hart, function: int, arguments: Arguments) -> Result:
        if function != 0:
            return NOT_SUPPORTED, 0
        hart.write_csr(_STIMECMP, arguments[0])
        self._happened(hart.hart_id, EVENT_SET_TIMER)
        return SUCCESS, 0

    def _ipi(self, hart: Hart, function: int, arguments: Arguments) -> Result:
        if function != 0:
            return NOT_SUPPORTED, 0
        targets = self._targets(arguments[0], arguments[1])
        if targets is None:
            return INVALID_PARAM, 0
        for target in targets:
            self._harts.set_pending(target, _SSIP, True)
            self._happened(target, EVENT_IPI_RECEIVED)
        self._happened(hart.hart_id, EVENT_IPI_SENT)
        return SUCCESS, 0

    def _targets(self, mask: int, base: int) -> list[int] | None:
        """The harts that a mask from `base` on names (3.1); None if one of them is none."""
        if base == _WORD:
            return [n for n in range(len(self._harts)) if self.state.status[n] != STOPPED]
        chosen = [base + bit for bit in range(64) if mask >> bit & 1]
        return chosen if all(hart < len(self._harts) for hart in chosen) else None

    def _rfence(self, hart: Hart, function: int, arguments: Arguments) -> Result:
        mask, base, start, size, asid = arguments[:5]
        if function > 2:
            return NOT_SUPPORTED, 0  # 3 to 6 are for hypervisors
        targets = self._targets(mask, base)
        if targets is None:
            return INVALID_PARAM, 0
        if size == 0:
            size = _WORD  # chapter 8: start and size 0 are everything
        sent = EVENT_FENCE_I_SENT + 2 * function
        self._happened(hart.hart_id, sent)
        for target in targets:
            self._happened(target, sent + 1)
        targets = [target for target in targets if self.state.status[target] != STOPPED]
        if function == 0:
            self._harts.fence(targets, "fence.i", 0, _WORD, None)
        else:
            which = asid & 0xFFFF if function == 2 else None
            self._harts.fence(targets, "sfence.vma", start, size, which)
        return SUCCESS, 0

    def _hsm(self, hart: Hart, function: int, arguments: Arguments) -> Result | None:
        first, address, opaque = arguments[:3]
        status = self.state.status
        if function == 0:
            if first >= len(self._harts):
                return INVALID_PARAM, 0
            if not self._executable(address):
                return INVALID_ADDRESS, 0
            with self._starting:
                if status[first] != STOPPED:
                    return ALREADY_AVAILABLE, 0
                status[first] = STARTED
            self._harts.start(first, address, opaque)
            return SUCCESS, 0
        if function == 1:
            self._harts.stop(hart.hart_id)
            status[hart.hart_id] = STOPPED  # last: from now on another hart may start it
            return None
        if function == 2:
            if first >= len(self._harts):
                return INVALID_PARAM, 0
            suspended = status[first] == STARTED and self._harts.is_suspended(first)
            return SUCCESS, SUSPENDED if suspended else status[first]
        if function == 3:
            return self._suspend(hart, first & 0xFFFF_FFFF, address, opaque)
        return NOT_SUPPORTED, 0

    def _suspend(self, hart: Hart, kind: int, address: int, opaque: int) -> Result | None:
        if kind == 0:  # default retentive: it returns when something wakes it
            self._harts.wait(hart.hart_id)
            return SUCCESS, 0
        if kind == 0x8000_0000:  # default non-retentive: it begins anew at `address`
            if not self._executable(address):
                return INVALID_ADDRESS, 0
            self._harts.suspend(hart.hart_id, address, opaque)
            return None
        known = kind < 0x1000_0000 or 0x8000_0000 <= kind < 0x9000_0000
        return (INVALID_PARAM if known else NOT_SUPPORTED), 0

    def _executable(self, address: int) -> bool:
        return address % 2 == 0 and self._ram.contains(address, 2)

    def _srst(self, hart: Hart, function: int, arguments: Arguments) -> Result | None:
        if function != 0:
            return NOT_SUPPORTED, 0
        kind, reason = arguments[0] & 0xFFFF_FFFF, arguments[1] & 0xFFFF_FFFF
        if kind > 2 or reason > 1:
            vendor = kind >= 0xF000_0000 or reason >= 0xE000_0000
            return (NOT_SUPPORTED if vendor else INVALID_PARAM), 0
        self._end("poweroff" if kind == 0 else "reboot", reason)
        return None

    def _dbcn(self, hart: Hart, function: int, arguments: Arguments) -> Result:
        size, low, high = arguments[:3]
        if function == 2:
            taken = self._console_write(bytes((arguments[0] & 0xFF,)))
            return (SUCCESS if taken else FAILED), 0
        if function > 2:
            return NOT_SUPPORTED, 0
        if high or not self._ram.contains(low, size):
            return INVALID_PARAM, 0
        if function == 0:
            # As much as is wanted, but no more than a piece: the caller loops (chapter 12.1).
            return SUCCESS, self._console_write(self._ram.read(low, min(size, 65536)))
        data = self._console_read(min(size, 65536))
        try:
            self._ram.write(low, data[:size])
        except BadAddress:
            return INVALID_PARAM, 0
        return SUCCESS, len(data[:size])

    # -------------------------------------------------------------------------------------- PMU

    def _happened(self, hart: int, event: int) -> None:
        """Count a firmware event on a hart."""
        for counter in self.state.counters[hart][len(HARDWARE_COUNTERS) :]:
            if counter.running and counter.event == event:
                counter.value = (counter.value + 1) & _WORD

    def _pmu(self, hart: Hart, function: int, arguments: Arguments) -> Result:
        if function == 0:
            return SUCCESS, COUNTERS
        if function == 1:
            return self._counter_info(arguments[0])
        if function == 2:
            return self._configure(hart, arguments)
        if function in {3, 4}:
            return self._start_stop(hart, arguments, start=function == 3)
        if function in {5, 6}:
            index = arguments[0]
            if not len(HARDWARE_COUNTERS) <= index < COUNTERS:
                return INVALID_PARAM, 0
            counter = self.state.counters[hart.hart_id][index]
            if counter.event is None:
                return INVALID_PARAM, 0
            return SUCCESS, counter.value if function == 5 else 0  # 64 bits need no upper half
        return NOT_SUPPORTED, 0

    def _counter_info(self, index: int) -> Result:
        if index < len(HARDWARE_COUNTERS):
            return SUCCESS, (_USER_CYCLE + HARDWARE_COUNTERS[index]) | 63 << 12
        if index < COUNTERS:
            return SUCCESS, 1 << 63
        return INVALID_PARAM, 0

    def _selected(self, base: int, mask: int) -> list[int] | None:
        chosen = [base + bit for bit in range(64) if mask >> bit & 1]
        if not chosen or chosen[-1] >= COUNTERS:
            return None
        return chosen

    def _configure(self, hart: Hart, arguments: Arguments) -> Result:
        base, mask, flags, event, _ = arguments[:5]
        chosen = self._selected(base, mask)
        if chosen is None:
            return INVALID_PARAM, 0
        counters = self.state.counters[hart.hart_id]
        code, kind = event & 0xFFFF, (event >> 16) & 0xF
        if flags & 1:  # SKIP_MATCH: the one that was configured before
            found = next((n for n in chosen if counters[n].event is not None), None)
            if found is None:
                return INVALID_PARAM, 0
        elif event >> 20:
            return INVALID_PARAM, 0
        else:
            found = self._matching(counters, chosen, kind, code)
            if found is None:
                return NOT_SUPPORTED, 0
            counters[found].event = code
        if flags & 2:  # CLEAR_VALUE
            self._set_counter(hart, found, 0)
        if flags & 4:  # AUTO_START
            self._run(hart, found, running=True)
        return SUCCESS, found

    def _matching(
        self, counters: list[CounterState], chosen: list[int], kind: int, code: int
    ) -> int | None:
        if kind == 0 and code in _HARDWARE_EVENTS:
            wanted = _HARDWARE_EVENTS[code]
            return wanted if wanted in chosen else None
        if kind == _FIRMWARE_TYPE and code < _FIRMWARE_EVENTS:
            free = [n for n in chosen if n >= len(HARDWARE_COUNTERS) and not counters[n].running]
            return free[0] if free else None
        return None

    def _start_stop(self, hart: Hart, arguments: Arguments, *, start: bool) -> Result:
        base, mask, flags, initial = arguments[:4]
        chosen = self._selected(base, mask)
        counters = self.state.counters[hart.hart_id]
        if chosen is None or any(counters[n].event is None for n in chosen):
            return INVALID_PARAM, 0
        error = SUCCESS
        for number in chosen:
            if counters[number].running == start:
                error = ALREADY_STARTED if start else ALREADY_STOPPED
                continue
            if start and flags & 1:  # SET_INIT_VALUE
                self._set_counter(hart, number, initial)
            self._run(hart, number, running=start)
        if not start and flags & 1:  # RESET: forget the event
            for number in chosen:
                counters[number].event = None
        return error, 0

    def _run(self, hart: Hart, number: int, *, running: bool) -> None:
        self.state.counters[hart.hart_id][number].running = running
        self._harts.tell_calls(
            any(
                counter.running
                for counters in self.state.counters
                for counter in counters[len(HARDWARE_COUNTERS) :]
            )
        )
        if number < len(HARDWARE_COUNTERS):
            bit = 1 << HARDWARE_COUNTERS[number]
            inhibited = hart.read_csr(_MCOUNTINHIBIT)
            hart.write_csr(_MCOUNTINHIBIT, inhibited & ~bit if running else inhibited | bit)

    def _set_counter(self, hart: Hart, number: int, value: int) -> None:
        if number < len(HARDWARE_COUNTERS):
            hart.write_csr(_MCYCLE + HARDWARE_COUNTERS[number], value)
        else:
            self.state.counters[hart.hart_id][number].value = value
