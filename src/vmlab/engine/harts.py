"""The harts of a machine at work: threads let them run and do what they leave for.

A hart leaves native code for devices, for firmware, to sleep, and when it is asked to. All harts
can be brought to stand (`pause`), and their threads be joined (`join`): then nothing of them is on
any native stack, and the process may fork.

Whether harts have a thread each (vmlab.engine.parallel_harts) or take turns on one
(vmlab.engine.sequential_harts) is not known here.
"""

from __future__ import annotations

import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from vmlab.engine.accel.lockstep import Executor
from vmlab.engine.accel.reference import ReferenceCore
from vmlab.engine.accel.stopping import Points
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.csr import read_csr, write_csr
from vmlab.engine.cpu.exits import Exit, Reason
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.cpu.interrupts import TOLD, controlled_lines
from vmlab.engine.cpu.traps import instruction_bits, take_trap
from vmlab.engine.devices.bus import Bus, BusFault
from vmlab.engine.devices.clock import Clock
from vmlab.engine.firmware import SUPERVISOR_SETUP, Fence
from vmlab.engine.isa.cpu import Cause
from vmlab.engine.isa.values import Value

TRACER: Final = "tracer"
"""The owner of the breakpoints at which traces begin; nobody is told of them."""
_FUNCTION, _EXTENSION = 16, 17  # registers that name a call of firmware (SBI 2.0, 3)
_SUPERVISOR: Final = 1
_MACHINE: Final = 3
_SIE: Final = 1 << 1
_SSIP: Final = 1
_STIP: Final = 1 << 5
_MTIP: Final = 1 << 7
_STCE: Final = 1 << 63
NEVER: Final = layout.WORD
"""A tick that never comes."""


class CallingHart:
    """A hart as firmware sees it: registers, and M mode's view of its CSRs."""

    def __init__(self, hart: Hart) -> None:
        self._hart = hart
        self._core = ReferenceCore(hart)

    @property
    def hart_id(self) -> int:
        """Its number."""
        return self._hart.hart_id

    def x(self, number: int) -> int:
        """An integer register."""
        return self._hart.x(number)

    def set_x(self, number: int, value: int) -> None:
        """Set an integer register."""
        self._hart.set_x(number, value)

    def read_csr(self, number: int) -> int:
        """A control and status register."""
        with self._as_machine():
            return read_csr(self._core, Value(number), Value(0)).number

    def write_csr(self, number: int, value: int) -> None:
        """Set a control and status register."""
        with self._as_machine():
            write_csr(self._core, Value(number), Value(value))

    @contextmanager
    def _as_machine(self) -> Iterator[None]:
        privilege = self._hart[layout.PRIVILEGE]
        self._hart[layout.PRIVILEGE] = _MACHINE
        try:
            yield
        finally:
            self._hart[layout.PRIVILEGE] = privilege


class Tracer(Protocol):
    """Writes down what a hart executes."""

    @property
    def tracing(self) -> bool:
        """Whether it has begun, and not ended."""

    def met(self, address: int) -> None:
        """The hart has come to a breakpoint."""

    def step(self, executor: Executor, *, masked: bool) -> Exit:
        """Execute one instruction, or take one trap."""


class Order(Enum):
    """What a debugger wants of a hart when the machine runs."""

    RUN = "run"
    STEP = "step"
    """Execute one instruction, then all harts stand."""
    HOLD = "hold"


@dataclass(frozen=True)
class Stop:
    """Why a hart has brought all of them to stand.

    Attributes:
        hart: Its number.
        exit: BREAKPOINT, WATCHPOINT, or BUDGET after a step.
    """

    hart: int
    exit: Exit


class Seat:
    """A hart, who executes it, and what it waits for."""

    def __init__(self, hart: Hart, executor: Executor, lock: threading.RLock) -> None:
        self.hart = hart
        self.executor = executor
        self.caller = CallingHart(hart)
        self.stopped = True  # by firmware: it executes nothing until it is started
        self.suspended = False  # by firmware, until it wakes
        self.exits: dict[Reason, int] = dict.fromkeys(Reason, 0)
        self.accesses: dict[int, int] = {}  # of devices, by page of their addresses
        self.calls: dict[tuple[int, int], int] = {}  # of firmware, by extension and function
        # For a debugger:
        self.tracer: Tracer | None = None
        self.order = Order.RUN
        self.stopped_at: int | None = None  # the breakpoint that it was told of last
        # Where harts take turns:
        self.waiting = False  # for an interrupt
        # Where each has a thread:
        self.woken = threading.Condition(lock)
        self.parked = True
        self.thread: threading.Thread | None = None


