"""From a recipe to an image's files, in a directory of the caller's.

The step between archive and store: which packages, which inputs, which digest. Nothing here
decides where an image is kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from vmlab.images.debian.index import Package, PackageIndex
from vmlab.images.debian.suite import Readable, Snapshot, Suite
from vmlab.images.errors import RecipeError
from vmlab.images.formats.kernel import direct_boot
from vmlab.images.progress import Progress, silent, watched
from vmlab.images.recipe import Recipe
from vmlab.images.tiny import build as tiny

# Raised whenever the same recipe and index would give other bytes than before.
BUILDER_VERSION = 3
_KERNEL_PREFIX = "linux-image-"
# A developer's modules go into the initramfs whole, if they are not more bytes than this.
_MODULES_BYTES_FOR_ALL = 64 << 20


@dataclass(frozen=True)
class Inputs:
    """What goes into an image beside the packages.

    `agent` is the guest agent's script, or None; `files` maps guest paths to (contents, mode).
    """

    agent: bytes | None
    files: Mapping[str, tuple[bytes, int]] = field(default_factory=dict)

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each input, by a name of its own."""
        found = {f"file:{path}": _sha256(data) for path, (data, _) in self.files.items()}
        if self.agent is not None:
            found["agent"] = _sha256(self.agent)
        for name, data in tiny.own_scripts().items():
            found[f"vmlab:{name}"] = _sha256(data)
        return found


@dataclass(frozen=True)
class Built:
    """The files of an image in the directory that it was built in, by role, and what it is.

    `cmdline` is what the kernel has to be told besides what the recipe says; `root` is the digest
    of what the root on the disk is made of.
    """

    files: Mapping[str, Path]
    kernel_release: str
    packages: Mapping[str, str]
    disk_format: str | None = None
    cmdline: str = ""
    root: str | None = None


LendRoot = Callable[[str, Path], Mapping[str, str] | None]
"""Called with the digest of a root and a path: puts the disk of another image with that root
there and returns its packages and versions, or returns None if there is no such image."""


def no_root(digest: str, place: Path) -> Mapping[str, str] | None:
    """Lends nothing: every root is built."""
    return None


def guest_agent() -> bytes | None:
    """The agent's script that comes with vmlab, or None in an installation without guests."""
    try:
        return (resources.files("vmlab.guests") / "agent.sh").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        return None


def inputs(recipe: Recipe, agent: bytes | None) -> Inputs:
    """The inputs of a recipe, with its files read.

    Raises:
        RecipeError: a file that the recipe names cannot be read.
    """
    files = {}
    for file in recipe.files:
        if file.source is None:
            files[file.path] = ((file.text or "").encode(), file.mode)
            continue
        try:
            files[file.path] = (file.source.read_bytes(), file.mode)
        except OSError as error:
            raise RecipeError(
                f"recipe {recipe.name!r}: files.source = {str(file.source)!r} cannot be read: "
                f"{error.strerror}",
                hint="the path is relative to the recipe's file",
            ) from error
    return Inputs(agent if "agent" in recipe.channels else None, files)


def image_digest(recipe: Recipe, index: str, given: Inputs) -> str:
    """The digest of the image that this recipe, index snapshot and inputs give."""
    data: dict[str, Any] = {
        "builder": BUILDER_VERSION,
        "name": recipe.name,
        "recipe": recipe.canonical(),
        "index": index,
        "inputs": given.digests(),
    }
    return _sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())


def root_digest(recipe: Recipe, index: str, given: Inputs) -> str:
    """The digest of what a full root is made of: not of the agent, which the initramfs lends it.

    Another version of vmlab's own scripts so needs no other root.
    """
    canonical = recipe.canonical()
    data: dict[str, Any] = {
        "builder": BUILDER_VERSION,
        "index": index,
        "recipe": {
            key: canonical[key]
            for key in ("distribution", "suite", "architecture", "components", "format", "size",
                        "kernel", "packages", "files", "scripts")
        },
        "files": {path: _sha256(data) for path, (data, _) in given.files.items()},
    }  # fmt: skip
    return _sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())


def check_host(recipe: Recipe) -> None:
    """Whether this host has what the recipe needs to be built; asked before anything is fetched.

    Raises:
        ToolMissing: naming what to install.
    """
    if not recipe.tiny:
        from vmlab.images.roots.build import check_tools

        check_tools(recipe)


