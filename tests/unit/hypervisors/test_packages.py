from __future__ import annotations

from pathlib import Path

import pytest

from vmlab.hypervisors import packages
from vmlab.hypervisors.packages import PACKAGES, Distribution, distribution, install_command

# First lines of /etc/os-release of these systems.
DEBIAN_12 = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nVERSION_ID="12"\nID=debian\n'
DEBIAN_13 = 'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nVERSION_ID="13"\nID=debian\n'
DEBIAN_SID = 'PRETTY_NAME="Debian GNU/Linux forky/sid"\nID=debian\n'
UBUNTU_24 = 'PRETTY_NAME="Ubuntu 24.04.1 LTS"\nVERSION_ID="24.04"\nID=ubuntu\nID_LIKE=debian\n'
UBUNTU_25 = 'PRETTY_NAME="Ubuntu 25.04"\nVERSION_ID="25.04"\nID=ubuntu\nID_LIKE=debian\n'
FEDORA = 'NAME="Fedora Linux"\nID=fedora\nVERSION_ID=41\nPRETTY_NAME="Fedora Linux 41"\n'
ROCKY = (
    'ID="rocky"\nID_LIKE="rhel centos fedora"\nVERSION_ID="9.4"\nPRETTY_NAME="Rocky Linux 9.4"\n'
)
ARCH = '# a comment=x\n\nNAME="Arch Linux"\nPRETTY_NAME="Arch Linux"\nID=arch\n'
SUSE = 'ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\nPRETTY_NAME="openSUSE Tumbleweed"\n'
ALPINE = 'ID=alpine\nVERSION_ID=3.20.3\nPRETTY_NAME="Alpine Linux v3.20"\n'
ODD = 'ID=odd\nPRETTY_NAME="Odd\n'


@pytest.mark.parametrize(
    ("text", "family", "riscv"),
    [
        (DEBIAN_12, "debian", "qemu-system-misc"),
        (DEBIAN_13, "debian", "qemu-system-riscv"),
        (DEBIAN_SID, "debian", "qemu-system-riscv"),
        (UBUNTU_24, "debian", "qemu-system-misc"),
        (UBUNTU_25, "debian", "qemu-system-riscv"),
        (FEDORA, "fedora", "qemu-system-riscv"),
        (ROCKY, "fedora", "qemu-system-riscv"),
        (ARCH, "arch", "qemu-system-riscv"),
        (SUSE, "suse", "qemu-extra"),
        (ALPINE, "alpine", "qemu-system-riscv64"),
        (ODD, None, None),
    ],
)
def test_a_distribution_is_known_by_its_os_release(
    tmp_path: Path, text: str, family: str | None, riscv: str | None
) -> None:
    (tmp_path / "usr" / "lib").mkdir(parents=True)
    (tmp_path / "usr" / "lib" / "os-release").write_text(text)
    found = distribution(tmp_path, "linux")
    assert found.family == family
    assert found.package("qemu-system-riscv64") == riscv
    assert found.name in text


def test_etc_comes_before_usr(tmp_path: Path) -> None:
    for folder, text in (("etc", DEBIAN_12), ("usr/lib", FEDORA)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "os-release").write_text(text)
    assert distribution(tmp_path, "linux").family == "debian"


def test_other_systems(tmp_path: Path) -> None:
    assert distribution(tmp_path, "linux") == Distribution("an unknown system")
    assert distribution(tmp_path, "darwin") == Distribution("macOS", "homebrew")


@pytest.mark.parametrize(
    ("family", "euid", "command"),
    [
        ("debian", 1000, "sudo apt-get install qemu-system-x86 qemu-utils passt"),
        ("debian", 0, "apt-get install qemu-system-x86 qemu-utils passt"),
        ("fedora", 0, "dnf install qemu-system-x86 qemu-img passt"),
        ("homebrew", 1000, "brew install qemu"),
        (None, 0, None),
    ],
)
def test_one_command_installs_all(
    monkeypatch: pytest.MonkeyPatch, family: str | None, euid: int, command: str | None
) -> None:
    monkeypatch.setattr(packages.os, "geteuid", lambda: euid)
    programs = ["qemu-system-x86_64", "qemu-img", "passt", "no-such-program"]
    assert install_command(programs, Distribution("x", family)) == command


def test_nothing_is_guessed() -> None:
    assert install_command(["mmdebstrap"], Distribution("x", "fedora")) is None
    assert install_command([], Distribution("x", "debian")) is None


def test_every_program_can_be_installed_on_debian() -> None:
    for program in PACKAGES:
        assert Distribution("x", "debian").package(program)
