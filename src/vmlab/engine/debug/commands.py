"""What a monitor tells of how a guest is executed, and the commands for traces.

The names begin with `x-`: QEMU has no such commands.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmlab.engine.accel.interpreter import InterpreterExecutor
from vmlab.engine.accel.stopping import NO_POINTS, Points
from vmlab.engine.control import Control
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.cpu.mmu import MPRV, MXR, SUM
from vmlab.engine.debug.kallsyms import SymbolTable, symbols_in
from vmlab.engine.firmware import NAMES
from vmlab.engine.harts import TRACER
from vmlab.engine.monitor.commands import CommandError
from vmlab.engine.monitor.server import Place
from vmlab.engine.qapi import ExitCount
from vmlab.machine.errors import VmlabError

if TYPE_CHECKING:
    from vmlab.engine.debug.tracer import FileTracer

_ASID: Final = 44
_USED: Final = 1 << 63


@dataclass(frozen=True)
class TlbSet:
    """A set of the TLB: the translations of one address space for one way of accessing it.

    Attributes:
        set: Its number.
        satp: Of the address space that it is for now; 0 where nothing is translated.
        asid: The address space's number, out of satp.
        privilege: As whom memory is accessed: 0 (U), 1 (S) or 3 (M).
        sum: Whether S mode may access pages of U mode.
        mxr: Whether what is executable may be read.
        mprv: Whether loads and stores are of another privilege.
        current: Whether it is in use at this moment.
        read_misses: Loads that were translated in full; also misaligned ones, and of devices.
        write_misses: The same of stores and atomics.
        code_misses: Pages of code that were looked up in full.
        read_hits: Loads that were not; left out where hits are not counted.
        write_hits: The same of stores and atomics.
        code_hits: Jumps to another page whose code was known.
        fills: Data translations that came in.
        flushes: Of the whole set.
        partial_flushes: Of one address in it.
        taken: How often it was given to another address space.
    """

    set: int
    satp: int
    asid: int
    privilege: int
    sum: bool
    mxr: bool
    mprv: bool
    current: bool
    read_misses: int
    write_misses: int
    code_misses: int
    fills: int
    flushes: int
    partial_flushes: int
    taken: int
    read_hits: int | None = None
    write_hits: int | None = None
    code_hits: int | None = None


@dataclass(frozen=True)
class MmuInfo:
    """Of x-query-mmu: a hart's memory management unit.

    Attributes:
        hart: Its number.
        satp: The present address space.
        counting: Whether hits are counted.
        walks: Of page tables, since the hart was reset; as are the next three.
        flushes: By fences, and by the engine.
        set_switches: How often another set came into use.
        set_misses: How often there was none for an address space.
        sets: Since the machine was made; none where there is no TLB.
    """

    hart: int
    satp: int
    counting: bool
    walks: int
    flushes: int
    set_switches: int
    set_misses: int
    sets: list[TlbSet]


@dataclass(frozen=True)
class ExitsInfo:
    """Of x-query-exits: how often a hart left native code.

    Attributes:
        hart: Its number.
        retired: Its instructions since it was reset.
        reasons: What was left to the machine, by reason.
        served: What its executor did itself: decoding code, telling of writes.
        devices: The loads and stores among them, by device.
        calls: The calls of firmware among them, by SBI extension and function.
    """

    hart: int
    retired: int
    reasons: list[ExitCount]
    served: list[ExitCount]
    devices: list[ExitCount]
    calls: list[ExitCount]


@dataclass(frozen=True)
class TraceInfo:
    """Of x-query-trace, and the data of X_TRACE_ENDED: a hart's trace.

    Attributes:
        hart: Its number.
        file: Where it is written.
        tracing: Whether it has begun, and not ended.
        instructions: How many are in it.
    """

    hart: int
    file: str
    tracing: bool
    instructions: int


class DebugCommands:
    """The commands.

    Args:
        control: Whose machine it is about.
        place: Calls functions on the thread that owns it.
    """

    def __init__(self, control: Control, place: Place) -> None:
        self._control = control
        self._machine = control.machine
        self._place = place
        self._traces: dict[int, FileTracer] = {}
        self._counting = False
        for name, function in (
            ("x-query-mmu", self.query_mmu),
            ("x-count-tlb-hits", self.count_tlb_hits),
            ("x-query-exits", self.query_exits),
            ("x-trace-start", self.trace_start),
            ("x-trace-stop", self.trace_stop),
            ("x-query-trace", self.query_trace),
        ):
            control.commands.add(name, function)
        control.commands.add_event("X_TRACE_ENDED", TraceInfo)

    # ---------------------------------------------------------------------------- statistics

    def query_mmu(self) -> list[MmuInfo]:
        """What the harts' memory management units did."""
        return [
            MmuInfo(
                number,
                hart[layout.SATP],
                self._counting,
                hart[layout.WALKS],
                hart[layout.FLUSHES],
                hart[layout.SET_SWITCHES],
                hart[layout.SET_MISSES],
                self._sets(number, hart),
            )
            for number, hart in enumerate(self._machine.harts)
        ]

    def _sets(self, number: int, hart: Hart) -> list[TlbSet]:
        executor = self._machine.harts.executor(number)
        if not isinstance(executor, InterpreterExecutor):
            return []
        in_use = (hart[layout.TLB] - hart[layout.TLB_SETS]) // layout.TLB_SET_SIZE
        found = []
        for index, counters in enumerate(executor.set_counters()):
            space, how = (hart[field] for field in layout.TLB_KEYS[2 * index : 2 * index + 2])
            if not how & _USED:
                continue
            hits = layout.READ_HITS, layout.WRITE_HITS, layout.CODE_HITS
            found.append(
                TlbSet(
                    index,
                    space,
                    space >> _ASID & 0xFFFF,
                    how & 3,
                    bool(how & 1 << SUM),
                    bool(how & 1 << MXR),
                    bool(how & 1 << MPRV),
                    index == in_use,
                    counters[layout.READ_MISSES],
                    counters[layout.WRITE_MISSES],
                    counters[layout.CODE_MISSES],
                    counters[layout.SET_FILLS],
                    counters[layout.WHOLE_FLUSHES],
                    counters[layout.PART_FLUSHES],
                    counters[layout.SET_TAKEN],
                    *(counters[each] if self._counting else None for each in hits),
                )
            )
        return found

    def count_tlb_hits(self, enable: bool) -> None:
        """Count hits in the TLB, or no longer; the guest is a little slower meanwhile."""
        harts = self._machine.harts
        for number in range(len(harts)):
            executor = harts.executor(number)
            if not isinstance(executor, InterpreterExecutor):
                raise CommandError("The reference executor has no TLB")
            executor.count_hits(enable)
        self._counting = enable

    def query_exits(self) -> list[ExitsInfo]:
        """How often the harts left native code, and for what."""
        harts = self._machine.harts
        found = []
        for number, hart in enumerate(harts):
            devices: dict[str, int] = {}
            for address, count in harts.accesses(number).items():
                name = self._device_at(address)
                devices[name] = devices.get(name, 0) + count
            served = getattr(harts.executor(number), "served", {})
            found.append(
                ExitsInfo(
                    number,
                    hart.retired,
                    _counts(harts.exits(number)),
                    _counts({reason.name.lower(): count for reason, count in served.items()}),
                    _counts(devices),
                    _counts(
                        {
                            f"{NAMES.get(extension, f'{extension:#x}')}.{function}": count
                            for (extension, function), count in harts.calls(number).items()
                        }
                    ),
                )
            )
        return found

    def _device_at(self, page: int) -> str:
        for window in self._machine.board.bus.windows():
            if window.base < page + 4096 and page < window.end:
                return window.name
        return "nothing"

    # -------------------------------------------------------------------------------- traces

    def trace_start(
        self,
        *,
        file: str,
        hart: int = 0,
        count: int = 0,
        start: str | None = None,
        stop: str | None = None,
        symbols: bool = True,
    ) -> None:
        """Write a hart's instructions to a file: `count` of them, from `start` on, up to `stop`.

        Addresses are numbers, or the kernel's symbols with or without a distance
        (`do_sys_openat2+0x10`).
        """
        from vmlab.engine.debug.tracer import FileTracer, Span

        if not 0 <= hart < len(self._machine.harts):
            raise CommandError(f"Parameter 'hart' expects a hart: there is no {hart}")
        if hart in self._traces:
            raise CommandError(f"Hart {hart} is traced already")
        if count < 0:
            raise CommandError("Parameter 'count' expects instructions, 0 for any number of them")
        with self._standing():
            table = symbols_in(self._machine.ram) if symbols else SymbolTable([])
            span = Span(count, _address(start, table), _address(stop, table))
            try:
                tracer = FileTracer(Path(file), span, table, partial(self._ended, hart))
            except VmlabError as error:
                raise CommandError(f"{error} ({error.hint})") from error
            self._traces[hart] = tracer
            self._machine.harts.trace(hart, tracer)
            self._set_points()

    def trace_stop(self, hart: int = 0) -> None:
        """End a hart's trace."""
        if hart not in self._traces:
            raise CommandError(f"Hart {hart} is not traced")
        self._finish(hart)

    def query_trace(self) -> list[TraceInfo]:
        """The traces that are being written."""
        return [self._told(hart) for hart in self._traces]

    def _told(self, hart: int) -> TraceInfo:
        tracer = self._traces[hart]
        return TraceInfo(hart, str(tracer.path), tracer.tracing, tracer.written)

    def _ended(self, hart: int) -> None:
        # On the hart's thread.
        tracer = self._traces.get(hart)

        def finish() -> None:
            if self._traces.get(hart) is tracer:
                self._finish(hart)

        self._place(finish)

    def _finish(self, hart: int) -> None:
        with self._standing():
            tracer = self._traces[hart]
            tracer.finish(list(self._machine.harts)[hart])
            told = self._told(hart)
            del self._traces[hart]
            self._machine.harts.trace(hart, None)
            self._set_points()
        self._control.emit("X_TRACE_ENDED", told)

    def _set_points(self) -> None:
        starts = (each.span.start for each in self._traces.values())
        wanted = frozenset(start for start in starts if start is not None)
        self._machine.harts.stop_at(Points(wanted) if wanted else NO_POINTS, TRACER)

    @contextmanager
    def _standing(self) -> Iterator[None]:
        """The harts stand meanwhile."""
        harts = self._machine.harts
        if self._machine.running:
            harts.pause()
        try:
            yield
        finally:
            if self._machine.running:
                harts.resume()


def _counts(counts: dict[str, int]) -> list[ExitCount]:
    return [ExitCount(name, count) for name, count in counts.items()]


def _address(text: str | None, table: SymbolTable) -> int | None:
    """An address as people write it."""
    if text is None:
        return None
    name, _, distance = text.partition("+")
    try:
        found = table.find(name)
        base = found.address if found is not None else int(name, 0)
        return (base + (int(distance, 0) if distance else 0)) & layout.WORD
    except ValueError:
        raise CommandError(f"{text!r} is no address, and no symbol of the kernel's") from None
