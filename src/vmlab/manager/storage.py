"""The files of the store's disks: one image each, used in place by the machine that has the disk.

A file's name is made of the disk's id and nothing else, and an id is 32 hexadecimal digits that the
manager itself made: no path can be made of anything that somebody wrote. What is half made has a
name of its own (".part") and is made anew by the next try.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

from vmlab.hypervisors.qemu.disks import image_info, qemu_img
from vmlab.hypervisors.qemu.memory import copy_sparse
from vmlab.hypervisors.threads import done_in_thread, in_thread
from vmlab.machine.errors import OperationFailed, ResourceExhausted, ResourceNotFound, VmlabError
from vmlab.machine.sizes import format_size
from vmlab.manager.store.words import is_id

__all__ = ["BootFiles", "Format", "Storage", "StoredFile", "Usage", "file_error"]

Format = Literal["raw", "qcow2"]
_FORMATS: Final = ("raw", "qcow2")
_NAME: Final = re.compile(r"([0-9a-f]{32})\.(raw|qcow2)(\.part)?")
_BLOCK: Final = 512
"""Unit of st_blocks (stat(2))."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file among those of the disks.

    Attributes:
        path: Where it is.
        disk: Id of the disk that it is named after; None for a file of another name.
        format: "raw" or "qcow2"; "" for a file of another name.
        part: Whether it is half made.
        allocated: Bytes that it takes up.
    """

    path: Path
    disk: str | None
    format: str
    part: bool
    allocated: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What all of them take up, and what is left; bytes."""

    files: tuple[StoredFile, ...]
    allocated: int
    free: int
    total: int


