"""Disk images by the engine's own means: sparse raw files, and overlays on what is only read."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from vmlab.engine.devices.storage.overlay import create_overlay, open_disk
from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.errors import OperationFailed, VmlabError


class EngineImages:
    """Makes images and looks at them."""

    async def create(self, path: Path, size: int, base: Path | None, base_format: str) -> str:
        """Make an image; an empty disk is a raw file of holes."""
        if base is None:
            await done_in_thread(_make_holes, path, size)
            return "raw"
        await done_in_thread(create_overlay, path, base, base_format, size)
        return "qcow2"

    async def virtual_size(self, path: Path, form: str) -> int:
        """The bytes of the disk in an image."""
        return await done_in_thread(_size_of, path, form)


def _make_holes(path: Path, size: int) -> None:
    with path.open("xb") as file:
        file.truncate(size)


def _size_of(path: Path, form: str) -> int:
    try:
        with closing(open_disk(path, form, read_only=True)) as disk:
            return disk.size
    except OperationFailed:
        raise
    except VmlabError as error:
        raise OperationFailed(error.message, hint=error.hint, hypervisor="embedded") from error


def grow(disk: DiskFile, size: int) -> None:
    """Make a disk whose machine is at rest larger.

    Raises:
        VmlabError: it cannot have that size.
    """
    with closing(open_disk(disk.path, disk.format)) as opened:
        opened.resize(size)
