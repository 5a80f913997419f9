"""The guest's RAM: one memory file, mapped once, and one path for every write to it.

A page that must not be written unseen (it holds decoded code, it is logged as clean, it is
watched, it is read-only) carries a flag byte. The native code keeps such pages out of its fast
store path and comes here; devices always come here. So nothing that writes can forget a flag.
Addresses come from the guest and are checked; nothing here trusts them.

Not here: virtual addresses, caches of translations, devices' registers.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Final

from vmlab.engine.memory.pages import own_memory
from vmlab.machine.errors import VmlabError

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
RAM_BASE: Final = 0x8000_0000
"""Where the RAM of the "virt" board begins."""

CODE: Final = 0x01
"""The page holds decoded instructions; a write makes them stale."""
LOGGED: Final = 0x02
"""The page has not been written since the dirty log was last collected."""
WATCHED: Final = 0x04
"""A write to the page is told to the debugger."""
ROM: Final = 0x08
"""A write to the page has no effect."""

_MAP_FIXED: Final = 0x10
"""The same on Linux and macOS (sys/mman.h)."""

_MEMBARRIER_PRIVATE_EXPEDITED: Final = 1 << 3
_MEMBARRIER_REGISTER: Final = 1 << 4
_MEMBARRIER_CALL: Final = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365}


class BadAddress(Exception):
    """An access that does not lie in RAM as a whole; `address` and `size` say which."""

    def __init__(self, address: int, size: int) -> None:
        super().__init__(f"{size} bytes at {address:#x} are not in RAM")
        self.address = address
        self.size = size


def _ignore(first: int, count: int) -> None:
    """Nobody has asked to be told."""


def _memory_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("vmlab-ram", os.MFD_CLOEXEC)
    import tempfile  # macOS: an unlinked file

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _address_of(region: mmap.mmap) -> int:
    # The array is gone at once, and with it the export that would keep the mapping from closing.
    return ctypes.addressof(ctypes.c_char.from_buffer(region))


class Ram:
    """`size` bytes of guest memory from physical address `base` on.

    Args:
        size: Bytes; a positive multiple of 4096.
        base: The first physical address; a multiple of 4096.
        fd: A memory file that holds the content already; it is duplicated, not taken.
        private: Map that file copy-on-write: what is written here stays here (a fork).

    Raises:
        VmlabError: the host has no room for it.

    Attributes:
        host_address: Where the first byte lies in this process.
        flags_address: Where the flag byte of the first page lies in this process.
        on_watched_write: Called with (address, bytes) after bytes in WATCHED pages were written.
    """

    def __init__(
        self, size: int, base: int = RAM_BASE, *, fd: int | None = None, private: bool = False
    ) -> None:
        if size <= 0 or size % PAGE_SIZE or base % PAGE_SIZE:
            raise ValueError(f"RAM is whole pages of {PAGE_SIZE} bytes, not {size} at {base:#x}")
        if sys.byteorder != "little":
            raise VmlabError(
                "the engine does not run on a big-endian host", hint="QEMU runs guests there"
            )
        self.base = base
        self.size = size
        self.end = base + size
        self.pages = size >> PAGE_SHIFT
        self.private = private
        sharing = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        self.fd = _memory_file() if fd is None else os.dup(fd)
        try:
            if fd is None:
                os.ftruncate(self.fd, size)
            self._map = mmap.mmap(
                self.fd, size, flags=sharing | getattr(mmap, "MAP_NORESERVE", 0),
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )  # fmt: skip
        except (OSError, OverflowError) as error:
            os.close(self.fd)
            raise VmlabError(
                f"this host has no room for {size} bytes of guest memory: {error}",
                hint="give the machine less memory",
            ) from None
        self._flags = own_memory(self.pages)
        self._dirty = bytearray(self.pages)
        self._logging = False
        self._flag_lock = threading.Lock()
        self.host_address = _address_of(self._map)
        self.flags_address = _address_of(self._flags)
        whole = memoryview(self._map)
        self._16 = whole.cast("H")
        self._32 = whole.cast("I")
        self._64 = whole.cast("Q")
        whole.release()
        self.on_watched_write: Callable[[int, int], None] = _ignore
        self._code_written: Callable[[int, int], None] = _ignore
        self._protected: Callable[[int, int], None] = _ignore

    def tell_of_code(
        self, written: Callable[[int, int], None], protected: Callable[[int, int], None]
    ) -> None:
        """Have somebody told of code, who decodes it for all harts that share this memory.

        Args:
            written: Called with (first page, pages) after pages flagged CODE were written.
            protected: Called with (first page, pages) after flags were set; it returns only when
                no hart can store to these pages without coming here.

        Raises:
            RuntimeError: somebody else is told already, whose decoded code would become stale.
        """
        if self._code_written is not _ignore:
            raise RuntimeError("this memory's code is decoded by somebody else already")
        self._code_written, self._protected = written, protected

    def make_private(self) -> None:
        """Let what is written from now on stay in this process, and in each fork of it.

        The file keeps the content of this moment. Nobody may write meanwhile; nothing happens if
        the RAM is private already.

        Raises:
            OSError: the host does not map it.
        """
        if self.private:
            return
        # In the place of the mapping that there is, which Python's own `mmap` cannot do.
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        place, size, offset = map(ctypes.c_size_t, (self.host_address, self.size, 0))
        flags = mmap.MAP_PRIVATE | _MAP_FIXED | getattr(mmap, "MAP_NORESERVE", 0)
        access = mmap.PROT_READ | mmap.PROT_WRITE
        if libc.mmap(place, size, access, flags, self.fd, offset) != self.host_address:
            raise OSError(ctypes.get_errno(), "guest memory cannot be made private")
        self.private = True

    def close(self) -> None:
        """Give the memory back; the object is of no use afterwards."""
        for view in (self._16, self._32, self._64):
            view.release()
        self._map.close()
        self._flags.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # ------------------------------------------------------------------------------- reading

    def contains(self, address: int, size: int) -> bool:
        """Whether `size` bytes (0 or more) at `address` lie in RAM."""
        return self.base <= address and size >= 0 and address + size <= self.end

    def read(self, address: int, size: int) -> bytes:
        """A copy of `size` bytes.

        Raises:
            BadAddress: not all of them are in RAM.
        """
        offset = address - self.base
        if offset < 0 or size < 0 or offset + size > self.size:
            raise BadAddress(address, size)
        return self._map[offset : offset + size]

    def gather(self, segments: Iterable[tuple[int, int]]) -> bytes:
        """The bytes of (address, size) segments, one after the other."""
        return b"".join([self.read(address, size) for address, size in segments])

    # The rings of virtio are read while a hart writes them: one load each, never torn. Slices of
    # the mapping give no such promise, an element of a typed view is one load.

    def load16(self, address: int) -> int:
        """The naturally aligned 16-bit value at `address`, in one load."""
        return self._16[self._index(address, 2)]

    def load32(self, address: int) -> int:
        """The naturally aligned 32-bit value at `address`, in one load."""
        return self._32[self._index(address, 4)]

    def load64(self, address: int) -> int:
        """The naturally aligned 64-bit value at `address`, in one load."""
        return self._64[self._index(address, 8)]

    def _index(self, address: int, size: int) -> int:
        offset = address - self.base
        if offset < 0 or offset + size > self.size or offset % size:
            raise BadAddress(address, size)
        return offset // size

    # ------------------------------------------------------------------------------- writing

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data`, minding the flags of every page that it touches.

        Raises:
            BadAddress: not all of it fits into RAM; nothing was written.
        """
        size = len(data)
        offset = address - self.base
        if offset < 0 or offset + size > self.size:
            raise BadAddress(address, size)
        if not size:
            return
        if self._flagged(offset, size) & ROM:
            self._write_around_rom(offset, data)
        else:
            self._map[offset : offset + size] = data
        # After the bytes: whoever sets a flag and then reads the page sees the new bytes, or the
        # flag is seen here. There is no third order.
        self._written(offset, size)

    def scatter(self, segments: Iterable[tuple[int, int]], data: bytes) -> int:
        """Write `data` into (address, size) segments in order; how many bytes found a place."""
        done = 0
        for address, size in segments:
            if done == len(data):
                break
            part = data[done : done + size]
            self.write(address, part)
            done += len(part)
        return done

    def store16(self, address: int, value: int) -> None:
        """Store a naturally aligned 16-bit value in one store."""
        self._16_store(self._index(address, 2), value)

    def _16_store(self, index: int, value: int) -> None:
        if self._flags[index >> (PAGE_SHIFT - 1)] & ROM:
            return
        self._16[index] = value
        self._written(index * 2, 2)

    def zero(self, address: int, size: int) -> None:
        """Write `size` zero bytes."""
        chunk = bytes(min(size, 1 << 20)) if size > 0 else b""
        if not self.contains(address, size):
            raise BadAddress(address, size)
        while size > 0:
            part = min(size, len(chunk))
            self.write(address, chunk[:part])
            address += part
            size -= part

    def discard(self, address: int, size: int) -> None:
        """Give whole pages back to the host; the guest has said that it needs no content there.

        What is read there afterwards is not defined (zeros, or an older content).
        """
        offset = address - self.base
        if offset < 0 or size < 0 or offset + size > self.size:
            raise BadAddress(address, size)
        if offset % PAGE_SIZE or size % PAGE_SIZE:
            raise ValueError("whole pages are discarded")
        if not size or self._flagged(offset, size) & ROM:
            return
        advice = getattr(mmap, "MADV_DONTNEED" if self.private else "MADV_REMOVE", None)
        if advice is not None:
            self._map.madvise(advice, offset, size)
        self._written(offset, size)

    def load_image(self, address: int, data: bytes) -> None:
        """Write what the board's loader puts there before the guest runs, ROM or not."""
        if not self.contains(address, len(data)):
            raise BadAddress(address, len(data))
        offset = address - self.base
        self._map[offset : offset + len(data)] = data
        if data:
            self._written(offset, len(data))

    def _flagged(self, offset: int, size: int) -> int:
        """All flags of the pages that `size` (at least 1) bytes at `offset` touch."""
        first = offset >> PAGE_SHIFT
        last = (offset + size - 1) >> PAGE_SHIFT
        if first == last:
            return self._flags[first]
        flags = self._flags[first : last + 1]
        if flags.count(0) == len(flags):
            return 0
        union = 0
        for flag in set(flags):
            union |= flag
        return union

    def _write_around_rom(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        done = 0
        while done < len(data):
            here = offset + done
            part = min(PAGE_SIZE - here % PAGE_SIZE, len(data) - done)
            if not self._flags[here >> PAGE_SHIFT] & ROM:
                self._map[here : here + part] = data[done : done + part]
            done += part

    def _written(self, offset: int, size: int) -> None:
        flags = self._flagged(offset, size)
        if not flags & (CODE | LOGGED | WATCHED):
            return
        first = offset >> PAGE_SHIFT
        last = (offset + size - 1) >> PAGE_SHIFT
        if flags & LOGGED:
            with self._flag_lock:
                for page in range(first, last + 1):
                    if self._flags[page] & LOGGED:
                        self._dirty[page] = 1
                        self._flags[page] &= ~LOGGED
        if flags & CODE:
            for page in range(first, last + 1):
                if self._flags[page] & CODE and not self._flags[page] & ROM:
                    self._code_written(page, 1)
        if flags & WATCHED:
            self.on_watched_write(self.base + offset, size)

    def written(self, address: int, size: int) -> None:
        """Native code wrote `size` (at least 1) bytes at `address` in a flagged page by itself."""
        if size < 1 or not self.contains(address, size):
            raise BadAddress(address, size)
        self._written(address - self.base, size)

    # --------------------------------------------------------------------------------- flags

    def flags(self, page: int) -> int:
        """The flag byte of the page with this number (0 is the first of RAM)."""
        return self._flags[page]

    def protect(self, first: int, count: int, flag: int) -> None:
        """Set `flag` on pages; on return no store to them goes unseen."""
        self._mark(first, count, bytes(value | flag for value in range(256)))
        self._protected(first, count)

    def unprotect(self, first: int, count: int, flag: int) -> None:
        """Clear `flag` on pages."""
        self._mark(first, count, bytes(value & ~flag for value in range(256)))

    def _mark(self, first: int, count: int, table: bytes) -> None:
        if first < 0 or count < 0 or first + count > self.pages:
            raise BadAddress(self.base + first * PAGE_SIZE, count * PAGE_SIZE)
        with self._flag_lock:
            self._flags[first : first + count] = self._flags[first : first + count].translate(table)

    def start_dirty_log(self) -> None:
        """From now on remember which pages are written."""
        with self._flag_lock:
            self._logging = True
            self._dirty = bytearray(self.pages)
        self.protect(0, self.pages, LOGGED)

    def collect_dirty(self) -> list[int]:
        """The pages written since the log was started or last collected; they count as clean now.

        Copy a page's content after this call, not before: what is written in between is in the
        copy, in the next collection, or in both.
        """
        with self._flag_lock:
            if not self._logging:
                raise RuntimeError("the dirty log has not been started")
            pages = [page for page, dirty in enumerate(self._dirty) if dirty]
            for page in pages:
                self._dirty[page] = 0
                self._flags[page] |= LOGGED
        start = 0
        while start < len(pages):
            stop = start + 1
            while stop < len(pages) and pages[stop] == pages[stop - 1] + 1:
                stop += 1
            self._protected(pages[start], stop - start)
            start = stop
        return pages

    def stop_dirty_log(self) -> None:
        """Remember no longer."""
        with self._flag_lock:
            self._logging = False
        self.unprotect(0, self.pages, LOGGED)


def _membarrier() -> Callable[[], None] | None:
    number = _MEMBARRIER_CALL.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return None
    call = ctypes.CDLL(None, use_errno=True).syscall
    if call(number, _MEMBARRIER_REGISTER, 0, 0) != 0:
        return None
    return lambda: call(number, _MEMBARRIER_PRIVATE_EXPEDITED, 0, 0) and None


def _locked_barrier() -> Callable[[], None]:
    lock = threading.Lock()

    def barrier() -> None:
        with lock:
            pass

    return barrier


def _full_barrier() -> Callable[[], None]:
    # Taking a lock is a locked instruction on x86-64 and thereby a full barrier; weaker hosts get
    # one from the kernel, which puts it on every core that runs a thread of ours.
    if platform.machine() in {"x86_64", "AMD64"}:
        return _locked_barrier()
    return _membarrier() or _locked_barrier()


full_barrier: Final = _full_barrier()
"""Order all accesses to guest memory before this call against all after it (virtio 2.7.13)."""
