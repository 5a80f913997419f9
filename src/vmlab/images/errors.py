"""What can go wrong with images, as kinds: all of them `VmlabError`s with a message and a hint.

A file that is not what was promised is always refused by name; nothing here is a warning.
"""

from __future__ import annotations

from typing import ClassVar

from vmlab.machine.errors import ResourceNotFound, VmlabError


class ImageError(VmlabError):
    """An image could not be fetched, built, read or stored."""


class RecipeError(ImageError):
    """A recipe is not valid: the field, its value, and what would be right."""

    exit_code: ClassVar[int] = 2


class ImageNotFound(ImageError, ResourceNotFound):
    """There is no image, recipe or stored file of that name."""

    exit_code: ClassVar[int] = 2


class FormatError(ImageError):
    """A file is not what its format demands (truncated, malformed, or unsafe to unpack)."""


class MirrorError(ImageError):
    """The package archive cannot be found or reached, or does not have what was asked for."""


class PackageGone(MirrorError):
    """The index names a file that the mirror no longer has: the index is out of date."""


class OutOfStep(PackageGone):
    """The mirror has the file that the index names, but another version of it."""


class SuiteMissing(MirrorError):
    """The mirrors can be reached, and none of them has the suite."""


class UntrustedArchive(ImageError):
    """An archive's signature, date or name is not what it has to be; nothing of it was used."""


class TamperedFile(ImageError):
    """A file's contents are not those that the signed index, or the store, promised."""


class StoreError(ImageError):
    """The image store cannot be written or read (no space, no permission, a lock not released)."""


class ToolMissing(ImageError):
    """A program that this kind of image needs is not installed on this host."""

    exit_code: ClassVar[int] = 4


class BuildFailed(ImageError):
    """A program that builds images ran and failed; its last output is in the message."""
