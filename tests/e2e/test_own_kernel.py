"""A kernel developer's own kernel with its modules; Debian's, as if it were built here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.e2e.conftest import IMAGE_STORE, Vmlab, unpack_modules

from vmlab.images import ImageStore

pytestmark = [pytest.mark.boots, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bzImage, and the directory that `make modules_install INSTALL_MOD_PATH=` would have made.

    The modules are those of the tiny image, and one of a name that no recipe knows.
    """
    image = ImageStore(IMAGE_STORE).ensure("debian-12-amd64-tiny")
    assert image.packaged_kernel is not None
    directory = tmp_path_factory.mktemp("built")
    shutil.copyfile(image.packaged_kernel, directory / "bzImage")
    unpack_modules(image, directory / "out")
    dummy = next((directory / "out").rglob("dummy.ko"))
    dummy.rename(dummy.with_name("my_driver.ko"))
    return directory / "bzImage", directory / "out"


def test_modules_land_in_the_guest_and_modprobe_loads_them(
    vmlab: Vmlab, built: tuple[Path, Path]
) -> None:
    kernel, modules = built
    done = vmlab.run(
        "run", "--kernel", str(kernel), "--modules", str(modules), "--append", "mine=yes", "--",
        "modprobe my_driver numdummies=2 && modprobe loop && uname -r && "
        "grep -o mine=yes /proc/cmdline && ls -d /sys/class/net/dummy1 /sys/module/loop",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    release = next((modules / "lib" / "modules").iterdir()).name
    assert done.stdout.decode().split() == [
        release, "mine=yes", "/sys/class/net/dummy1", "/sys/module/loop"
    ]  # fmt: skip
    assert not vmlab.processes() and not vmlab.files() and not vmlab.runs


def test_a_kernel_that_could_not_be_talked_to_is_refused_before_it_boots(
    vmlab: Vmlab, built: tuple[Path, Path], tmp_path: Path
) -> None:
    kernel, modules = built
    bare = vmlab.run("run", "--kernel", str(kernel), "--", "true")
    assert bare.returncode == 2
    assert b"a kernel that has virtio_pci and virtio_console" in bare.stderr
    assert b"CONFIG_VIRTIO_PCI=y and CONFIG_VIRTIO_CONSOLE=y" in bare.stderr

    other = tmp_path / "other"
    shutil.copytree(modules, other)
    module = next(other.rglob("my_driver.ko"))
    module.write_bytes(module.read_bytes().replace(b"vermagic=6.", b"vermagic=5."))
    for path in other.rglob("*.ko"):
        if path != module:
            path.unlink()
    wrong = vmlab.run("run", "--kernel", str(kernel), "--modules", str(other), "--", "true")
    assert wrong.returncode == 2
    assert b"my_driver.ko is of 5." in wrong.stderr

    text = vmlab.run("run", "--kernel", __file__, "--", "true")
    assert text.returncode in {2, 3} and b"is not a Linux kernel" in text.stderr
    for done in (bare, wrong, text):
        assert b"hint:" in done.stderr and b"Traceback" not in done.stderr


def test_an_initramfs_of_one_s_own_is_talked_to_on_its_console(
    vmlab: Vmlab, built: tuple[Path, Path]
) -> None:
    """Any initramfs with a shell on its console will do; this one has an agent that is off."""
    initrd = ImageStore(IMAGE_STORE).ensure("debian-12-amd64-tiny").initrd
    done = vmlab.run(
        "run", "--hypervisor", "qemu", "--kernel", str(built[0]), "--initrd", str(initrd),
        "--append", "vmlab.agent=off", "--", "echo out; echo err >&2; exit 9",
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (9, b"out\n", b"err\n")
    assert not vmlab.processes() and not vmlab.files() and not vmlab.runs


def test_a_kernel_that_panics_is_given_up_at_once_with_what_it_said(
    vmlab: Vmlab, built: tuple[Path, Path]
) -> None:
    kernel, modules = built
    done = vmlab.run(
        "run", "--kernel", str(kernel), "--modules", str(modules),
        "--append", "rdinit=/nowhere root=/dev/none", "--", "true",
    )  # fmt: skip
    assert done.returncode == 3
    assert b"panicked while it booted" in done.stderr
    assert b"Unable to mount root fs" in done.stderr
    assert not vmlab.processes() and not vmlab.files() and not vmlab.runs
