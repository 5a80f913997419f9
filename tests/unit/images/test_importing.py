"""Images from elsewhere, and somebody's own kernel in a tiny image."""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from vmlab.images import ImageStore
from vmlab.images.errors import FormatError, ImageError, ImageNotFound, RecipeError, TamperedFile
from vmlab.images.formats import cpio
from vmlab.images.importing import Parts, import_image, with_kernel
from vmlab.machine.architecture import Architecture

MakeStore = Callable[..., ImageStore]
Forms = dict[str, Callable[..., bytes]]


@pytest.fixture
def kernel(tmp_path: Path, forms: Forms) -> Path:
    path = tmp_path / "Image"
    path.write_bytes(forms["riscv"]("6.50-mine"))
    return path


@pytest.fixture
def initrd(tmp_path: Path) -> Path:
    path = tmp_path / "initrd.gz"
    path.write_bytes(gzip.compress(b"070701" + bytes(600)))
    return path


def test_kernel_and_initramfs_are_imported_under_a_name(
    make_store: MakeStore, kernel: Path, initrd: Path
) -> None:
    store = make_store()
    image = import_image(store, "mine", Parts(kernel=kernel, initrd=initrd), cmdline="debug")
    assert store.ensure("mine") == image
    assert image.kernel is not None
    assert image.kernel.read_bytes() == kernel.read_bytes()
    assert image.initrd is not None
    assert image.initrd.read_bytes() == initrd.read_bytes()
    assert (image.architecture, image.kernel_release) == (Architecture.RISCV64, "6.50-mine")
    assert (image.cmdline, image.channels, image.origin) == ("debug", ("console",), "import")


def test_disk_is_imported_with_its_architecture(make_store: MakeStore, tmp_path: Path) -> None:
    raw = tmp_path / "cloud.raw.xz"
    raw.write_bytes(lzma.compress(b"boot" + bytes(1020)))
    store = make_store()
    with pytest.raises(ImageError, match="does not tell its architecture"):
        import_image(store, "cloud", Parts(disk=raw))
    image = import_image(store, "cloud", Parts(disk=raw), architecture=Architecture.X86_64)
    assert image.disk is not None
    assert image.disk.read_bytes() == b"boot" + bytes(1020)
    assert (image.disk_format, image.kernel) == ("raw", None)
    assert image.channels == ("qga", "ssh", "console")


def test_importing_again_gives_the_name_to_the_new_image(
    make_store: MakeStore, kernel: Path, forms: Forms
) -> None:
    store = make_store()
    old = import_image(store, "mine", Parts(kernel=kernel))
    kernel.write_bytes(forms["riscv"]("6.51-mine"))
    new = import_image(store, "mine", Parts(kernel=kernel))
    assert new.digest != old.digest
    assert store.ensure("mine") == new
    assert store.ensure(old.digest) == old


def test_changed_import_is_refused_by_name_since_nothing_can_bring_it_back(
    make_store: MakeStore, kernel: Path
) -> None:
    store = make_store()
    image = import_image(store, "mine", Parts(kernel=kernel))
    assert image.kernel is not None
    image.kernel.chmod(0o644)
    image.kernel.write_bytes(b"x" + image.kernel.read_bytes()[1:])
    with pytest.raises(TamperedFile, match=r"image 'mine': .*kernel was changed"):
        store.ensure("mine")


@pytest.mark.parametrize("name", ["", "a b", "../x", "debian-13-riscv64-tiny", "-x"])
def test_wrong_name_is_refused(make_store: MakeStore, kernel: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="name = "):
        import_image(make_store(), name, Parts(kernel=kernel))


