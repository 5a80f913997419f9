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
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from vmlab.engine.code.arena import Arena
from vmlab.engine.code.cache import ObjectCache
from vmlab.engine.code.environment import check_floating_environment
from vmlab.engine.code.loader import load
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.exits import Exit, Reason
from vmlab.engine.cpu.hart import Hart
from vmlab.engine.memory.ram import CODE, Ram

_PAGE = 4096
_RECORDS = _PAGE // 2
_ENDS = 2  # records after a page's last: an instruction there may be two halfwords long
_PAGE_RECORDS_SIZE = (_RECORDS + _ENDS) * layout.RECORD_SIZE
_HANDLER_PREFIX = "h."

_RETIRED_PAGES = 128  # 4 MiB
_FEW_PAGES = 16  # beyond that it is cheaper to drop everything

_Native = Callable[[int], None]


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
        name = "-".join(("riscv64", *(f"without-{feature}" for feature in without)))
        made = ObjectCache(folder).get(name, lambda: _make_interpreter(without))
        symbols = load(made, self.arena)
        handlers: dict[int, int] = {}
        self.numbers: dict[str, int] = {}
        for symbol, address in symbols.items():
            number, _, name = symbol.removeprefix(_HANDLER_PREFIX).partition(".")
            if symbol.startswith(_HANDLER_PREFIX) and number.isdigit():
                handlers[int(number)] = address
                self.numbers[name] = int(number)
        self.handlers = (ctypes.c_uint64 * len(handlers))(
            *(handlers[number] for number in range(len(handlers)))
        )
        one = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        three = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        self.run: _Native = one(symbols["run"])
        self.go_on: _Native = one(symbols["go_on"])
        self.go_on_elsewhere: _Native = one(symbols["go_on_elsewhere"])
        self.select_set: _Native = one(symbols["select_set"])
        self.flush_all: _Native = one(symbols["flush_all"])
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


@cache
def native_code() -> NativeCode:
    """The interpreter, loaded at the first call, from the user's cache."""
    return NativeCode()


