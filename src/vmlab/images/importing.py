"""Images from elsewhere: a kernel, an initramfs, a disk, a cloud image, a tarred root.

What is imported is copied into the store and kept until it is removed; nothing could bring it
back.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmlab.images import recipe as recipes
from vmlab.images.builder import (
    guest_agent,
    inputs,
    kernel_files,
    lend_initramfs,
    readable,
)
from vmlab.images.errors import FormatError, ImageError, ImageNotFound, RecipeError
from vmlab.images.formats import disk as disks
from vmlab.images.formats import kernel as kernels
from vmlab.images.formats.compression import identify
from vmlab.images.image import Image
from vmlab.images.progress import Progress, silent
from vmlab.images.recipe import Recipe
from vmlab.images.store.disk import lock, replacing, sha256
from vmlab.images.store.store import ImageStore
from vmlab.images.tiny.build import KernelFiles
from vmlab.machine.architecture import Architecture
from vmlab.machine.spec import NAME_PATTERN

_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_LZO = b"\x89LZO"


@dataclass(frozen=True)
class Parts:
    """What an imported image consists of; every path is a file on this host."""

    kernel: Path | None = None
    initrd: Path | None = None
    disk: Path | None = None
    root: Path | None = None

    def given(self) -> dict[str, Path]:
        """The parts that there are, by role."""
        return {role: path for role, path in vars(self).items() if path is not None}


def import_image(
    store: ImageStore,
    name: str,
    parts: Parts,
    *,
    architecture: Architecture | None = None,
    cmdline: str | None = None,
    channels: tuple[str, ...] | None = None,
    size: int | None = None,
    progress: Progress = silent,
) -> Image:
    """Copy an image into the store under a name.

    Args:
        store: Where to.
        name: What it is called from now on; an earlier image of that name loses it.
        parts: The files. A disk may be alone (a cloud image boots by its own boot loader); a
            tarred root gets the kernel that is given or the one in its /boot.
        architecture: Needed for a disk without a kernel; else read from the kernel.
        cmdline: The kernel's command line, without the console.
        channels: How a guest of this image can be talked to, the best first; None to guess.
        size: Bytes of the disk that is made of a tarred root; None for twice what it holds.
        progress: Told of every step.

    Raises:
        FormatError: a file is not what it is given as.
        ImageError: something is missing, or contradicts something else.
    """
    _check_name(name)
    given = parts.given()
    if not given:
        raise ImageError(
            "there is nothing to import", hint="give a kernel, a disk or a tarred root"
        )
    for role, path in given.items():
        if not path.is_file():
            raise ImageNotFound(f"{role} = {str(path)!r} is not a file", hint="check the path")
    if parts.disk is not None and parts.root is not None:
        raise ImageError("a disk and a tarred root are one too many", hint="give one of them")
    if parts.initrd is not None:
        if parts.kernel is None:
            raise ImageError("an initramfs needs a kernel", hint="give the kernel as well")
        check_initrd(parts.initrd)
    if parts.root is not None:
        from vmlab.images.roots.imported import import_root

        return import_root(
            store, name, parts, architecture=architecture, cmdline=cmdline, channels=channels,
            size=size, progress=progress,
        )  # fmt: skip
    architecture = _architecture(parts, architecture)
    with store.working(name) as directory:
        files = {}
        release = ""
        if parts.kernel is not None:
            files.update(kernel_files(parts.kernel, directory, progress=progress))
            release = kernels.inspect(parts.kernel).release
        if parts.initrd is not None:
            shutil.copyfile(parts.initrd, directory / "initrd")
            files["initrd"] = directory / "initrd"
        form = None
        if parts.disk is not None:
            disks.copy(parts.disk, directory / "disk", progress=progress)
            form = disks.inspect(directory / "disk").format
            files["disk"] = directory / "disk"
        return enter(
            store,
            name,
            files,
            architecture=architecture,
            disk_format=form,
            cmdline=cmdline or "",
            channels=channels or _channels(parts),
            kernel_release=release,
            source={role: path.name for role, path in given.items()},
            progress=progress,
        )


def enter(
    store: ImageStore,
    name: str,
    files: Mapping[str, Path],
    *,
    architecture: Architecture,
    disk_format: str | None,
    cmdline: str,
    channels: tuple[str, ...],
    kernel_release: str,
    source: Mapping[str, Any],
    progress: Progress,
) -> Image:
    """Put files from a working directory into the store as the image `name`."""
    digest = _digest({
        "import": {role: sha256(path) for role, path in files.items()},
        "name": name, "architecture": architecture, "cmdline": cmdline, "channels": channels,
    })  # fmt: skip
    with lock(store.root / "locks" / f"{digest}.lock", what=f"importing {name}", progress=progress):
        image = store.add(
            Image(
                digest=digest,
                name=name,
                architecture=architecture,
                directory=store.root / "images" / digest,
                files={},
                disk_format=disk_format,
                cmdline=cmdline,
                channels=channels,
                kernel_release=kernel_release,
                origin="import",
                source=source,
            ),
            files,
            progress=progress,
        )
        with replacing(store.root / "names" / name) as file:
            file.write(digest.encode("ascii") + b"\n")
    return image


def with_kernel(
    store: ImageStore,
    kernel: Path,
    *,
    modules: Path | None = None,
    initrd: Path | None = None,
    base: str | None = None,
    progress: Progress = silent,
) -> Image:
    """A tiny image with somebody's own kernel: what a kernel developer boots.

    Made again only when the kernel, a module or the base image's inputs changed.

    Args:
        store: Where it is kept, and where the base image's packages come from.
        kernel: A bzImage, Image or vmlinux.
        modules: A directory of modules: /lib/modules/RELEASE, a root that holds one (what
            `make modules_install INSTALL_MOD_PATH=` made), or any directory of .ko files.
        initrd: The initramfs to boot it with instead of the tiny image's.
        base: The recipe of a tiny image; None for the built-in one of the kernel's architecture.
        progress: Told of every step.

    Raises:
        FormatError: the kernel is not one, or a module is damaged.
        ImageError: there is no tiny image for its architecture, or the parts do not fit.
    """
    info = _inspected(kernel)
    if initrd is not None:
        check_initrd(initrd)
        if modules is not None:
            raise ImageError(
                "modules go into vmlab's own initramfs, which another one replaces",
                hint="leave out either the initramfs or the modules",
            )
    recipe = base_recipe(store, base, info.architecture)
    directory = None if modules is None else _modules_directory(modules)
    given = inputs(recipe, guest_agent())
    suite = store.suite(recipe.distribution, recipe.suite)
    snapshot = suite.snapshot(
        store.settings.pins.get(recipe.suite), readable=readable(recipe), progress=progress
    )
    sources: dict[str, Any] = {
        "kernel": sha256(kernel),
        "modules": None if directory is None else _tree_digest(directory),
        "initrd": None if initrd is None else sha256(initrd),
    }
    digest = _digest({
        "base": recipe.canonical(), "index": snapshot.digest, "inputs": given.digests(), **sources
    })  # fmt: skip
    name = f"{recipe.name}+{info.release or 'kernel'}"
    with lock(store.root / "locks" / f"{digest}.lock", what=f"building {name}", progress=progress):
        ready = store.ready(digest, progress=progress)
        if ready is not None:
            return ready
        with store.working(recipe.name) as scratch:
            files = kernel_files(kernel, scratch, progress=progress)
            if initrd is not None:
                shutil.copyfile(initrd, scratch / "initrd")
            else:
                own = KernelFiles(kernel, _release(info.release, directory), directory)
                lend_initramfs(
                    recipe, suite, snapshot, scratch / "initrd",
                    kernel=own, given=given, progress=progress,
                )  # fmt: skip
            files["initrd"] = scratch / "initrd"
            return store.add(
                Image(
                    digest=digest,
                    name=name,
                    architecture=info.architecture,
                    directory=store.root / "images" / digest,
                    files={},
                    cmdline=recipe.cmdline,
                    channels=("console",) if initrd is not None else recipe.channels,
                    kernel_release=info.release,
                    origin="kernel",
                    source={**sources, "base": recipe.name, "index": snapshot.digest},
                ),
                files,
                progress=progress,
            )


def check_initrd(path: Path) -> None:
    """Refuse a file that Linux would not unpack as an initramfs.

    Raises:
        FormatError: it begins like neither a cpio archive nor a compressed one.
    """
    with path.open("rb") as file:
        head = file.read(16)
    if not (
        head.startswith((b"070701", b"070702", _LZ4_LEGACY, _LZO)) or identify(head) is not None
    ):
        raise FormatError(
            f"{path.name} is not an initramfs: it begins with {head[:6]!r}",
            hint="an initramfs is a newc cpio archive, which may be compressed",
        )


def _check_name(name: str) -> None:
    if re.match(NAME_PATTERN, name) is None:
        raise RecipeError(
            f"name = {name!r} is not a name",
            hint="1 to 63 letters, digits, '.', '_' or '-', the first one a letter or a digit",
        )
    if name in recipes.builtin_names():
        raise RecipeError(
            f"name = {name!r} is the name of a built-in recipe", hint="choose another name"
        )


def _inspected(kernel: Path) -> kernels.KernelInfo:
    try:
        return kernels.inspect(kernel)
    except OSError as error:
        raise ImageNotFound(
            f"the kernel {str(kernel)!r} cannot be read: {error.strerror}", hint="check the path"
        ) from error


def _architecture(parts: Parts, given: Architecture | None) -> Architecture:
    if parts.kernel is None:
        if given is None:
            raise ImageError(
                "a disk does not tell its architecture", hint="give it (--architecture x86_64)"
            )
        return given
    found = kernels.inspect(parts.kernel).architecture
    if given is not None and given is not found:
        raise ImageError(
            f"architecture = {given.value!r}, but {parts.kernel.name} is a kernel for "
            f"{found.value}",
            hint="leave the architecture out, or give another kernel",
        )
    return found


def _channels(parts: Parts) -> tuple[str, ...]:
    """What an image that nobody described can be expected to have."""
    return ("console",) if parts.disk is None else ("qga", "ssh", "console")


def base_recipe(store: ImageStore, base: str | None, architecture: Architecture) -> Recipe:
    """The recipe of the tiny image that lends its initramfs to a kernel of an architecture.

    Raises:
        ImageError: `base` is no tiny image of that architecture, or there is none.
    """
    if base is not None:
        recipe = store.recipe(base)
        if recipe is None or not recipe.tiny:
            raise ImageError(
                f"base = {base!r} is not the recipe of a tiny image",
                hint='give one with format = "initramfs"',
            )
        if recipe.architecture is not architecture:
            raise ImageError(
                f"the kernel is for {architecture.value}, the image {base!r} for "
                f"{recipe.architecture.value}",
                hint="give an image of the kernel's architecture, or none",
            )
        return recipe
    for name in recipes.builtin_names():
        recipe = recipes.builtin(name)
        if recipe.tiny and "agent" in recipe.channels and recipe.architecture is architecture:
            return recipe
    raise ImageError(f"there is no tiny image for {architecture.value}")


def _modules_directory(given: Path) -> Path:
    """The directory that holds the modules, wherever above it `given` points to."""
    if not given.is_dir():
        raise ImageNotFound(
            f"modules = {str(given)!r} is not a directory",
            hint="give /lib/modules/RELEASE, or a directory that modules were installed into",
        )
    candidates = [
        directory
        for base in ("lib/modules", "usr/lib/modules")
        for directory in sorted((given / base).glob("*"))
        if directory.is_dir()
    ]
    if len(candidates) > 1:
        raise ImageError(
            f"modules = {str(given)!r} holds the modules of {len(candidates)} kernels",
            hint="give one of " + ", ".join(str(directory) for directory in candidates),
        )
    return candidates[0] if candidates else given


def _release(release: str, modules: Path | None) -> str:
    """The directory name that modprobe looks for: what `uname -r` will print."""
    return release or (modules.name if modules is not None else "unknown")


def _tree_digest(directory: Path) -> str:
    found = {
        path.relative_to(directory).as_posix(): sha256(path)
        for path in directory.rglob("*")
        if path.is_file() and (".ko" in path.name or path.name.startswith("modules."))
    }
    return _digest(found)


def _digest(data: object) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
