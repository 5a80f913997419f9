"""Somebody's own kernel is refused before it is booted, where it could not be talked to."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.images.conftest import kernel_module, riscv_kernel

from vmlab.images.image import Image, StoredFile
from vmlab.lab.own_kernel import check_modules, check_virtio
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import InvalidSpec, VmlabError

RELEASE = "6.50-mine"
BOTH = b"virtio-pci\0virtio_console\0"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "Image"
    path.write_bytes(riscv_kernel(RELEASE))
    return path


@pytest.fixture
def modules(tmp_path: Path) -> Callable[..., Path]:
    def make(*names: str, release: str = RELEASE, under: str = "kernel/drivers") -> Path:
        folder = tmp_path / "modules" / under
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in names:
            data = kernel_module(name, "", f"vermagic={release} SMP mod_unload riscv")
            (folder / f"{name}.ko").write_bytes(data)
        return tmp_path / "modules"

    return make


def image_of(directory: Path, data: bytes) -> Image:
    (directory / "kernel").write_bytes(data)
    files = {"kernel": StoredFile("kernel", len(data), "")}
    return Image("0" * 64, "mine", Architecture.RISCV64, directory, files)


def test_modules_of_the_kernel_s_own_release_are_taken(
    kernel: Path, modules: Callable[..., Path]
) -> None:
    check_modules(kernel, modules("dummy"))


def test_modules_of_another_release_are_refused_naming_both(
    kernel: Path, modules: Callable[..., Path]
) -> None:
    with pytest.raises(InvalidSpec, match=r"modules of 6\.50-mine.*dummy\.ko is of 6\.49"):
        check_modules(kernel, modules("dummy", release="6.49"))


def test_modules_built_elsewhere_are_looked_at_last(
    kernel: Path, modules: Callable[..., Path]
) -> None:
    modules("aaa", release="6.49", under="extra")
    check_modules(kernel, modules("dummy"))


def test_modules_for_another_architecture_are_refused_naming_both(
    kernel: Path, modules: Callable[..., Path]
) -> None:
    path = modules("dummy") / "kernel" / "drivers" / "dummy.ko"
    data = bytearray(path.read_bytes())
    data[18:20] = (62).to_bytes(2, "little")
    path.write_bytes(bytes(data))
    with pytest.raises(InvalidSpec, match=r"modules for riscv64.*is for x86_64"):
        check_modules(kernel, path.parent)


@pytest.mark.parametrize("names", [(), ("readme.txt",)])
def test_a_directory_without_modules_is_refused(
    kernel: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    with pytest.raises(InvalidSpec, match="a directory with modules") as caught:
        check_modules(kernel, folder)
    assert caught.value.hint is not None and "modules_install" in caught.value.hint


def test_a_module_that_is_none_is_told_by_name(kernel: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.ko").write_bytes(b"text")
    with pytest.raises(VmlabError, match=r"broken\.ko"):
        check_modules(kernel, tmp_path)


def test_a_kernel_with_the_drivers_built_in_is_taken(tmp_path: Path) -> None:
    check_virtio(Path("Image"), image_of(tmp_path, riscv_kernel() + BOTH), None)


@pytest.mark.parametrize(
    ("built_in", "missing"),
    [
        (b"", "virtio_pci and virtio_console"),
        (b"virtio-pci\0", "has virtio_console"),
        (b"virtio_console\0", "has virtio_pci"),
    ],
)
def test_a_kernel_without_them_is_refused_naming_the_options(
    tmp_path: Path, built_in: bytes, missing: str
) -> None:
    with pytest.raises(InvalidSpec, match=missing) as caught:
        check_virtio(Path("/k/Image"), image_of(tmp_path, riscv_kernel() + built_in), None)
    assert caught.value.hint is not None
    assert "CONFIG_VIRTIO_" in caught.value.hint and "--modules" in caught.value.hint


def test_the_embedded_engines_machines_need_another_driver(tmp_path: Path) -> None:
    image = image_of(tmp_path, riscv_kernel() + BOTH)
    with pytest.raises(InvalidSpec, match="has virtio_mmio") as caught:
        check_virtio(Path("/k/Image"), image, None, "virtio_mmio")
    assert caught.value.hint is not None and "CONFIG_VIRTIO_MMIO=y" in caught.value.hint


def test_drivers_among_the_modules_or_listed_as_built_in_will_do(
    tmp_path: Path, modules: Callable[..., Path]
) -> None:
    image = image_of(tmp_path, riscv_kernel())
    folder = modules("virtio_pci")
    with pytest.raises(InvalidSpec, match="has virtio_console") as caught:
        check_virtio(Path("Image"), image, folder)
    assert caught.value.hint is not None and "--modules" not in caught.value.hint
    (folder / "modules.builtin").write_text("kernel/drivers/char/virtio-console.ko\n")
    check_virtio(Path("Image"), image, folder)


def test_a_compressed_kernel_is_given_the_benefit_of_the_doubt(tmp_path: Path) -> None:
    check_virtio(Path("Image.gz"), image_of(tmp_path, gzip.compress(riscv_kernel())), None)
