"""Executable memory: a memory file mapped twice, once to write and once to execute.

No page is ever writable and executable, nor made executable later, so this works under
PR_SET_MDWE (prctl(2)). Address space is reserved at once, so that all code reaches all other code
with the short branches of any host; memory is used as it is filled.

macOS has no memfd; there a file without a name takes its place.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

RESERVED: Final = 128 << 20
"""Bytes: the reach of an AArch64 branch."""

_MFD_EXEC: Final = 0x10  # memfd_create(2), Linux 6.3


def _memory_file() -> int:
    if not hasattr(os, "memfd_create"):
        import tempfile

        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())
    try:
        return os.memfd_create("vmlab-code", os.MFD_CLOEXEC | _MFD_EXEC)
    except OSError:  # an older kernel, where every memory file may be executed
        return os.memfd_create("vmlab-code", os.MFD_CLOEXEC)


class ArenaFull(Exception):
    """All of the reserved address space is used."""


class Arena:
    """A stretch of address space that code is put into and stays in.

    Args:
        size: bytes to reserve, a multiple of the page size.
    """

    def __init__(self, size: int = RESERVED) -> None:
        fd = _memory_file()
        try:
            os.ftruncate(fd, size)
            self._writable = mmap.mmap(fd, size, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            self._executable = mmap.mmap(fd, size, prot=mmap.PROT_READ | mmap.PROT_EXEC)
        finally:
            os.close(fd)
        self.size = size
        self.used = 0
        self.address = _address(self._executable)

    def reserve(self, size: int, alignment: int) -> int:
        """Take room for `size` bytes; its offset in the arena.

        Raises:
            ArenaFull: there is not so much left.
        """
        offset = -(-self.used // alignment) * alignment
        if offset + size > self.size:
            raise ArenaFull(f"{size} bytes of code do not fit after {self.used} of {self.size}")
        self.used = offset + size
        return offset

    def write(self, offset: int, data: bytes | bytearray) -> None:
        """Put bytes at an offset."""
        self._writable[offset : offset + len(data)] = bytes(data)

    def close(self) -> None:
        """Give the memory back; no code in it may run any more."""
        self._writable.close()
        self._executable.close()


def _address(mapping: mmap.mmap) -> int:
    # ctypes wants a writable buffer, which this one is not; the buffer protocol has its address.
    pointer = ctypes.py_object(mapping)
    view = _PyBuffer()
    if ctypes.pythonapi.PyObject_GetBuffer(pointer, ctypes.byref(view), 0) != 0:
        raise BufferError("the mapping has no buffer")
    try:
        assert view.buf is not None
        return view.buf
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))


class _PyBuffer(ctypes.Structure):
    """Py_buffer of the stable C API."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )
    buf: int | None