class Harts(ABC):
    """The harts of one machine.

    Args:
        harts: All of them, numbered from 0.
        executors: Who executes each.
        clock: The machine's time.
        bus: Answers what is not RAM.
        failed: Called when a hart cannot go on, with the reason; the machine is to be ended.
    """

    def __init__(
        self,
        harts: list[Hart],
        executors: list[Executor],
        clock: Clock,
        bus: Bus,
        failed: Callable[[str], None],
    ) -> None:
        self._lock = threading.RLock()
        self._all_parked = threading.Condition(self._lock)
        self._seats = [
            Seat(hart, executor, self._lock)
            for hart, executor in zip(harts, executors, strict=True)
        ]
        self._time = clock
        self._bus = bus
        self._failed = failed
        self._paused = True
        self._leaving = False
        self.call: Callable[[CallingHart], None] | None = None
        self.halted: Callable[[Stop], None] = lambda stop: None
        self._points: dict[str, Points] = {}

    def __len__(self) -> int:
        return len(self._seats)

    def __iter__(self) -> Iterator[Hart]:
        return iter(seat.hart for seat in self._seats)

    @property
    def first(self) -> CallingHart:
        """The hart that a machine begins with, as firmware sees it."""
        return self._seats[0].caller

    @abstractmethod
    def thread_ids(self) -> list[int]:
        """The host's threads that the harts run on, 0 for a hart without one."""

    def translations(self, hart: int) -> tuple[int, int, int]:
        """How often a hart walked page tables, filled its TLB and flushed it."""
        state = self._seats[hart].hart
        return state[layout.WALKS], state[layout.FILLS], state[layout.FLUSHES]

    def exits(self, hart: int) -> dict[str, int]:
        """How often a hart left native code, by reason."""
        return {reason.name.lower(): count for reason, count in self._seats[hart].exits.items()}

    # -------------------------------------------------------------------------- for a debugger

    def stop_at(self, points: Points, owner: str = "") -> None:
        """Stop at these points, and those of other owners, from now on.

        Raises:
            VmlabError: together these are more watchpoints than a hart has.
        """
        wanted = {**self._points, owner: points}
        every = Points(
            frozenset().union(*(one.breakpoints for one in wanted.values())),
            frozenset().union(*(one.watchpoints for one in wanted.values())),
        )
        self._points = wanted
        for seat in self._seats:
            seat.executor.stop_at(every)

    def order(self, orders: Mapping[int, Order]) -> None:
        """What harts do when they are resumed; those that are not named run."""
        for number, seat in enumerate(self._seats):
            seat.order = orders.get(number, Order.RUN)
            seat.waiting = seat.waiting and seat.order is Order.RUN

    def stall(self, hart: int, on: bool) -> None:
        """Have a hart execute nothing when the harts are resumed, or run again; they stand now."""
        seat = self._seats[hart]
        seat.order = Order.HOLD if on else Order.RUN
        seat.waiting = seat.waiting and not on

    def meet_again(self, stop: Stop) -> bool:
        """Have a hart stop once more where it stands; False if that is behind it."""
        self._seats[stop.hart].stopped_at = None
        return stop.exit.reason is Reason.BREAKPOINT

    def trace(self, hart: int, tracer: Tracer | None) -> None:
        """Have a hart's instructions written down from now on; the harts stand."""
        self._seats[hart].tracer = tracer

    def executor(self, hart: int) -> Executor:
        """Who executes a hart."""
        return self._seats[hart].executor

    def accesses(self, hart: int) -> dict[int, int]:
        """How often a hart accessed devices, by the pages of their addresses."""
        return dict(self._seats[hart].accesses)

    def calls(self, hart: int) -> dict[tuple[int, int], int]:
        """How often a hart left for a call of firmware, by extension and function."""
        return dict(self._seats[hart].calls)

    def is_started(self, hart: int) -> bool:
        """Whether firmware has started it."""
        return not self._seats[hart].stopped

    # ------------------------------------------------------------------------ from any thread

    def set_pending(self, hart: int, bit: int, level: bool) -> None:
        """Raise or lower an interrupt line of a hart: a bit of `mip`."""
        seat = self._seats[hart]
        if bit == _SSIP:
            # Not a line: it is set once, and it is the guest that clears it.
            seat.hart.shared[layout.SHARED_SOFTWARE] = int(level)
        else:
            seat.hart.set_pending(bit, level)
        if level:
            self._wake(seat)

    def line_changed(self, hart: int, bit: int, level: bool) -> None:
        """A line changed that a hart finds out the level of by itself."""
        if level:
            self._wake(self._seats[hart])

    def tell_calls(self, every: bool) -> None:
        """Whether every call of firmware is to be told, or only what harts do not do themselves."""
        for seat in self._seats:
            if seat.hart.interrupts is not None:
                seat.hart.interrupts.words[TOLD] = int(every)

    def set_compare(self, hart: int, ticks: int) -> None:
        """Set a hart's `mtimecmp`."""
        seat = self._seats[hart]
        seat.hart.set_timer_compare(ticks)
        self._wake(seat)

    @abstractmethod
    def _wake(self, seat: Seat) -> None:
        """What a hart may wait for has changed."""

    @abstractmethod
    def ask_to_pause(self) -> None:
        """Let all harts stand soon, the calling one before its next instruction."""

    @abstractmethod
    def pause(self) -> None:
        """Bring all harts to stand between two instructions; on return they do.

        Not for a hart's own thread.
        """

    @abstractmethod
    def resume(self) -> None:
        """Let the harts run."""

    @abstractmethod
    def join(self) -> None:
        """Pause, and end the harts' threads; `resume` makes new ones."""

    def reset(self) -> None:
        """All harts as after power-on, stopped; they stand still meanwhile."""
        for seat in self._seats:
            seat.stopped = True
            self._prepare(seat, seat.hart.ram.base)

    def _prepare(self, seat: Seat, pc: int) -> None:
        hart = seat.hart
        seat.waiting = seat.suspended = False
        offset = hart[layout.TIME_OFFSET]
        hart.reset(pc)
        hart[layout.TIME_OFFSET] = offset
        hart.executor = None  # whoever runs it next forgets what it remembered

    def start_machine_mode(self, entry: int, device_tree: int, info: int) -> None:
        """Let all harts begin in M mode: a0 their number, a1 and a2 the two addresses."""
        for seat in self._seats:
            self._prepare(seat, entry)
            seat.hart.set_x(10, seat.hart.hart_id)
            seat.hart.set_x(11, device_tree)
            seat.hart.set_x(12, info)
            seat.stopped = False

    # ------------------------------------------------- for firmware, on the thread that has called

    def start(self, hart: int, address: int, opaque: int) -> None:
        """Let a stopped hart begin in S mode: a0 its number, a1 opaque."""
        seat = self._seats[hart]
        with self._lock:
            self._prepare(seat, address)
            for number, value in SUPERVISOR_SETUP:
                seat.caller.write_csr(number, value)
            seat.hart[layout.PRIVILEGE] = _SUPERVISOR
            seat.hart[layout.FIRMWARE_CALLS] = 1
            seat.hart.set_x(10, hart)
            seat.hart.set_x(11, opaque)
            seat.stopped = False
            self._wake(seat)

    def stop(self, hart: int) -> None:
        """The calling hart executes nothing until it is started."""
        self._seats[hart].stopped = True

    def wait(self, hart: int) -> None:
        """The calling hart sleeps until an interrupt is pending that it has enabled."""
        seat = self._seats[hart]
        seat.suspended = True
        self._sleep(seat)

    def suspend(self, hart: int, address: int, opaque: int) -> None:
        """The calling hart sleeps as in `wait`, and goes on like one that was started.

        What it has enabled, its timer and what is pending are what it wakes by: they stay.
        """
        seat = self._seats[hart]
        seat.hart.pc = address
        seat.hart[layout.SATP] = 0
        seat.hart[layout.MSTATUS] &= ~_SIE
        seat.hart.set_x(10, hart)
        seat.hart.set_x(11, opaque)
        seat.suspended = True
        self._sleep(seat)

    def is_suspended(self, hart: int) -> bool:
        """Whether a hart sleeps because of `wait` or `suspend`."""
        return self._seats[hart].suspended

    @abstractmethod
    def _sleep(self, seat: Seat) -> None:
        """Wait for an interrupt that is enabled."""

    def fence(
        self, harts: list[int], fence: Fence, start: int, size: int, asid: int | None
    ) -> None:
        """Have harts fence. Stores to code are seen by all harts anyway, so fence.i is nothing."""
        if fence == "fence.i":
            return
        for number in harts:
            executor = self._seats[number].executor
            if hasattr(executor, "fence"):  # it remembers translations
                executor.fence()

    # ------------------------------------------------------------- on the thread that runs a hart

    def _execute(self, seat: Seat, budget: int) -> Exit:
        """Let a hart run for so many instructions, or a step where a debugger wants that."""
        hart, executor = seat.hart, seat.executor
        stopped_at, seat.stopped_at = seat.stopped_at, None
        tracer = seat.tracer if seat.tracer is not None and seat.tracer.tracing else None
        stepped = seat.order is Order.STEP
        if not stepped and stopped_at != hart.pc:
            if tracer is None:
                return executor.run(budget)
            if self._is_breakpoint(hart.pc):
                return Exit(Reason.BREAKPOINT)
        before = hart.retired, hart.pc
        if tracer is not None:
            left = tracer.step(executor, masked=stepped)
        else:
            left = executor.step(masked=True)
        if before == (hart.retired, hart.pc):
            seat.stopped_at = stopped_at  # it was asked for something first
        elif stepped and left.reason is not Reason.WATCHPOINT:
            seat.order = Order.HOLD
            self._halt(seat, Exit(Reason.BUDGET))
        return left

    def _is_breakpoint(self, address: int) -> bool:
        """Whether somebody else than a tracer has a breakpoint there."""
        return any(
            address in points.breakpoints
            for owner, points in self._points.items()
            if owner != TRACER
        )

    def _halt(self, seat: Seat, why: Exit) -> None:
        """Bring all harts to stand, and tell the debugger."""
        self.ask_to_pause()
        self.halted(Stop(seat.hart.hart_id, why))

    def _handle(self, seat: Seat, left: Exit) -> None:
        """Do what a hart has left for."""
        hart = seat.hart
        seat.exits[left.reason] += 1
        if left.reason in (Reason.READ, Reason.WRITE):
            page = left.address & -4096
            seat.accesses[page] = seat.accesses.get(page, 0) + 1
        match left.reason:
            case Reason.READ:
                try:
                    hart.complete_read(self._bus.read(left.address, left.size))
                except BusFault:
                    self._refuse(seat, Cause.LOAD_ACCESS)
            case Reason.WRITE:
                try:
                    self._bus.write(left.address, left.size, left.data)
                except BusFault:
                    self._refuse(seat, Cause.STORE_ACCESS)
            case Reason.FIRMWARE_CALL:
                assert self.call is not None, "a machine without firmware has no firmware calls"
                called = hart.x(_EXTENSION), hart.x(_FUNCTION)
                seat.calls[called] = seat.calls.get(called, 0) + 1
                self.call(seat.caller)
            case Reason.WAIT:
                self._sleep(seat)
            case Reason.BREAKPOINT:
                seat.stopped_at = hart.pc
                if seat.tracer is not None:
                    seat.tracer.met(hart.pc)
                if self._is_breakpoint(hart.pc):
                    self._halt(seat, left)
            case Reason.WATCHPOINT:
                self._halt(seat, left)
            case Reason.REQUEST:
                hart.clear_request()
            case Reason.BUDGET:
                return
            case Reason.TRAP_LOOP:
                cause, where = hart[layout.SCAUSE], hart[layout.SEPC]
                if hart[layout.PRIVILEGE] == _MACHINE:
                    cause, where = hart[layout.MCAUSE], hart[layout.MEPC]
                self._fail(
                    seat,
                    f"hart {hart.hart_id} traps without end at {where:#x}, cause {cause:#x}: "
                    "it retires no instruction any more",
                )
            case other:
                raise AssertionError(f"{other.name} is not for whoever runs a hart")

    def _fail(self, seat: Seat, reason: str) -> None:
        with self._lock:
            seat.stopped = True
        self._failed(reason)

    def _mistaken(self, seat: Seat, error: Exception) -> None:
        """A mistake of vmlab's own: the hart must not go on, and somebody has to know.

        Its thread stays, so that it can be brought to stand and joined like any other.
        """
        traceback.print_exception(error)
        self._fail(seat, f"internal error: {type(error).__name__}: {error}")

    def _refuse(self, seat: Seat, cause: Cause) -> None:
        """Nothing answers at an address: an access fault, as if nothing had retired."""
        from vmlab.engine.isa.riscv64 import RISCV64

        hart, core = seat.hart, seat.caller._core
        pc = Value(hart[layout.EXIT_PC], 64)
        hart[layout.RETIRED] -= 1
        # Where it wanted to: the registers that said so are still as they were.
        decoded = RISCV64.decode(instruction_bits(core, pc).number)
        address = hart.x(decoded.rs1) + decoded.imm if decoded is not None else 0
        hart.pc = take_trap(core, Value(cause.value), Value(address, 64), pc).number

    def _pending(self, hart: Hart) -> tuple[int, int | None]:
        """The bits of `mip`, and the tick at which a timer may set another (None: none will)."""
        pending = hart[layout.MIP] | hart.shared[layout.SHARED_LINES]
        pending |= hart.shared[layout.SHARED_SOFTWARE] << _SSIP
        pending |= controlled_lines(ReferenceCore(hart)).number
        now = self._time.ticks()
        moments = [(_MTIP, hart.shared[layout.SHARED_MTIMECMP])]
        if hart[layout.MENVCFG] & _STCE:
            moments.append((_STIP, hart[layout.STIMECMP]))
        ahead = []
        for bit, moment in moments:
            if now >= moment:
                pending |= bit
            elif moment != NEVER and hart[layout.MIE] & bit:
                ahead.append(moment)
        return pending, min(ahead) if ahead else None
