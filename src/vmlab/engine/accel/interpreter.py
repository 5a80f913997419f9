"""The interpreter executor: runs a hart with the native code of vmlab.engine.compile.interpreter.

Decode records are made a page at a time. A page of RAM whose code is decoded is flagged, so that
every write to it comes by here (vmlab.engine.memory.ram): its records are then taken out of use,
and a hart that is among them notices at its next instruction.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from vmlab.engine.accel.stopping import Points, StoppingExecutor
from vmlab.engine.code.arena import Arena
from vmlab.engine.code.cache import ObjectCache
from vmlab.engine.code.environment import check_floating_environment
from vmlab.engine.code.loader import load
from vmlab.engine.cpu import layout, sleeping
from vmlab.engine.cpu.exits import Exit, Reason
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.memory.pages import own_memory
from vmlab.engine.memory.ram import CODE, Ram

_PAGE = 4096
_RECORDS = _PAGE // 2
_ENDS = 2  # records after a page's last: an instruction there may be two halfwords long
_PAGE_RECORDS_SIZE = (_RECORDS + _ENDS) * layout.RECORD_SIZE
_HANDLER_PREFIX, _COUNTING_PREFIX, _HOST_PREFIX = "h.", "c.", "host."

_RETIRED_PAGES = 128  # 4 MiB
_FEW_PAGES = 16  # beyond that it is cheaper to drop everything

_Native = Callable[[int], None]


def is_prepared(folder: Path | None = None) -> bool:
    """Whether the interpreter for this host's processor has been compiled already."""
    return ObjectCache(folder).path(_object_name(())).exists()


def prepare(folder: Path | None = None) -> None:
    """Compile the interpreter for this host's processor, if that has not been done.

    Raises:
        CompileFailed: the compiler cannot be used.
    """
    ObjectCache(folder).get(_object_name(()), lambda: _make_interpreter(()))


def _object_name(without: Sequence[str]) -> str:
    return "-".join(("riscv64", *(f"without-{feature}" for feature in without)))


def _make_interpreter(without: Sequence[str]) -> bytes:
    from vmlab.engine.compile.client import CompileWorker

    with CompileWorker() as worker:
        return worker.interpreter(without)


class NativeCode:
    """The interpreter's code in this process.

    Args:
        folder: the cache of objects; the user's own if none is given.
        without: features of the host's processor that are not to be used ("fma").
    """

    def __init__(self, folder: Path | None = None, without: Sequence[str] = ()) -> None:
        self.arena = Arena()
        name = _object_name(without)
        made = ObjectCache(folder).get(name, lambda: _make_interpreter(without))
        symbols = load(made, self.arena)
        handlers = _numbered(symbols, _HANDLER_PREFIX)
        counting = _numbered(symbols, _COUNTING_PREFIX)
        self.numbers = {name: number for number, (name, _) in handlers.items()}
        table = ctypes.c_uint64 * len(handlers)
        self.handlers = table(*(handlers[number][1] for number in range(len(handlers))))
        # The same, but for those that count hits in the TLB.
        self.counting = table(
            *(counting.get(number, handlers[number])[1] for number in range(len(handlers)))
        )
        one = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        three = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        self.run: _Native = one(symbols["run"])
        self.go_on: _Native = one(symbols["go_on"])
        self.go_on_elsewhere: _Native = one(symbols["go_on_elsewhere"])
        self.run_changed: _Native = one(symbols["run_changed"])
        self.flush_all: _Native = one(symbols["flush_all"])
        host_call = ctypes.CFUNCTYPE(
            ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64
        )
        self.interrupts: dict[str, Callable[[int, int, int], int]] = {
            symbol.removeprefix(_HOST_PREFIX): host_call(address)
            for symbol, address in symbols.items()
            if symbol.startswith(_HOST_PREFIX)
        }
        two = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
        self.drop_writes: Callable[[int, int], None] = two(symbols["drop_writes"])
        self.decode_page: Callable[[int, int, int], None] = three(symbols["decode_page"])
        libc = ctypes.CDLL(None)
        clock = ctypes.cast(libc.clock_gettime, ctypes.c_void_p).value
        assert clock is not None
        self.clock = clock
        # The first call of a function of a shared library binds it; do that outside of a guest.
        time.clock_gettime(time.CLOCK_MONOTONIC)

    def handler(self, name: str) -> int:
        """The address of a handler."""
        return self.handlers[self.numbers[name]]


def _numbered(symbols: dict[str, int], prefix: str) -> dict[int, tuple[str, int]]:
    """Names and addresses of handlers by number."""
    found = {}
    for symbol, address in symbols.items():
        number, _, name = symbol.removeprefix(prefix).partition(".")
        if symbol.startswith(prefix) and number.isdigit():
            found[int(number)] = name, address
    return found


