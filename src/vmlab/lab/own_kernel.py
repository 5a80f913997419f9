"""Whether somebody's own kernel can do what `vmlab run` needs, found out before it is booted.

Commands reach a guest by a virtio-serial port on PCI (virtio 1.2, 5.3 and 4.1), so the kernel has
to have those two drivers, built in or among the modules that came with it. A driver that is built
in leaves its name in the kernel's image; a compressed image is not looked into.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final

from vmlab.images import Image
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import InvalidSpec, SpecProblem

_DRIVERS: Final = {
    "virtio_pci": (b"virtio-pci\0", "CONFIG_VIRTIO_PCI"),
    "virtio_mmio": (b"virtio-mmio\0", "CONFIG_VIRTIO_MMIO"),
    "virtio_console": (b"virtio_console\0", "CONFIG_VIRTIO_CONSOLE"),
}
"""By module: the driver's name as it stands in the kernel, and its configuration option."""

_MACHINES: Final = {
    62: Architecture.X86_64,
    183: Architecture.AARCH64,
    243: Architecture.RISCV64,
    21: Architecture.PPC64LE,
}
"""e_machine of an ELF file (gABI 4, "ELF Header")."""

_SUFFIXES: Final = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")


def check_modules(kernel: Path, modules: Path) -> None:
    """Refuse a directory of modules that a kernel would not load.

    The kernel's own (`kernel/...`) are looked at before those that were built elsewhere.

    Raises:
        InvalidSpec: there are none, or the first one is for another architecture or release.
        FormatError: the kernel, or that module, is not one.
    """
    from vmlab.images.formats import kernel as kernels
    from vmlab.images.formats import modinfo

    found = sorted(
        (path for path in modules.rglob("*.ko*") if path.name.endswith(_SUFFIXES)),
        key=lambda path: ("kernel" not in path.relative_to(modules).parts, path),
    )
    if not found:
        raise _wrong(modules, "a directory with modules (.ko files) somewhere in it")
    info = kernels.inspect(kernel)
    module = modinfo.unpacked(found[0].read_bytes(), source=found[0].name)
    machine = _MACHINES.get(int.from_bytes(module[18:20], "little"))
    if module[:4] == b"\x7fELF" and machine is not info.architecture:
        what = "another architecture" if machine is None else machine.value
        raise _wrong(
            modules,
            f"modules for {info.architecture.value}, as {kernel.name} is: {found[0].name} is for "
            f"{what}",
        )
    release = modinfo.read(module, source=found[0].name).vermagic.partition(" ")[0]
    if info.release and release and release != info.release:
        raise _wrong(
            modules,
            f"modules of {info.release}, as {kernel.name} is: {found[0].name} is of {release}",
        )


def _wrong(modules: Path, wanted: str) -> InvalidSpec:
    return InvalidSpec(
        [SpecProblem("--modules", str(modules), wanted)],
        what="command line",
        hint="give what `make modules_install INSTALL_MOD_PATH=DIR` made, or its lib/modules/*",
    )


def check_virtio(
    kernel: Path, image: Image, modules: Path | None, transport: str = "virtio_pci"
) -> None:
    """Refuse a kernel without the drivers that commands come by.

    Args:
        kernel: The kernel as its owner named it, for the error.
        image: What was made of it.
        modules: The directory of its modules, if there is one.
        transport: What the machine's devices are behind: "virtio_pci" or "virtio_mmio".

    Raises:
        InvalidSpec: naming the drivers that are missing, and what to do.
    """
    assert image.kernel is not None
    there = _modules_of(modules) if modules is not None else frozenset()
    missing = [name for name in (transport, "virtio_console") if name not in there]
    if missing:
        missing = [name for name in missing if not _built_in(image.kernel, _DRIVERS[name][0])]
    if not missing:
        return
    options = " and ".join(f"{_DRIVERS[name][1]}=y" for name in missing)
    raise InvalidSpec(
        [SpecProblem("--kernel", str(kernel), f"a kernel that has {' and '.join(missing)}")],
        what="command line",
        hint=f"build it with {options}"
        + (", or give their modules: --modules DIR" if modules is None else ""),
    )


def _modules_of(modules: Path) -> frozenset[str]:
    """The names of the modules in a directory, and of those that its modules.builtin lists."""
    names = {path.name for path in modules.rglob("*.ko*") if path.name.endswith(_SUFFIXES)}
    for listed in modules.rglob("modules.builtin"):
        names |= {line.rpartition("/")[2] for line in listed.read_text("utf-8", "replace").split()}
    return frozenset(name.partition(".")[0].replace("-", "_") for name in names)


def _built_in(kernel: Path, name: bytes) -> bool:
    """Whether a driver is in the kernel's image, or nobody can tell."""
    from vmlab.images.formats import kernel as kernels

    info = kernels.inspect(kernel)
    if info.compression is not None or info.form not in {"Image", "vmlinux"}:
        return True
    with (
        kernel.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole,
    ):
        return whole.find(name) >= 0
