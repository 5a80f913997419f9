"""A disk as devices see it, and the simplest one: a raw image in a file.

Faults come in here: whatever has these methods can stand before a disk and fail, wait or lie.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Final, Protocol

from vmlab.machine.errors import ResourceNotFound, VmlabError

SECTOR: Final = 512
_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_ZEROS: Final = bytes(1 << 20)


class Disk(Protocol):
    """Bytes that can be read and written at offsets; any thread may call.

    Offsets and sizes lie within `size`; the caller has checked that. Errors of the host are
    OSError and become I/O errors of the guest's.
    """

    read_only: bool
    discard_alignment: int
    """Bytes: smaller parts of a discard have no effect."""

    @property
    def size(self) -> int:
        """Bytes of the disk, a multiple of 512."""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on."""

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` from `offset` on."""

    def flush(self) -> None:
        """What was written is on stable storage when this returns."""

    def discard(self, offset: int, size: int) -> None:
        """The content is not needed any more; what is read there later is not defined."""

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """Write zeros; `unmap` allows to give the space back."""

    def resize(self, size: int) -> None:
        """Give the disk another size, in bytes.

        Raises:
            VmlabError: it cannot have that size.
        """

    def close(self) -> None:
        """Release the file."""


def open_image(path: Path, *, read_only: bool) -> int:
    """A descriptor of an image, locked against writers (and, to write, against readers).

    Raises:
        ResourceNotFound: there is no such file.
        VmlabError: it cannot be opened or another process uses it.
    """
    try:
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ResourceNotFound(
            f"there is no disk image {str(path)!r}", hint="check the path of the disk"
        ) from None
    except OSError as error:
        raise VmlabError(
            f"the disk image {str(path)!r} cannot be opened: {error.strerror}",
            hint="check its permissions, or use it read-only",
        ) from None
    try:
        if not (stat.S_ISREG(os.fstat(fd).st_mode) or stat.S_ISBLK(os.fstat(fd).st_mode)):
            raise VmlabError(
                f"the disk image {str(path)!r} is neither a file nor a block device",
                hint="name a file",
            )
        fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise VmlabError(
            f"the disk image {str(path)!r} is in use by another machine",
            hint="stop that machine, or give this one an overlay of a base that both only read",
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_all(fd: int, offset: int, size: int) -> bytes:
    """`size` bytes at `offset`; behind the end of the file there are zeros."""
    data = os.pread(fd, size, offset)
    if len(data) == size:
        return data
    parts = [data]
    missing = size - len(data)
    while missing and data:
        data = os.pread(fd, missing, offset + size - missing)
        parts.append(data)
        missing -= len(data)
    return b"".join(parts) + bytes(missing)


def write_all(fd: int, offset: int, data: bytes) -> None:
    """Write all of `data` at `offset`."""
    done = os.pwrite(fd, data, offset)
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def punch_hole(fd: int, offset: int, size: int) -> bool:
    """Give the space back, which then reads as zeros; False if the host cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if call is None:
        return False
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if call(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, size) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}:
        return False
    raise OSError(code, os.strerror(code))


def zero_fill(fd: int, offset: int, size: int) -> None:
    """Write zeros, and take the space for them."""
    while size > 0:
        part = min(size, len(_ZEROS))
        write_all(fd, offset, _ZEROS[:part])
        offset += part
        size -= part


class RawDisk:
    """An image whose bytes are the disk's. A tail that is no whole sector is padded with zeros.

    Raises:
        VmlabError: as `open_image`.
    """

    discard_alignment = 4096

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.read_only = read_only
        self.path = path
        self._fd = open_image(path, read_only=read_only)
        end = os.lseek(self._fd, 0, os.SEEK_END)
        self._size = (end + SECTOR - 1) // SECTOR * SECTOR

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on."""
        return read_all(self._fd, offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` from `offset` on."""
        write_all(self._fd, offset, data)

    def flush(self) -> None:
        """fdatasync."""
        if not self.read_only:
            os.fdatasync(self._fd)

    def discard(self, offset: int, size: int) -> None:
        """Give the space back where the host can."""
        punch_hole(self._fd, offset, size)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """A hole if that is allowed, else zeros."""
        if not (unmap and punch_hole(self._fd, offset, size)):
            zero_fill(self._fd, offset, size)

    def resize(self, size: int) -> None:
        """Give the disk another size, in bytes; what is cut off is lost."""
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise VmlabError(
                f"the disk image {str(self.path)!r} cannot be {size} bytes large: {error.strerror}",
                hint="look how much space there is",
            ) from None
        self._size = size

    def close(self) -> None:
        """Release the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
