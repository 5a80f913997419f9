"""Streams that decompress gzip, xz, bzip2 and zstd, and say so clearly when they cannot.

Not a compressor. The format is told by the first bytes, never by a file's name.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import BinaryIO

from vmlab.images.errors import FormatError

MAGICS = {
    "gzip": b"\x1f\x8b",
    "xz": b"\xfd7zXZ\x00",
    "bzip2": b"BZh",
    "zstd": b"\x28\xb5\x2f\xfd",
    "lzma": b"\x5d\x00\x00",
}
_CHUNK = 1 << 17
# 256 MiB: a decoder may be told by the file to take this much memory, and no more.
_DECODER_MEMORY = 256 << 20


def identify(head: bytes) -> str | None:
    """The compression that data beginning with `head` has, or None for none that is known."""
    return next((name for name, magic in MAGICS.items() if head.startswith(magic)), None)


def decompressed(stream: BinaryIO, *, source: str) -> BinaryIO:
    """A reader of what `stream` holds, decompressed if it is compressed.

    Args:
        stream: The data; need not be seekable. It is not closed with the reader.
        source: The data's name, for errors.

    Raises:
        FormatError: while reading, when the data is corrupt or cut short.
    """
    buffered = io.BufferedReader(_Unowned(stream), _CHUNK)
    kind = identify(buffered.peek(8)[:8])
    if kind is None:
        return buffered
    if kind == "gzip":
        return _checked(gzip.GzipFile(fileobj=buffered, mode="rb").read, kind, source)
    return _checked(_Decoder(buffered, kind).read, kind, source)


def decompress(data: bytes, *, source: str, limit: int) -> bytes:
    """`data` decompressed, if it is compressed; at most `limit` bytes of it.

    Raises:
        FormatError: the data is corrupt, cut short, or grows beyond `limit`.
    """
    result = decompressed(io.BytesIO(data), source=source).read(limit + 1)
    if len(result) > limit:
        raise FormatError(f"{source} decompresses to more than {limit} bytes")
    return result


class _Unowned(io.RawIOBase):
    """A stream that leaves the one underneath open when it is closed or collected."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed: Buffer
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Decoder:
    """Pulls compressed chunks through one of the incremental decoders of a format."""

    def __init__(self, stream: io.BufferedReader[_Unowned], kind: str) -> None:
        self._stream = stream
        self._kind = kind
        self._new: Callable[[], _Incremental] = lambda: _incremental(kind)
        self._decoder = self._new()
        self._fresh = True
        self._rest = b""
        self._ended = False

    def read(self, size: int) -> bytes:
        while not self._ended:
            if self._decoder.eof:
                self._next_stream()
                continue
            data = self._rest
            self._rest = b""
            if not data and self._decoder.needs_input:
                data = self._stream.read(_CHUNK)
                if not data:
                    if self._fresh:
                        self._ended = True
                        break
                    raise EOFError("the data ends in the middle")
            self._fresh = False
            result = self._decoder.decompress(data, size)
            if result:
                return result
        return b""

    def _next_stream(self) -> None:
        """Go on with what follows a finished stream: padding, another stream, or the end."""
        self._rest = self._decoder.unused_data or self._stream.read(_CHUNK)
        if self._kind == "xz":
            self._rest = self._rest.lstrip(b"\0")  # stream padding, .xz file format 2.2
        if not self._rest:
            self._ended = not self._stream.peek(1)
            if self._ended:
                return
        self._decoder = self._new()
        self._fresh = not self._rest


class _Incremental:
    """The shape that lzma's and bz2's decoders share, given to zstd's as well."""

    def __init__(self, kind: str) -> None:
        if kind == "bzip2":
            self._decoder: lzma.LZMADecompressor | bz2.BZ2Decompressor = bz2.BZ2Decompressor()
        elif kind == "lzma":
            self._decoder = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_DECODER_MEMORY)
        else:
            self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_DECODER_MEMORY)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def needs_input(self) -> bool:
        return self._decoder.needs_input

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def decompress(self, data: bytes, size: int) -> bytes:
        return self._decoder.decompress(data, max_length=size)


class _Zstd(_Incremental):
    """zstd's decoder; it cannot stop in the middle of its input, so it is fed small pieces."""

    _PIECE = 1024  # bounds one call to 32 MiB: 128 KiB for each run-length block of 4 bytes

    def __init__(self) -> None:
        import zstandard

        self._zstd = zstandard.ZstdDecompressor(max_window_size=128 << 20).decompressobj()
        self._waiting = b""

    @property
    def eof(self) -> bool:
        return self._zstd.eof

    @property
    def needs_input(self) -> bool:
        return not self._waiting

    @property
    def unused_data(self) -> bytes:
        return self._zstd.unused_data + self._waiting

    def decompress(self, data: bytes, size: int) -> bytes:
        self._waiting += data
        piece, self._waiting = self._waiting[: self._PIECE], self._waiting[self._PIECE :]
        return self._zstd.decompress(piece)


def _incremental(kind: str) -> _Incremental:
    return _Zstd() if kind == "zstd" else _Incremental(kind)


def _checked(read: Callable[[int], bytes], kind: str, source: str) -> BinaryIO:
    return io.BufferedReader(_Checked(read, kind, source), _CHUNK)


class _Checked(io.RawIOBase):
    """A decoder as a stream whose failures are `FormatError`s that name the source."""

    def __init__(self, read: Callable[[int], bytes], kind: str, source: str) -> None:
        super().__init__()
        self._read = read
        self._kind = kind
        self._source = source
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed: Buffer
        if not self._pending:
            self._pending = memoryview(self._next(len(buffer)))
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _next(self, size: int) -> bytes:
        try:
            return self._read(size)
        except FormatError:
            raise
        except (EOFError, lzma.LZMAError, zlib.error, ValueError, OSError) as error:
            # OSError: gzip.BadGzipFile and bz2 raise it for bad data; a read error of the
            # file underneath carries an errno and is passed on as it is.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise FormatError(f"{self._source} is corrupt {self._kind} data: {error}") from error
        except Exception as error:
            if type(error).__name__ != "ZstdError":  # known only where zstandard is imported
                raise
            raise FormatError(f"{self._source} is corrupt zstd data: {error}") from error
