"""A tarred root of any distribution as an image: an ext4 disk, a kernel, vmlab's initramfs.

The root is not changed: under systemd the agent is lent to it at boot (see tiny/lend-agent.sh).
Only a root without the modules of its kernel, such as a container's, gets those of a tiny image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vmlab.images.builder import (
    Inputs,
    guest_agent,
    kernel_files,
    kernel_package,
    lend_initramfs,
    package_index,
    readable,
)
from vmlab.images.debian import versions
from vmlab.images.debian.suite import Snapshot, Suite
from vmlab.images.errors import FormatError, ImageError
from vmlab.images.formats import kernel as kernels
from vmlab.images.formats import tarball
from vmlab.images.formats.compression import decompressed
from vmlab.images.formats.tarball import TarEntry
from vmlab.images.image import Image
from vmlab.images.importing import Parts, base_recipe, enter
from vmlab.images.progress import Progress, reading, watched
from vmlab.images.recipe import Recipe
from vmlab.images.roots import ext4, tools
from vmlab.images.roots.build import CMDLINE
from vmlab.images.store.store import ImageStore
from vmlab.images.tiny.build import KernelFiles, module_tree, unpack_kernel
from vmlab.images.tiny.modules import tables
from vmlab.machine.architecture import Architecture
from vmlab.machine.sizes import MIB

_KERNEL = re.compile(r"boot/(?:vmlinu[xz]|Image|kernel)-?(?P<release>.*)")
_EPOCH_AT_MOST = 0xFFFFFFFF
_ELF_64_LITTLE = b"\x7fELF\x02\x01"
# e_machine, elf(5).
_MACHINES = {
    62: Architecture.X86_64,
    183: Architecture.AARCH64,
    243: Architecture.RISCV64,
    21: Architecture.PPC64LE,
}


def import_root(
    store: ImageStore,
    name: str,
    parts: Parts,
    *,
    architecture: Architecture | None,
    cmdline: str | None,
    channels: tuple[str, ...] | None,
    size: int | None,
    progress: Progress,
) -> Image:
    """Import a tarred root. See `vmlab.images.importing.import_image`.

    Raises:
        ToolMissing: mke2fs or debugfs is not installed.
        FormatError: the archive is damaged or unsafe.
        ImageError: it has no kernel, and it cannot be told which one would do.
    """
    if parts.root is None:
        raise ImageError("there is no root to import")
    tools.require(("mke2fs", "debugfs"), what="importing a root")
    with store.working(name) as directory:
        root = directory / "root"
        root.mkdir()
        step = f"unpacking {parts.root.name}"
        with parts.root.open("rb") as file, watched(step, progress, reading(file)):
            stream = decompressed(file, source=parts.root.name)
            entries = tarball.extract(stream, root, source=parts.root.name)
        if not entries:
            raise FormatError(f"{parts.root.name} is empty")
        kernel = parts.kernel or _kernel(root)
        lab = _Lab.of(store, _architecture(kernel, root, architecture, parts.root.name), progress)
        given = _given_kernel(kernel, root)
        if given is None or given.modules is None:
            lent = lab.kernel(directory / "unpacked")
            if given is None or given.release == lent.release:
                given = lent
                entries += _add_modules(root, lent, lab.recipe, lab.snapshot.date)
        info = kernels.inspect(given.image)
        files = kernel_files(given.image, directory, progress=progress)
        lend_initramfs(
            lab.recipe, lab.suite, lab.snapshot, directory / "initrd", kernel=given,
            given=Inputs(guest_agent()), progress=progress,
        )  # fmt: skip
        held = sum(entry.size for entry in entries)
        epoch = min(max((entry.mtime for entry in entries), default=0), _EPOCH_AT_MOST)
        disk = directory / "disk"
        ext4.make(
            root, entries, disk, size=size or _room(held, len(entries)), seed=name,
            epoch=epoch, scratch=directory, progress=progress,
        )  # fmt: skip
        return enter(
            store,
            name,
            {**files, "initrd": directory / "initrd", "disk": disk},
            architecture=info.architecture,
            disk_format="raw",
            cmdline=f"{CMDLINE} {cmdline or 'quiet panic=-1'}",
            channels=channels or _channels(entries),
            kernel_release=info.release,
            source={"root": parts.root.name},
            progress=progress,
        )


def _room(held: int, files: int) -> int:
    """Twice the contents and an inode for each file, in whole mebibytes."""
    return ((2 * held + 8192 * files) // MIB + 256) * MIB


def _kernel(root: Path) -> Path | None:
    """The newest kernel in the root's /boot."""
    boot = root / "boot"
    if boot.is_symlink():
        return None  # it may lead out of the root
    found = [
        (versions.key(match["release"]), path)
        for path in boot.glob("*")
        if (match := _KERNEL.fullmatch(f"boot/{path.name}"))
        and path.is_file()
        and not path.is_symlink()
    ]
    return max(found)[1] if found else None