class Storage:
    """Makes, copies, grows and removes the files of disks.

    Args:
        directory: Where they are; made if it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    async def start(self) -> None:
        """Make the directory."""
        await done_in_thread(partial(self.directory.mkdir, mode=0o700, exist_ok=True))

    async def close(self) -> None:
        """Nothing of it is open."""

    def path(self, disk_id: str, format: str) -> Path:
        """The file of a disk.

        Raises:
            ValueError: it is no id or no format: nothing that a person wrote gets here.
        """
        if not is_id(disk_id):
            raise ValueError(f"{disk_id!r} is no id of a disk")
        if format not in _FORMATS:
            raise ValueError(f"{format!r} is no format of a disk")
        return self.directory / f"{disk_id}.{format}"

    def check_format(self, format: str) -> None:
        """Refuse a format that cannot be made here.

        Raises:
            OperationFailed: qcow2 needs qemu-img.
        """
        if format == "qcow2" and shutil.which("qemu-img") is None:
            raise OperationFailed(
                "a disk in qcow2 is made by qemu-img, which is not installed",
                hint='make it with format "raw", or install the Debian package qemu-utils',
                operation="disk.create",
            )

    async def create(self, disk_id: str, format: str, size: int) -> Path:
        """Make an empty disk of `size` bytes; one that was made already stays as it is.

        Raises:
            OperationFailed: it cannot be made.
            ResourceExhausted: there is no space for it.
        """
        path = self.path(disk_id, format)
        if format == "raw":
            return await self._made(path, lambda part: done_in_thread(_make_holes, part, size))

        async def make(part: Path) -> None:
            await qemu_img("create", "-q", "-f", "qcow2", str(part), str(size))

        return await self._made(path, make)

    async def copy(self, source: Path, source_format: str, disk_id: str, format: str) -> Path:
        """Make a disk of the contents of an image that nobody writes to meanwhile.

        Raises:
            ResourceNotFound: there is no such image.
            OperationFailed: it cannot be read, or the copy cannot be made.
            ResourceExhausted: there is no space for it.
        """
        path = self.path(disk_id, format)

        async def make(part: Path) -> None:
            if source_format == format == "raw":
                await in_thread(lambda check: copy_sparse(source, part, check))
            else:
                words = ("convert", "-q", "-f", source_format, "-O", format)
                await qemu_img(*words, str(source), str(part))

        if not await done_in_thread(source.is_file):
            raise ResourceNotFound(
                f"the file {source} is gone",
                hint="the observer's findings tell of missing disks",
                operation="disk.create",
            )
        return await self._made(path, make)

    async def _made(self, path: Path, make: Callable[[Path], Awaitable[object]]) -> Path:
        if await done_in_thread(path.exists):
            # A recovered operation got as far as this before.
            return path
        part = path.with_name(path.name + ".part")
        await done_in_thread(partial(part.unlink, missing_ok=True))
        try:
            await make(part)
            await done_in_thread(_settle, part, path)
        except OSError as error:
            raise file_error(error, path) from error
        finally:
            await done_in_thread(partial(part.unlink, missing_ok=True))
        return path

    async def size(self, disk_id: str, format: str) -> int:
        """Bytes of the disk in its file, which may be in use.

        Raises:
            ResourceNotFound: the file is gone.
            OperationFailed: it is no image of that format.
        """
        path = self.path(disk_id, format)
        try:
            if format == "raw":
                return (await done_in_thread(path.stat)).st_size
            await done_in_thread(path.stat)
        except FileNotFoundError as error:
            raise ResourceNotFound(
                f"the file of the disk is gone: {path}",
                hint="restore it from a backup, or delete the disk",
            ) from error
        return int((await image_info(path, format))["virtual-size"])

    async def resize(self, disk_id: str, format: str, size: int) -> None:
        """Grow a disk that no machine has; one that has that size already stays as it is.

        Raises:
            ResourceNotFound: its file is gone.
            OperationFailed: it is larger than that, or cannot grow.
        """
        path, present = self.path(disk_id, format), await self.size(disk_id, format)
        if size < present:
            raise OperationFailed(
                f"a disk of {format_size(present)} cannot be {format_size(size)}",
                hint="a disk can only grow",
                operation="disk.resize",
            )
        if size == present:
            return
        if format == "raw":
            try:
                await done_in_thread(os.truncate, path, size)
            except OSError as error:
                raise file_error(error, path) from error
        else:
            await qemu_img("resize", "-q", "-f", format, str(path), str(size))

    async def remove(self, disk_id: str, format: str) -> None:
        """Remove the file of a disk, whole or half made; again does nothing.

        Raises:
            OperationFailed: it cannot be removed.
        """
        path = self.path(disk_id, format)
        for file in (path, path.with_name(path.name + ".part")):
            try:
                await done_in_thread(partial(file.unlink, missing_ok=True))
            except OSError as error:
                raise file_error(error, file) from error

    async def usage(self) -> Usage:
        """The files that are there, whatever their names, and what they take up."""
        return await done_in_thread(self._usage)

    def _usage(self) -> Usage:
        found = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                try:
                    told = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    # It was removed just now.
                    continue
                name = _NAME.fullmatch(entry.name)
                found.append(
                    StoredFile(
                        path=Path(entry.path),
                        disk=name[1] if name else None,
                        format=name[2] if name else "",
                        part=bool(name and name[3]),
                        allocated=told.st_blocks * _BLOCK,
                    )
                )
        found.sort(key=lambda file: file.path)
        room = shutil.disk_usage(self.directory)
        return Usage(tuple(found), sum(file.allocated for file in found), room.free, room.total)


class BootFiles:
    """Kernels and the like of machines that were imported: a directory for each machine.

    Args:
        directory: Where they are; made when it is needed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, machine_id: str, purpose: Literal["kernel", "initrd", "firmware"]) -> Path:
        """The file of a machine's for a purpose.

        Raises:
            ValueError: it is no id: nothing that a person wrote gets here.
        """
        return self._of(machine_id) / purpose

    def _of(self, machine_id: str) -> Path:
        if not is_id(machine_id):
            raise ValueError(f"{machine_id!r} is no id of a machine")
        return self.directory / machine_id

    async def keep(
        self, machine_id: str, purpose: Literal["kernel", "initrd", "firmware"], source: Path
    ) -> Path:
        """Copy a file for a machine; again replaces it.

        Raises:
            OperationFailed: it cannot be copied.
            ResourceExhausted: there is no space for it.
        """
        target = self.path(machine_id, purpose)
        try:
            await done_in_thread(partial(target.parent.mkdir, parents=True, exist_ok=True))
            await in_thread(lambda check: copy_sparse(source, target, check))
        except OSError as error:
            raise file_error(error, target) from error
        return target

    async def remove(self, machine_id: str) -> None:
        """Remove those of a machine; one that has none is no error.

        Raises:
            OperationFailed: they cannot be removed.
        """
        directory = self._of(machine_id)
        try:
            await done_in_thread(shutil.rmtree, directory)
        except FileNotFoundError:
            return
        except OSError as error:
            raise file_error(error, directory) from error


def _make_holes(path: Path, size: int) -> None:
    with path.open("xb") as file:
        file.truncate(size)


def _settle(part: Path, path: Path) -> None:
    """Give a file that is whole its name, durably."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.chmod(0o600)
    part.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def file_error(error: OSError, path: Path) -> VmlabError:
    """An error of the file system's as one of ours."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return ResourceExhausted(
            f"there is no room for {path.name} in {path.parent}: {error.strerror}",
            hint="delete disks and exports that are not needed, or ask for less",
        )
    return OperationFailed(
        f"{path}: {error.strerror or error}", hint="check its directory's permissions"
    )
