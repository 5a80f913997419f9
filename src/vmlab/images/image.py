"""Image: what a hypervisor boots, and the manifest that says what its files have to be.

Not how images come about: that is the store's business.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmlab.images.errors import ImageError, StoreError, TamperedFile
from vmlab.machine.architecture import Architecture

MANIFEST = "manifest.json"
_VERSION = 1
_ROLES = ("kernel", "bzimage", "initrd", "disk")


@dataclass(frozen=True)
class StoredFile:
    """One of an image's files: its name in the image's directory, size in bytes, SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Image:
    """A built or imported image in a store.

    Args:
        digest: Over recipe, index and inputs, or over the imported files; hexadecimal.
        name: Of the recipe, or as it was imported.
        architecture: Of the guest.
        directory: Where the files are. Never write to them: use overlays and copies.
        files: By role: "kernel", "initrd", "disk", and "bzimage" where the kernel is an ELF file.
        disk_format: "raw" or "qcow2", where there is a disk.
        cmdline: What the kernel's command line needs for this image; the console is for the
            hypervisor to add. None of it is needed for a disk that boots by itself.
        channels: The ways in which a guest of this image can be talked to, the best first.
        kernel_release: As `uname -r` prints it, or "".
        origin: "recipe" or "import".
        source: What it was made from: suite, index digest and date, packages and versions.
    """

    digest: str
    name: str
    architecture: Architecture
    directory: Path
    files: Mapping[str, StoredFile]
    disk_format: str | None = None
    cmdline: str = ""
    channels: tuple[str, ...] = ()
    kernel_release: str = ""
    origin: str = "recipe"
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kernel(self) -> Path | None:
        """The kernel to boot, or None for a disk that boots by itself.

        On x86_64 the uncompressed ELF kernel where it can be entered directly (PVH), which saves
        an emulated CPU two seconds.
        """
        return self._path("kernel")

    @property
    def packaged_kernel(self) -> Path | None:
        """The kernel as its package has it: for firmware, kexec, and hypervisors without PVH."""
        return self._path("bzimage") or self.kernel

    @property
    def initrd(self) -> Path | None:
        """The initramfs, or None."""
        return self._path("initrd")

    @property
    def disk(self) -> Path | None:
        """The root disk, to be used read-only underneath an overlay; or None."""
        return self._path("disk")

    @property
    def size(self) -> int:
        """Bytes of all files (of a sparse disk: its full size)."""
        return sum(file.size for file in self.files.values())

    def _path(self, role: str) -> Path | None:
        file = self.files.get(role)
        return self.directory / file.name if file is not None else None

    @contextmanager
    def hold(self) -> Iterator[Image]:
        """Keep the image from being removed while the block runs, or this process lives.

        Any number of processes may hold an image. Neither `remove` nor `prune` nor the store's
        size limit takes it away as long as one does, nor while a program like QEMU has its disk
        open: a machine that outlives the process that started it keeps its image. A process that
        dies holds nothing any more (the lock is the kernel's, flock(2)). Holding does not keep
        anybody from building the same image again after it was found changed.

        Raises:
            StoreError: it was removed since it was looked up, or is being removed right now.
        """
        import fcntl

        path = self.directory / MANIFEST
        gone = StoreError(
            f"image {self.name!r} is being removed, or has just been",
            hint="run the command again: it is built anew, if a recipe can do that",
        )
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise gone from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                    raise gone
            except (BlockingIOError, FileNotFoundError):
                raise gone from None
            yield self

    def to_manifest(self) -> dict[str, Any]:
        """The image as JSON-ready data, without anything that depends on where or when."""
        return {
            "version": _VERSION,
            "digest": self.digest,
            "name": self.name,
            "architecture": self.architecture.value,
            "files": {
                role: {"name": file.name, "size": file.size, "sha256": file.sha256}
                for role, file in sorted(self.files.items())
            },
            "disk_format": self.disk_format,
            "cmdline": self.cmdline,
            "channels": list(self.channels),
            "kernel_release": self.kernel_release,
            "origin": self.origin,
            "source": dict(self.source),
        }


def encode(image: Image) -> bytes:
    """The manifest's bytes; the same image gives the same bytes."""
    return (json.dumps(image.to_manifest(), indent=2, sort_keys=True) + "\n").encode()


def read(directory: Path) -> Image:
    """The image in a directory of the store, by its manifest; its files are not looked at.

    Raises:
        TamperedFile: the manifest is not one that vmlab wrote.
        FileNotFoundError: there is none.
    """
    path = directory / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != _VERSION:
            raise ImageError(
                f"{path} has the version {data['version']!r}, this vmlab knows {_VERSION}",
                hint="remove the image, or use the vmlab that made it",
            )
        files = {
            role: StoredFile(str(file["name"]), int(file["size"]), str(file["sha256"]))
            for role, file in data["files"].items()
        }
        image = Image(
            digest=str(data["digest"]),
            name=str(data["name"]),
            architecture=Architecture(data["architecture"]),
            directory=directory,
            files=files,
            disk_format=data["disk_format"],
            cmdline=str(data["cmdline"]),
            channels=tuple(str(channel) for channel in data["channels"]),
            kernel_release=str(data["kernel_release"]),
            origin=str(data["origin"]),
            source=dict(data["source"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TamperedFile(
            f"{path} is not a manifest: {error!r}", hint="`vmlab image remove` and build it again"
        ) from error
    if image.digest != directory.name or any(
        role not in _ROLES or "/" in file.name or file.name in ("", ".", "..")
        for role, file in files.items()
    ):
        raise TamperedFile(
            f"{path} is not the manifest of {directory.name}",
            hint="`vmlab image remove` and build it again",
        )
    return image