def _given_kernel(kernel: Path | None, root: Path) -> KernelFiles | None:
    """A kernel with the modules that the root has for it."""
    if kernel is None:
        return None
    release = kernels.inspect(kernel).release
    folders = (root / base / "modules" / release for base in ("usr/lib", "lib"))
    modules = next((f for f in folders if release and f.is_dir() and _inside(f, root)), None)
    return KernelFiles(kernel, release, modules)


def _inside(path: Path, root: Path) -> bool:
    """Whether nothing on the way from the root to `path` is a symlink."""
    return not any(
        place.is_symlink() for place in (path, *path.parents) if place.is_relative_to(root)
    )


def _architecture(
    kernel: Path | None, root: Path, wanted: Architecture | None, source: str
) -> Architecture:
    """The architecture of the kernel, else of the root's programs."""
    found = kernels.inspect(kernel).architecture if kernel is not None else _of_programs(root)
    if wanted is not None and found is not None and found is not wanted:
        what = f"{source} holds programs" if kernel is None else "the kernel is"
        raise ImageError(
            f"architecture = {wanted.value!r}, but {what} for {found.value}",
            hint="leave the architecture out",
        )
    architecture = found or wanted
    if architecture is None:
        raise ImageError(
            f"{source} has no kernel in /boot, and no program that tells its architecture",
            hint="give the architecture (--architecture x86_64), or a kernel (--kernel)",
        )
    return architecture


def _of_programs(root: Path) -> Architecture | None:
    """The architecture of the first program that is found where every root has some."""
    for folder in ("usr/bin", "bin", "usr/sbin", "sbin"):
        if not (root / folder).is_dir() or not _inside(root / folder, root):
            continue
        for path in sorted((root / folder).iterdir()):
            if path.is_symlink() or not path.is_file():
                continue
            with path.open("rb") as file:
                head = file.read(20)
            if head[:6] == _ELF_64_LITTLE and len(head) == 20:
                found = _MACHINES.get(int.from_bytes(head[18:20], "little"))
                if found is not None:
                    return found
    return None


@dataclass(frozen=True)
class _Lab:
    """The tiny image that lends an architecture its initramfs, and its kernel where need be."""

    recipe: Recipe
    suite: Suite
    snapshot: Snapshot
    progress: Progress

    @classmethod
    def of(cls, store: ImageStore, architecture: Architecture, progress: Progress) -> _Lab:
        recipe = base_recipe(store, None, architecture)
        suite = store.suite(recipe.distribution, recipe.suite)
        snapshot = suite.snapshot(
            store.settings.pins.get(recipe.suite), readable=readable(recipe), progress=progress
        )
        return cls(recipe, suite, snapshot, progress)

    def kernel(self, directory: Path) -> KernelFiles:
        """The tiny image's kernel with its modules, unpacked."""
        index = package_index(self.recipe, self.suite, self.snapshot, progress=self.progress)
        package = self.suite.package(kernel_package(self.recipe, index), progress=self.progress)
        directory.mkdir()
        return unpack_kernel(package, directory, progress=self.progress)


def _add_modules(root: Path, kernel: KernelFiles, recipe: Recipe, epoch: int) -> list[TarEntry]:
    """Put the modules of a lab's guest into a root that has none for the kernel it is lent."""
    if kernel.modules is None:
        return []
    folder = next(
        (
            base
            for base in ("usr/lib", "lib")
            if (root / base).is_dir() and _inside(root / base / "modules" / kernel.release, root)
        ),
        None,
    )
    if folder is None:
        return []
    names = [f"{name.removesuffix('?')}?" for group in recipe.modules.expanded() for name in group]
    selection = module_tree(kernel.modules, kernel.release).select([], [], names)
    base = f"{folder}/modules/{kernel.release}"
    contents = {module.path: module.data for module in selection.modules}
    contents |= {name: text.encode() for name, text in tables(selection.modules).items()}
    entries: dict[str, TarEntry] = {}
    for name, data in contents.items():
        place = root / base / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        path = place.relative_to(root)
        entries[str(path)] = TarEntry(str(path), "file", 0o644, 0, 0, epoch, size=len(data))
        for parent in path.parents:
            if len(parent.parts) > len(Path(folder).parts):
                entries[str(parent)] = TarEntry(str(parent), "directory", 0o755, 0, 0, epoch)
    return list(entries.values())


def _channels(entries: list[TarEntry]) -> tuple[str, ...]:
    """What the root's programs let expect."""
    paths = {entry.path for entry in entries}

    def has(*names: str) -> bool:
        return any(path.endswith(name) for path in paths for name in names)

    return (
        *(("agent",) if has("bin/sh", "bin/dash", "bin/busybox") else ()),
        *(("qga",) if has("sbin/qemu-ga", "bin/qemu-ga") else ()),
        *(("ssh",) if has("sbin/sshd", "bin/sshd") else ()),
        "console",
    )
