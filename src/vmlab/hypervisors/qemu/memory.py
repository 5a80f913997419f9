"""The state of a machine as files: the memory of its guest, and the rest as one stream.

Memory that QEMU holds in a memfd is copied from there, holes left out; the stream then has only
vCPUs and devices in it. A clone maps the copy privately, so that it costs what it writes; what it
wrote is put over another copy when the clone is copied (`private_memory`). Where that is not
possible the stream has the whole memory in it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from vmlab.hypervisors.operation import uninterrupted
from vmlab.hypervisors.qemu import vmstate
from vmlab.hypervisors.qemu.disks import qemu_img
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qemu.hotplug import drop_made_node
from vmlab.hypervisors.qemu.private_memory import (
    PrivateMemory,
    SmallBlocks,
    Unusual,
    carried,
    memfds,
    private_memory,
    save_devices,
    small_blocks,
)
from vmlab.hypervisors.qmp import EventListener, QmpError, QmpEvent, QmpLost
from vmlab.hypervisors.threads import done_in_thread, in_thread
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import OperationFailed

STREAM: Final = "state"
_CARRIER: Final = "carrier.qcow2"
_NODE: Final = "vmstate"
_TAG: Final = "state"
_CHUNK: Final = 1 << 20
_OWN: Final = "vmlab-memory"
_TEMPLATE: Final = "vmlab-template"
_SHARED: Final = ("/memfd:memory-backend-memfd", f"/memfd:{_OWN}")
"""Names of the memfds whose contents are a guest's memory at any time: QEMU's own, and ours."""
CARRIED: Final = 32 << 20
"""Bytes that a copy may have written so that its copies map the same template and load the rest; of
one that wrote more a template of its own is made, since each of its copies would hold them."""


def _extents(source: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that hold data: offset and end."""
    offset = 0
    while offset < size:
        try:
            start = os.lseek(source, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        offset = os.lseek(source, start, os.SEEK_HOLE)
        yield start, offset


def copy_sparse(source: Path, target: int | Path, check: Callable[[], None]) -> None:
    """Copy a file with its holes.

    Args:
        source: What to copy.
        target: A file that is written anew, or an open descriptor.
        check: Called often; may raise to end the copy.
    """
    reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        writing = target if isinstance(target, int) else os.open(target, flags, 0o600)
        try:
            size = os.fstat(reading).st_size
            os.ftruncate(writing, size)
            for start, end in _extents(reading, size):
                os.lseek(writing, start, os.SEEK_SET)
                while start < end:
                    check()
                    start += os.sendfile(writing, reading, start, min(_CHUNK, end - start))
        finally:
            if writing is not target:
                os.close(writing)
    finally:
        os.close(reading)


def digest_of(path: Path, check: Callable[[], None]) -> str:
    """SHA-256 over a file's size and its pages that are not zero, each with its offset.

    The same for a file with holes and one without.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8))
        for start, end in _extents(file.fileno(), size):
            for offset in range(start, end, _CHUNK):
                check()
                data = os.pread(file.fileno(), min(_CHUNK, end - offset), offset)
                _digest_part(digest, offset, data)
    return digest.hexdigest()


_PAGE: Final = 4096
_ZEROS: Final = bytes(_PAGE)


def _digest_part(digest: Any, offset: int, data: bytes) -> None:
    """Add to a digest what of `data` is not zero, page by page."""
    for start in range(0, len(data), _PAGE):
        page = data[start : start + _PAGE]
        if page != _ZEROS[: len(page)]:
            digest.update((offset + start).to_bytes(8))
            digest.update(page)


# ------------------------------------------------------------------- saving


def shared_memory(emulator: Emulator) -> list[Path]:
    """The memfds of a process's guest memory, in the order of its memory objects."""
    found = memfds(emulator.process.pid, *_SHARED)
    return sorted(found, key=lambda entry: int(entry.name))


async def set_capabilities(emulator: Emulator, **switches: bool) -> None:
    """Turn migration capabilities on and off; an underscore stands for a dash."""
    await emulator.execute(
        "migrate-set-capabilities",
        {
            "capabilities": [
                {"capability": name.replace("_", "-"), "state": state}
                for name, state in switches.items()
            ]
        },
    )


async def save_stream(emulator: Emulator, directory: Path, *, whole: bool) -> Path:
    """Write the state of a machine that stands still; returns the file.

    Args:
        emulator: Its process.
        directory: Where the file goes.
        whole: With the memory, or without what lies in shared memory.

    Raises:
        OperationFailed: QEMU cannot save it, with why; nothing of the machine has changed.
    """
    carrier = directory / _CARRIER
    await qemu_img("create", "-q", "-f", "qcow2", str(carrier), "1M")
    node = {
        "driver": "qcow2",
        "node-name": _NODE,
        "file": {"driver": "file", "filename": str(carrier)},
    }
    try:
        await set_capabilities(emulator, x_ignore_shared=not whole)
        try:
            await emulator.execute("blockdev-add", node)
            await emulator.run_job(
                "snapshot-save", {"tag": _TAG, "vmstate": _NODE, "devices": [_NODE]}
            )
        finally:
            await uninterrupted(drop_made_node(emulator, _NODE))
        stream = directory / STREAM
        await in_thread(lambda check: vmstate.extract(carrier, stream, _TAG))
    finally:
        carrier.unlink(missing_ok=True)
    return stream


@dataclass(frozen=True, slots=True)
class Captured:
    """The state of a machine that stands still, for as long as it does.

    Attributes:
        stream: File with the state of vCPUs and devices.
        sources: Files with its memory; none if it is in the stream.
        private: What is written over each of those, where they are templates.
        devices: What QEMU wrote of its devices, where they are templates.
    """

    stream: Path
    sources: tuple[Path, ...]
    private: tuple[PrivateMemory, ...] = ()
    devices: bytes = b""

    @property
    def whole(self) -> bool:
        """Whether the stream has the memory in it."""
        return not self.sources

    def copy(self, number: int, target: int, check: Callable[[], None]) -> None:
        """Write the memory object of that number to the descriptor `target`, an empty file."""
        copy_sparse(self.sources[number], target, check)
        if self.private:
            self.private[number].overlay(target, check)


async def capture(emulator: Emulator, directory: Path, blocks: SmallBlocks | None) -> Captured:
    """Write the state of a machine that stands still, but for its memory if that can be.

    Args:
        emulator: Its process.
        directory: Where the stream goes.
        blocks: Its small blocks, if they are known.

    Raises:
        OperationFailed: QEMU cannot save it, with why; nothing of the machine has changed.
    """
    sources = await done_in_thread(shared_memory, emulator)
    if not sources and blocks is not None:
        try:
            return await _capture_private(emulator, directory, blocks)
        except (Unusual, QmpError, OSError):
            # Firmware or its flash changed, or this host lets nobody look into a process: QEMU
            # saves all of it, which takes longer.
            (directory / STREAM).unlink(missing_ok=True)
    mixed = await done_in_thread(_is_mixed, emulator)
    if sources and mixed:
        # Some of its memory is a template's, some came later: the stream takes all of it.
        sources = []
    stream = await save_stream(emulator, directory, whole=not sources)
    return Captured(stream, tuple(sources))


def _is_mixed(emulator: Emulator) -> bool:
    """Whether a process with memory of its own maps a template as well."""
    return any(memfds(emulator.process.pid, f"/memfd:{_TEMPLATE}"))


async def _capture_private(emulator: Emulator, directory: Path, blocks: SmallBlocks) -> Captured:
    private = await done_in_thread(private_memory, emulator.process.pid, _TEMPLATE)
    if not private:
        raise Unusual("its memory is not mapped from a template")
    devices = await save_devices(emulator, directory, blocks)
    stream = directory / STREAM
    await done_in_thread(stream.write_bytes, blocks.stream(devices))
    return Captured(stream, tuple(part.template for part in private), tuple(private), devices)


async def blocks_in(stream: Path, architecture: Architecture) -> SmallBlocks | None:
    """The small blocks in a stream that has no guest's memory in it."""
    return await done_in_thread(lambda: small_blocks(stream.read_bytes(), architecture))


# ------------------------------------------------------------------- loading


async def load_stream(emulator: Emulator, stream: Path, *, whole: bool) -> None:
    """Give a process that waits for it the state in `stream`; its vCPUs stand still.

    Raises:
        OperationFailed: QEMU does not take it, with what it said.
    """
    await set_capabilities(emulator, x_ignore_shared=not whole, events=True)
    await receive(emulator, f"exec:cat {shlex.quote(str(stream))}")


async def receive(emulator: Emulator, uri: str) -> None:
    """Let a process that waits for it read its state from `uri`, and wait until it has it."""
    with emulator.qmp.listen("MIGRATION", match=is_final) as arrived:
        await emulator.execute("migrate-incoming", {"uri": uri})
        await until_arrived(emulator, arrived)


async def until_arrived(emulator: Emulator, arrived: EventListener) -> None:
    """Wait until a process has all of its state.

    Raises:
        OperationFailed: QEMU does not take it, with what it said.
    """
    try:
        event = await arrived.wait()
    except QmpLost as error:
        raise await emulator.crashed("loading its state", error) from error
    if event.data["status"] != "completed":
        raise OperationFailed(
            f"QEMU does not take the state: {emulator.last_words()}",
            machine=emulator.machine,
            hypervisor="qemu",
        )


def is_final(event: QmpEvent) -> bool:
    """Whether a MIGRATION event is the last one."""
    return event.data.get("status") in {"completed", "failed", "cancelled"}


# ------------------------------------------------------------------- templates


class Frozen:
    """Memory in memfds of ours, by which a QEMU process can open it.

    What is sealed cannot be changed by anybody: a process that maps it privately and gives memory
    back, as a balloon does, would otherwise punch holes into what all of them share.
    """

    def __init__(self) -> None:
        self._descriptors: list[int] = []

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files to open; they last until `close`."""
        return tuple(Path(f"/proc/{os.getpid()}/fd/{number}") for number in self._descriptors)

    def add(self, write: Callable[[int], None], *, seal: bool) -> None:
        """Make one memfd more and have `write` fill it by its descriptor."""
        name = _TEMPLATE if seal else _OWN
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._descriptors.append(descriptor)
        write(descriptor)
        if seal:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _ALL_SEALS)

    def share(self, template: Path) -> None:
        """Take a memfd that is sealed already."""
        self._descriptors.append(os.open(template, os.O_RDWR | os.O_CLOEXEC))

    def close(self) -> None:
        """Let go of it; processes that have it keep it."""
        while self._descriptors:
            os.close(self._descriptors.pop())


_ALL_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


async def copied(sources: Sequence[Path], *, seal: bool) -> Frozen:
    """The contents of `sources`, in memory."""

    def write(frozen: Frozen, check: Callable[[], None]) -> None:
        for source in sources:
            frozen.add(partial(copy_sparse, source, check=check), seal=seal)

    return await _filled(write)


async def _filled(write: Callable[[Frozen, Callable[[], None]], None]) -> Frozen:
    frozen = Frozen()
    try:
        await in_thread(lambda check: write(frozen, check))
    except BaseException:
        frozen.close()
        raise
    return frozen


@dataclass(frozen=True, slots=True)
class Template:
    """A machine frozen for forks, which map its memory privately, and the stream of the rest.

    Attributes:
        memory: The memory.
        stream: The rest, and what is written over the memory.
        whole: Whether the memory is in the stream.
        blocks: The small blocks in the stream, if they are known.
        before_devices: Bytes of the stream that have no devices in them, at least.
    """

    memory: Frozen
    stream: Path
    whole: bool
    blocks: SmallBlocks | None
    before_devices: int = 0

    def close(self) -> None:
        """Let go of it."""
        self.memory.close()
        self.stream.unlink(missing_ok=True)


async def freeze(
    emulator: Emulator, directory: Path, blocks: SmallBlocks | None, architecture: Architecture
) -> Template:
    """Make a template of a machine that stands still.

    Args:
        emulator: Its process.
        directory: Where the stream goes.
        blocks: Its small blocks, if they are known.
        architecture: The guest's.
    """
    captured = await capture(emulator, directory, blocks)

    before = 0

    def write(frozen: Frozen, check: Callable[[], None]) -> None:
        nonlocal before
        written = carried(captured.private, CARRIED) if captured.private else None
        if written is not None and blocks is not None:
            stream = blocks.stream(captured.devices, written)
            before = len(stream) - len(captured.devices)
            captured.stream.write_bytes(stream)
            for source in captured.sources:
                frozen.share(source)
            return
        for number in range(len(captured.sources)):
            frozen.add(partial(captured.copy, number, check=check), seal=True)

    memory: Frozen | None = None
    try:
        memory = await _filled(write)
        if blocks is None and not captured.whole:
            blocks = await blocks_in(captured.stream, architecture)
    except BaseException:
        if memory is not None:
            memory.close()
        captured.stream.unlink()
        raise
    return Template(memory, captured.stream, captured.whole, blocks, before)