@cache
def native_code() -> NativeCode:
    """The interpreter, loaded at the first call, from the user's cache."""
    return NativeCode()


class _RecordPage:
    """The decode records of one page of RAM."""

    def __init__(self) -> None:
        self._memory = own_memory(_PAGE_RECORDS_SIZE)
        self.words = memoryview(self._memory).cast("Q")
        self._anchor = ctypes.c_char.from_buffer(self._memory)
        self.address = ctypes.addressof(self._anchor)


class CodePages:
    """The decode records of a machine's RAM, for all its harts.

    Args:
        ram: the memory; it tells this object of code that is written, and nobody else.
        native: the interpreter.

    Raises:
        RuntimeError: the memory has decode records already.
    """

    def __init__(self, ram: Ram, native: NativeCode) -> None:
        self.ram = ram
        self.native = native
        self._map = own_memory(ram.pages * 8)
        self._slots = memoryview(self._map).cast("Q")
        self._map_anchor = ctypes.c_char.from_buffer(self._map)
        self.map_address = ctypes.addressof(self._map_anchor)
        self._pages: dict[int, _RecordPage] = {}
        # Of pages with breakpoints: by page of RAM, and by the virtual address of the page.
        self._with_breakpoints: dict[int, dict[int, _RecordPage]] = {}
        self._breakpoints: dict[int, list[int]] = {}  # addresses by those of their pages
        self._handlers = native.handlers
        self._retired: list[_RecordPage] = []  # out of use, but a hart may still be there
        self._free: list[_RecordPage] = []
        self._lock = threading.RLock()
        self._harts: list[InterpreterExecutor] = []
        self.decoded = 0  # pages, counted each time
        ram.tell_of_code(self._written, self._protect)

    def add(self, executor: InterpreterExecutor) -> None:
        """An executor uses these records."""
        self._harts.append(executor)

    def decode(self, physical: int) -> None:
        """Make the records of the page with this address."""
        page = (physical - self.ram.base) // _PAGE
        with self._lock:
            if self._slots[page]:
                return
            self._pages[page] = records = self._made(page)
            self._slots[page] = records.address

    def _made(self, page: int) -> _RecordPage:
        """New records of a page of RAM."""
        # Flagged first: a write from here on is seen, one before is in what is decoded.
        if not self.ram.flags(page) & CODE:
            self.ram.protect(page, 1, CODE)
        records = self._unused_records()
        source = self.ram.host_address + page * _PAGE
        end = self._handlers[self.native.numbers["page_end"]]
        for index in range(_RECORDS, _RECORDS + _ENDS):
            records.words[2 * index] = end
        self.native.decode_page(source, records.address, ctypes.addressof(self._handlers))
        self.decoded += 1
        return records

    def _unused_records(self) -> _RecordPage:
        if not self._free and len(self._retired) >= _RETIRED_PAGES:
            # No hart is among these any more once each has been out of native code and has
            # forgotten where code is.
            for executor in self._harts:
                executor.drop_write_translations()
            self._free, self._retired = self._retired, []
        return self._free.pop() if self._free else _RecordPage()

    def _written(self, first: int, count: int) -> None:
        """Pages with code were written: their records are of no use any more."""
        with self._lock:
            for page in range(first, first + count):
                self.ram.unprotect(page, 1, CODE)
                self._slots[page] = 0
                self._retire_page(page)

    def _retire_page(self, page: int) -> None:
        records = self._pages.pop(page, None)
        self._retire([records] if records is not None else [])
        self._retire(self._with_breakpoints.pop(page, {}).values())

    def _retire(self, pages: Iterable[_RecordPage]) -> None:
        stale = self.native.handler("stale")
        for records in pages:
            words = records.words
            for index in range(0, 2 * _RECORDS, 2):
                words[index] = stale
            self._retired.append(records)

    def _protect(self, first: int, count: int) -> None:
        """Stores to these pages must be seen from now on."""
        pages = range(first, first + count) if count <= _FEW_PAGES else None
        for executor in self._harts:
            executor.drop_write_translations(pages)

    # ------------------------------------------------------------------------ for a debugger

    @property
    def handlers_address(self) -> int:
        """Where the handlers' addresses are that records are made with."""
        return ctypes.addressof(self._handlers)

    @property
    def break_pages(self) -> int:
        """A bit for each page of code that executors must ask for, by the page's number mod 64."""
        bits = 0
        for page in self._breakpoints:
            bits |= 1 << ((page // _PAGE) & 63)
        return bits

    def set_breakpoints(self, addresses: Iterable[int]) -> None:
        """Stop at these virtual addresses and no others. Executors must drop translations next."""
        by_page: dict[int, list[int]] = {}
        for address in sorted(addresses):
            by_page.setdefault(address & -_PAGE, []).append(address)
        with self._lock:
            if by_page != self._breakpoints:
                self._breakpoints = by_page
                for copies in self._with_breakpoints.values():
                    self._retire(copies.values())
                self._with_breakpoints.clear()

    def offered(self, physical: int, virtual: int) -> int:
        """The address of the records of the page with a physical address, for a virtual one.

        A page that has breakpoints where it is seen has records of its own there.
        """
        page, seen = (physical - self.ram.base) // _PAGE, virtual & -_PAGE
        with self._lock:
            if seen not in self._breakpoints:
                self.decode(physical)
                return self._slots[page]
            copies = self._with_breakpoints.setdefault(page, {})
            if seen not in copies:
                copies[seen] = self._made(page)
                stop = self.native.handler("breakpoint")
                for address in self._breakpoints[seen]:
                    copies[seen].words[(address - seen) & -2] = stop
            return copies[seen].address

    def count_hits(self, wanted: bool) -> None:
        """Whether hits in the TLB are counted. Executors must drop translations next."""
        handlers = self.native.counting if wanted else self.native.handlers
        with self._lock:
            if handlers is not self._handlers:
                self._handlers = handlers
                for page in [*self._pages, *self._with_breakpoints]:
                    self._slots[page] = 0
                    self._retire_page(page)


class InterpreterExecutor(StoppingExecutor):
    """Runs a hart.

    Args:
        hart: which; it can be given to another executor between two runs.
        pages: the decode records of its RAM, shared by all harts of a machine.
    """

    name = "interpreter"

    def __init__(self, hart: Hart, pages: CodePages | None = None) -> None:
        super().__init__(hart)
        self.pages = pages or CodePages(hart.ram, native_code())
        native = self._native = self.pages.native
        if hart.interrupts is not None:
            hart.interrupts.native = native.interrupts
        self._sets = own_memory(layout.TLB_SET_COUNT * layout.TLB_SET_SIZE)
        self._notes = own_memory(hart.ram.pages)
        self._scratch = own_memory(mmap.PAGESIZE)
        self._anchors = [
            ctypes.c_char.from_buffer(block) for block in (self._sets, self._notes, self._scratch)
        ]
        sets, notes, scratch = map(ctypes.addressof, self._anchors)
        words = memoryview(self._scratch).cast("Q")
        words[2] = words[4] = native.handler("page_end")
        near = layout.NEAR_SCRATCH // 8
        words[near + 2] = words[near + 4] = native.handler("near_end")
        self._thread = 0  # the one that it ran on last
        # Held around changes of the following.
        self._gate = threading.Condition()
        self._asking = 0  # threads that wait for native code to be left
        self._active = False  # native code runs
        self._exits = 0  # how often it was left
        self._drop_first = True  # translations are to be dropped before it does
        self._pages_to_drop: list[int] = []  # and those of writes to these pages
        self._places = {
            layout.TLB_SETS: sets,
            layout.TLB: sets,
            layout.NOTES: notes,
            layout.SCRATCH: scratch,
            layout.CODE_MAP: self.pages.map_address,
            layout.PAGE_FLAGS: hart.ram.flags_address,
            layout.CLOCK: native.clock,
            layout.SYSTEM_CALL: sleeping.system_call_address(),
        }
        self.pages.add(self)

    def stop_at(self, points: Points) -> None:
        self.pages.set_breakpoints(points.breakpoints)
        super().stop_at(points)
        self.drop_write_translations()

    def count_hits(self, wanted: bool) -> None:
        """Whether hits in the TLB are counted, of all harts; it makes them a little slower."""
        self.pages.count_hits(wanted)
        self.drop_write_translations()

    def set_counters(self) -> list[list[int]]:
        """The counters of each set of the TLB, in the order of their numbers in `layout`."""
        words = memoryview(self._sets).cast("Q")
        found = []
        for index in range(layout.TLB_SET_COUNT):
            start = (index * layout.TLB_SET_SIZE + layout.TLB_COUNTERS) // 8
            found.append(words[start : start + layout.TLB_COUNTER_COUNT].tolist())
        words.release()
        return found

    def _step(self, how: int) -> Exit:
        self._drop_translations()  # a known page would be executed from its records
        self.hart[layout.STEPPING] = how
        try:
            return self._run(1)
        finally:
            self.hart[layout.STEPPING] = 0

    def drop_write_translations(self, pages: range | None = None) -> None:
        """On return no store of the hart's goes by a translation that it had. For any thread.

        The hart was outside of native code meanwhile.

        Args:
            pages: only writes to these pages of RAM; without it all accesses to all, and code.
        """
        with self._gate:
            if pages is None:
                self._drop_first = True
            else:
                self._pages_to_drop += pages
            self._asking += 1
            # It may be inside again before this thread comes to look: then it has dropped them.
            exits = self._exits
            while self._active and self._exits == exits:
                self.hart.request_service()
                self._gate.wait()
            self._asking -= 1

    def fence(self) -> None:
        """On return no access of the hart's is under way by a translation that it had."""
        self.drop_write_translations()
        exits = self._exits
        # It may have left for having a store to RAM completed, by such a translation.
        while self.hart.shared[layout.SHARED_INSIDE] and not self._active and exits == self._exits:
            time.sleep(0)

    def _drop_translations(self) -> None:
        with self._gate:
            self._drop_first = True

    def _arm(self) -> None:
        super()._arm()
        self.hart[layout.BREAK_PAGES] = self.pages.break_pages
        self.hart[layout.OFFERED_PAGE] = layout.NO_OFFER

    def _enter(self, function: Callable[[int], None]) -> None:
        """Run native code."""
        address = self.hart.address
        with self._gate:
            if self._drop_first:
                self._native.flush_all(address)
                self._arm()
                self._drop_first = False
                self._pages_to_drop.clear()
            while self._pages_to_drop:
                page = self._pages_to_drop.pop()
                self._native.drop_writes(address, self.hart.ram.host_address + page * _PAGE)
            self._active = True
        function(address)
        with self._gate:
            self._active = False
            self._exits += 1
            if self._asking:
                self._gate.notify_all()

    def _run(self, budget: int) -> Exit:
        hart, native = self.hart, self._native
        if self._thread != threading.get_ident():
            check_floating_environment()
            self._thread = threading.get_ident()
        if hart.executor is not self:
            hart.executor = self  # another one may have changed what translations are made of
            self._drop_translations()
            for field, place in self._places.items():
                hart[field] = place
        hart[layout.HANDLERS] = self.pages.handlers_address
        hart[layout.BUDGET_LEFT] = budget
        hart[layout.SLICE_END] = hart[layout.RETIRED]
        try:
            # The host may have changed registers since the last run.
            self._enter(native.run_changed)
            return self._serve()
        finally:
            hart.shared[layout.SHARED_INSIDE] = 0

    def _serve(self) -> Exit:
        """Do what native code was left for, and go on with it, until it is for somebody else."""
        hart, native = self.hart, self._native
        while True:
            reason = hart[layout.REASON]
            match reason:
                case Reason.CODE if not hart[layout.EXIT_DATA]:
                    # A page with breakpoints, of which each instruction is asked for.
                    if hart.pc in self.points.breakpoints:
                        hart[layout.REASON] = Reason.BREAKPOINT.value
                        return hart.exit()
                    hart[layout.OFFERED_PAGE] = hart.pc & -_PAGE
                    self._enter(native.go_on)
                case Reason.CODE if hart[layout.BREAK_PAGES]:
                    records = self.pages.offered(hart[layout.EXIT_ADDRESS], hart.pc)
                    hart[layout.OFFERED_RECORDS] = records
                    hart[layout.OFFERED_PAGE] = hart.pc & -_PAGE
                    self._enter(native.go_on)
                case Reason.CODE:
                    self.pages.decode(hart[layout.EXIT_ADDRESS])
                    self._enter(native.go_on)
                case Reason.NOTES:
                    self._tell_notes()
                    self._enter(native.run)
                case Reason.REQUEST if not hart.clear_service():
                    self._enter(native.run)
                case Reason.WRITE if hart.ram.contains(
                    hart[layout.EXIT_ADDRESS], hart[layout.EXIT_SIZE]
                ):
                    size = hart[layout.EXIT_SIZE]
                    data = hart[layout.EXIT_DATA] & ((1 << 8 * size) - 1)
                    hart.ram.write(hart[layout.EXIT_ADDRESS], data.to_bytes(size, "little"))
                    # No exit in the guest's eyes: only the end of a page is a poll point.
                    poll_point = (hart.pc ^ hart[layout.EXIT_PC]) & -_PAGE or hart[layout.STEPPING]
                    self._enter(native.go_on_elsewhere if poll_point else native.go_on)
                case _:
                    return hart.exit()
            served = Reason(reason)
            self.served[served] = self.served.get(served, 0) + 1

    def _tell_notes(self) -> None:
        """Tell the RAM of pages that native code wrote by itself although they are flagged."""
        hart = self.hart
        hart[layout.NOTED] = 0
        page = self._notes.find(b"\1")
        while page >= 0:
            self._notes[page] = 0
            hart.ram.written(hart.ram.base + page * _PAGE, _PAGE)
            page = self._notes.find(b"\1", page + 1)