class _RecordPage:
    """The decode records of one page of RAM."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _PAGE_RECORDS_SIZE)
        self.words = memoryview(self._memory).cast("Q")
        self._anchor = ctypes.c_char.from_buffer(self._memory)
        self.address = ctypes.addressof(self._anchor)


class CodePages:
    """The decode records of a machine's RAM, for all its harts.

    Args:
        ram: the memory; its callbacks for writes to code and for protection become this object's.
        native: the interpreter.
    """

    def __init__(self, ram: Ram, native: NativeCode) -> None:
        self.ram = ram
        self.native = native
        self._map = mmap.mmap(-1, ram.pages * 8)
        self._slots = memoryview(self._map).cast("Q")
        self._map_anchor = ctypes.c_char.from_buffer(self._map)
        self.map_address = ctypes.addressof(self._map_anchor)
        self._pages: dict[int, _RecordPage] = {}
        self._retired: list[_RecordPage] = []  # out of use, but a hart may still be there
        self._free: list[_RecordPage] = []
        self._lock = threading.RLock()
        self._harts: list[InterpreterExecutor] = []
        self.decoded = 0  # pages, counted each time
        ram.on_code_write = self._written
        ram.on_protect = self._protect

    def add(self, executor: InterpreterExecutor) -> None:
        """An executor uses these records."""
        self._harts.append(executor)

    def decode(self, physical: int) -> None:
        """Make the records of the page with this address."""
        page = (physical - self.ram.base) // _PAGE
        with self._lock:
            if self._slots[page]:
                return
            # Flagged first: a write from here on is seen, one before is in what is decoded.
            self.ram.protect(page, 1, CODE)
            records = self._unused_records()
            source = self.ram.host_address + page * _PAGE
            end = self.native.handler("page_end")
            for index in range(_RECORDS, _RECORDS + _ENDS):
                records.words[2 * index] = end
            self.native.decode_page(source, records.address, ctypes.addressof(self.native.handlers))
            self._pages[page] = records
            self.decoded += 1
            self._slots[page] = records.address

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
        stale = self.native.handler("stale")
        with self._lock:
            for page in range(first, first + count):
                records = self._pages.pop(page, None)
                self.ram.unprotect(page, 1, CODE)
                if records is None:
                    continue
                self._slots[page] = 0
                words = records.words
                for index in range(0, 2 * _RECORDS, 2):
                    words[index] = stale
                self._retired.append(records)

    def _protect(self, first: int, count: int) -> None:
        """Stores to these pages must be seen from now on."""
        pages = range(first, first + count) if count <= _FEW_PAGES else None
        for executor in self._harts:
            executor.drop_write_translations(pages)


class InterpreterExecutor:
    """Runs a hart.

    Args:
        hart: which; it can be given to another executor between two runs.
        pages: the decode records of its RAM, shared by all harts of a machine.
    """

    name = "interpreter"

    def __init__(self, hart: Hart, pages: CodePages | None = None) -> None:
        self.hart = hart
        self.pages = pages or CodePages(hart.ram, native_code())
        native = self._native = self.pages.native
        self._sets = mmap.mmap(-1, layout.TLB_SET_COUNT * layout.TLB_SET_SIZE)
        self._notes = mmap.mmap(-1, hart.ram.pages)
        self._scratch = mmap.mmap(-1, mmap.PAGESIZE)
        self._anchors = [
            ctypes.c_char.from_buffer(block) for block in (self._sets, self._notes, self._scratch)
        ]
        sets, notes, scratch = map(ctypes.addressof, self._anchors)
        words = memoryview(self._scratch).cast("Q")
        words[2] = words[4] = native.handler("page_end")
        self._thread = 0  # the one that it ran on last
        # Held around changes of the following.
        self._gate = threading.Condition()
        self._active = False  # native code runs
        self._drop_first = True  # translations are to be dropped before it does
        self._pages_to_drop: list[int] = []  # and those of writes to these pages
        self._places = {
            layout.TLB_SETS: sets,
            layout.TLB: sets,
            layout.NOTES: notes,
            layout.SCRATCH: scratch,
            layout.CODE_MAP: self.pages.map_address,
            layout.PAGE_FLAGS: hart.ram.flags_address,
            layout.HANDLERS: ctypes.addressof(native.handlers),
            layout.CLOCK: native.clock,
        }
        self.pages.add(self)

    def run(self, budget: int) -> Exit:
        """Execute until there is something for the host to do.

        Args:
            budget: instructions after which to return, at the next poll point.
        """
        return self._run(budget)

    def step(self) -> Exit:
        """Execute one instruction, or take one trap."""
        self._drop_translations()  # a known page would be executed from its records
        self.hart[layout.STEPPING] = 1
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
            while self._active:
                self.hart.request_service()
                self._gate.wait()

    def _drop_translations(self) -> None:
        with self._gate:
            self._drop_first = True

    def _enter(self, function: Callable[[int], None]) -> None:
        """Run native code."""
        address = self.hart.address
        with self._gate:
            if self._drop_first:
                self._native.flush_all(address)
                self._drop_first = False
                self._pages_to_drop.clear()
            while self._pages_to_drop:
                page = self._pages_to_drop.pop()
                self._native.drop_writes(address, self.hart.ram.host_address + page * _PAGE)
            self._active = True
        function(address)
        with self._gate:
            self._active = False
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
        hart[layout.BUDGET_LEFT] = budget
        hart[layout.SLICE_END] = hart[layout.RETIRED]
        # The host may have changed registers since the last run.
        native.select_set(hart.address)
        self._enter(native.run)
        while True:
            match hart[layout.REASON]:
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
                    apart = (hart.pc ^ hart[layout.EXIT_PC]) & -_PAGE
                    self._enter(native.go_on_elsewhere if apart else native.go_on)
                case _:
                    return hart.exit()

    def _tell_notes(self) -> None:
        """Tell the RAM of pages that native code wrote by itself although they are flagged."""
        hart = self.hart
        hart[layout.NOTED] = 0
        page = self._notes.find(b"\1")
        while page >= 0:
            self._notes[page] = 0
            hart.ram.written(hart.ram.base + page * _PAGE, _PAGE)
            page = self._notes.find(b"\1", page + 1)
