"""A tarred root of any distribution as an image: an ext4 disk, a kernel, vmlab's initramfs.

The root is not changed: under systemd the agent is lent to it at boot (see tiny/lend-agent.sh).
"""

from __future__ import annotations

import re
from pathlib import Path

from vmlab.images.builder import Inputs, guest_agent, kernel_files, lend_initramfs, readable
from vmlab.images.errors import FormatError, ImageError
from vmlab.images.formats import kernel as kernels
from vmlab.images.formats import tarball
from vmlab.images.formats.compression import decompressed
from vmlab.images.formats.tarball import TarEntry
from vmlab.images.image import Image
from vmlab.images.importing import Parts, base_recipe, enter
from vmlab.images.progress import Progress, reading, watched
from vmlab.images.roots import ext4, tools
from vmlab.images.roots.build import CMDLINE
from vmlab.images.store.store import ImageStore
from vmlab.images.tiny.build import KernelFiles
from vmlab.machine.architecture import Architecture
from vmlab.machine.sizes import MIB

_KERNEL = re.compile(r"boot/(?:vmlinu[xz]|Image|kernel)-?(?P<release>.*)")
_EPOCH_AT_MOST = 0xFFFFFFFF


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
        ImageError: there is no kernel in it, and none was given.
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
        kernel = parts.kernel or _kernel(root, parts.root.name)
        info = kernels.inspect(kernel)
        if architecture is not None and info.architecture is not architecture:
            raise ImageError(
                f"architecture = {architecture.value!r}, but the kernel is for "
                f"{info.architecture.value}"
            )
        files = kernel_files(kernel, directory, progress=progress)
        _initramfs(store, kernel, info, root, directory / "initrd", progress=progress)
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


def _kernel(root: Path, source: str) -> Path:
    """The newest kernel in the root's /boot."""
    found = sorted(
        path
        for path in (root / "boot").glob("*")
        if _KERNEL.fullmatch(f"boot/{path.name}") and path.is_file() and not path.is_symlink()
    )
    if not found:
        raise ImageError(
            f"{source} has no kernel in /boot",
            hint="give one as well (--kernel); that of a tiny image will do: "
            "`vmlab image show debian-12-amd64-tiny`",
        )
    return found[-1]


def _initramfs(
    store: ImageStore,
    kernel: Path,
    info: kernels.KernelInfo,
    root: Path,
    output: Path,
    *,
    progress: Progress,
) -> None:
    """vmlab's initramfs with the modules that the root has for the kernel."""
    recipe = base_recipe(store, None, info.architecture)
    suite = store.suite(recipe.distribution, recipe.suite)
    snapshot = suite.snapshot(
        store.settings.pins.get(recipe.suite), readable=readable(recipe), progress=progress
    )
    modules = next(
        (
            folder
            for base in ("usr/lib/modules", "lib/modules")
            if (folder := root / base / info.release).is_dir() and info.release
        ),
        None,
    )
    lend_initramfs(
        recipe, suite, snapshot, output, kernel=KernelFiles(kernel, info.release, modules),
        given=Inputs(guest_agent()), progress=progress,
    )  # fmt: skip


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