def test_parts_that_do_not_fit_are_refused(
    make_store: MakeStore, kernel: Path, initrd: Path, tmp_path: Path
) -> None:
    store = make_store()
    text = tmp_path / "text"
    text.write_text("hello")
    for parts, kind, message in (
        (Parts(), ImageError, "nothing to import"),
        (Parts(initrd=initrd), ImageError, "needs a kernel"),
        (Parts(kernel=tmp_path / "none"), ImageNotFound, "kernel = .*none"),
        (Parts(kernel=text), FormatError, "not a Linux kernel"),
        (Parts(kernel=kernel, initrd=text), FormatError, "not an initramfs"),
        (Parts(disk=kernel, root=kernel), ImageError, "one too many"),
        (Parts(kernel=kernel, disk=text), FormatError, "no disk image"),
    ):
        with pytest.raises(kind, match=message):
            import_image(store, "mine", parts)
    with pytest.raises(ImageError, match="architecture = 'x86_64', but Image is a kernel for"):
        import_image(store, "mine", Parts(kernel=kernel), architecture=Architecture.X86_64)
    assert store.images() == []
    assert list((store.root / "work").glob("*")) == []


def test_x86_kernel_is_stored_in_both_forms(make_store: MakeStore, tmp_path: Path) -> None:
    vmlinux = b"\x7fELF" + struct.pack("<III", 4, 8, 18) + b"Xen\0" + bytes(8)
    payload = lzma.compress(vmlinux) + struct.pack("<I", len(vmlinux))
    image = bytearray(4096)
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x236, 1)
    struct.pack_into("<II", image, 0x248, 4096 - 1024, len(payload))
    path = tmp_path / "bzImage"
    path.write_bytes(bytes(image) + payload)
    imported = import_image(make_store(), "mine", Parts(kernel=path))
    assert imported.kernel is not None
    assert imported.packaged_kernel is not None
    assert imported.kernel.read_bytes() == vmlinux
    assert imported.packaged_kernel.read_bytes() == path.read_bytes()


def test_own_kernel_gets_the_tiny_initramfs_with_its_own_modules(
    make_store: MakeStore, kernel: Path, tmp_path: Path, recipe_file: Path, forms: Forms
) -> None:
    modules = tmp_path / "staging" / "lib" / "modules" / "6.50-mine"
    (modules / "updates").mkdir(parents=True)
    (modules / "updates" / "hello.ko").write_bytes(forms["module"]("hello"))
    store = make_store()
    image = with_kernel(store, kernel, modules=tmp_path / "staging", base=str(recipe_file))
    assert image.initrd is not None
    with image.initrd.open("rb") as file:
        tree = {entry.path: entry for entry in cpio.read(file, source="initrd")}
    assert "usr/lib/modules/6.50-mine/updates/hello.ko" in tree
    assert b"updates/hello.ko:" in tree["usr/lib/modules/6.50-mine/modules.dep"].data
    assert "usr/lib/vmlab/agent" in tree
    assert image.kernel_release == "6.50-mine"
    again = with_kernel(store, kernel, modules=modules, base=str(recipe_file))
    assert again == image
    (modules / "updates" / "hello.ko").write_bytes(forms["module"]("hello", "", "version=2"))
    changed = with_kernel(store, kernel, modules=modules, base=str(recipe_file))
    assert changed.digest != image.digest


def test_own_kernel_without_modules_and_with_an_own_initramfs(
    make_store: MakeStore, kernel: Path, initrd: Path, recipe_file: Path
) -> None:
    store = make_store()
    bare = with_kernel(store, kernel, base=str(recipe_file))
    assert bare.channels == ("agent", "console")
    own = with_kernel(store, kernel, initrd=initrd, base=str(recipe_file))
    assert own.channels == ("console",)
    assert own.initrd is not None
    assert own.initrd.read_bytes() == initrd.read_bytes()


def test_modules_directory_that_is_none_or_several_is_refused(
    make_store: MakeStore, kernel: Path, tmp_path: Path, recipe_file: Path
) -> None:
    store = make_store()
    with pytest.raises(ImageNotFound, match="is not a directory"):
        with_kernel(store, kernel, modules=tmp_path / "none", base=str(recipe_file))
    for release in ("6.1", "6.2"):
        (tmp_path / "root" / "lib" / "modules" / release).mkdir(parents=True)
    with pytest.raises(ImageError, match="the modules of 2 kernels"):
        with_kernel(store, kernel, modules=tmp_path / "root", base=str(recipe_file))