def build(
    recipe: Recipe,
    suite: Suite,
    snapshot: Snapshot,
    given: Inputs,
    directory: Path,
    *,
    lend_root: LendRoot = no_root,
    progress: Progress,
) -> Built:
    """Build the image into `directory`, an empty directory that has room for it.

    Args:
        recipe: What it is made of.
        suite: Where its packages come from.
        snapshot: The index that they are chosen by.
        given: The agent, and the contents of the recipe's files.
        directory: Where everything is put.
        lend_root: Asked before a full root is built.
        progress: Told of every step.

    Raises:
        ImageError: of the kind that says what went wrong.
    """
    index = package_index(recipe, suite, snapshot, progress=progress)
    kernel = kernel_package(recipe, index)
    kernel_deb = suite.package(kernel, progress=progress)
    if not recipe.tiny:
        from vmlab.images.roots.build import build_root

        return build_root(
            recipe, suite, snapshot, given, directory,
            kernel=kernel, kernel_deb=kernel_deb, index=index, lend_root=lend_root,
            progress=progress,
        )  # fmt: skip
    packages = index.closure(recipe.packages, without=recipe.without)
    debs = [suite.package(package, progress=progress) for package in packages]
    scratch = directory / "unpacked"
    scratch.mkdir()
    files = tiny.unpack_kernel(kernel_deb, scratch, progress=progress)
    build_initramfs(
        recipe, files, debs, given, directory / "initrd", mtime=snapshot.date, progress=progress
    )
    return Built(
        files={
            **kernel_files(files.image, directory, progress=progress),
            "initrd": directory / "initrd",
        },
        kernel_release=files.release,
        packages={package.name: package.version for package in [kernel, *packages]},
    )


def readable(recipe: Recipe) -> Readable:
    """What a recipe reads of its suite."""
    return Readable(recipe.components, recipe.architecture.debian)


def package_index(
    recipe: Recipe, suite: Suite, snapshot: Snapshot, *, progress: Progress
) -> PackageIndex:
    """All packages that a recipe can have."""
    return suite.index(
        snapshot,
        components=recipe.components,
        architecture=recipe.architecture.debian,
        progress=progress,
    )


def lend_initramfs(
    recipe: Recipe,
    suite: Suite,
    snapshot: Snapshot,
    output: Path,
    *,
    kernel: tiny.KernelFiles,
    given: Inputs,
    progress: Progress,
) -> None:
    """Write the initramfs of a tiny image's recipe for a kernel that is not the recipe's.

    Raises:
        ImageError: of the kind that says what went wrong.
    """
    index = package_index(recipe, suite, snapshot, progress=progress)
    packages = index.closure(recipe.packages, without=recipe.without)
    debs = [suite.package(package, progress=progress) for package in packages]
    build_initramfs(
        recipe, kernel, debs, given, output,
        mtime=snapshot.date, foreign=True, progress=progress,
    )  # fmt: skip


def kernel_files(kernel: Path, directory: Path, *, progress: Progress = silent) -> dict[str, Path]:
    """Copy a kernel into `directory`, in the forms to boot it; returns them by role."""
    with watched(f"reading {kernel.name}", progress):
        vmlinux = direct_boot(kernel)
    if vmlinux is None:
        shutil.copyfile(kernel, directory / "kernel")
        return {"kernel": directory / "kernel"}
    (directory / "kernel").write_bytes(vmlinux)
    shutil.copyfile(kernel, directory / "bzimage")
    return {"kernel": directory / "kernel", "bzimage": directory / "bzimage"}


def build_initramfs(
    recipe: Recipe,
    kernel: tiny.KernelFiles,
    packages: list[Path],
    given: Inputs,
    output: Path,
    *,
    mtime: int,
    foreign: bool = False,
    progress: Progress,
) -> None:
    """Write the initramfs of a recipe for a kernel.

    Args:
        recipe: Gives the modules and boot scripts.
        kernel: The kernel and its modules.
        packages: The .debs to unpack.
        given: The agent and further files.
        output: The file to write.
        mtime: The time of every file, seconds since 1970.
        foreign: The kernel is not the recipe's: take what it has of the recipe's modules, and
            all modules that are its own.
        progress: Told of the step.
    """
    read = 0

    def told(size: int) -> None:
        nonlocal read
        read += size

    with watched(f"assembling {recipe.name}", progress, lambda: (read, None)):
        selection = None
        if kernel.modules is not None:
            tree = tiny.module_tree(kernel.modules, kernel.release, told=told)
            load, late, available = recipe.modules.expanded()
            if foreign:
                load, late = _optional(load), _optional(late)
                available = (*_optional(available), *tree.own(limit=_MODULES_BYTES_FOR_ALL))
            selection = tree.select(load, late, available)
        tiny.initramfs(
            output,
            packages,
            contents=tiny.Contents(
                agent=given.agent,
                files=given.files,
                boot_scripts={
                    f"{number:02}-{script.name}": script.text
                    for number, script in enumerate(recipe.scripts)
                    if script.when == "boot"
                },
            ),
            release=kernel.release,
            modules=selection,
            builtin=kernel.modules,
            mtime=mtime,
        )


def _optional(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name.removesuffix('?')}?" for name in names)


def kernel_package(recipe: Recipe, index: PackageIndex) -> Package:
    """The package that holds the kernel: `linux-image-amd64` only depends on it."""
    package = index.get(recipe.kernel)
    for _ in range(4):
        real = next(
            (
                name
                for alternatives in package.depends
                for name in alternatives
                if name.startswith(_KERNEL_PREFIX)
            ),
            None,
        )
        if real is None:
            return package
        package = index.get(real)
    return package


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
