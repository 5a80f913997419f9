"""From what somebody wishes for to the specification of a machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmlab.images.image import Image, StoredFile
from vmlab.lab import boot
from vmlab.lab.boot import Wish
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import InvalidSpec
from vmlab.machine.spec import ShareKind


def image(directory: Path, **fields: Any) -> Image:
    files = {role: StoredFile(role, 1, "") for role in ("kernel", "initrd")}
    return Image(
        "0" * 64, "tiny", Architecture.RISCV64, directory, files, cmdline="quiet", **fields
    )


def test_a_debugged_kernel_is_told_to_stay_where_its_symbols_say(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    wish = Wish(gdb=True, kernel=kernel)
    made = boot.booted_by(wish, image(tmp_path))
    assert made.debugged and made.symbols == kernel
    assert made.spec.boot.cmdline.split() == [
        "quiet", "loglevel=5", f"vmlab.hostname={wish.name}", "nokaslr"
    ]  # fmt: skip
    plain = boot.booted_by(Wish(kernel=kernel), image(tmp_path))
    assert not plain.debugged and plain.symbols is None
    assert "nokaslr" not in plain.spec.boot.cmdline


def test_what_the_user_appends_comes_last(tmp_path: Path) -> None:
    made = boot.booted_by(Wish(append="debug loglevel=8", network=True), image(tmp_path))
    assert made.spec.boot.cmdline.endswith("vmlab.net=dhcp debug loglevel=8")


def test_copied_shares_are_kept_apart_from_mounted_ones(tmp_path: Path) -> None:
    wish = Wish(shares=(f"{tmp_path}:/a:copy", f"{tmp_path}:/b:rw", f"{tmp_path}:/c:9p"))
    made = boot.booted_by(wish, image(tmp_path))
    assert [(share.target, share.readonly) for share in made.spec.shares] == [
        ("/b", False), ("/c", True)
    ]  # fmt: skip
    assert [(share.target, share.kind) for share in made.copies.shares] == [
        ("/a", ShareKind.COPY)
    ]  # fmt: skip


def test_what_the_engine_only_reads_is_copied_to_it(tmp_path: Path) -> None:
    wish = Wish(shares=(f"{tmp_path}:/a", f"{tmp_path}:/b:rw", f"{tmp_path}:/c:9p"), engine=True)
    for architecture, copied in ((Architecture.RISCV64, ["/a"]), (Architecture.X86_64, [])):
        made = boot.booted_by(wish, replace(image(tmp_path), architecture=architecture))
        assert [share.target for share in made.copies.shares] == copied
        assert {share.target for share in made.spec.shares} == {"/a", "/b", "/c"} - set(copied)


def test_disks_are_in_the_order_in_which_they_are_named(tmp_path: Path) -> None:
    made = boot.booted_by(Wish(disks=("1G", "64M")), image(tmp_path))
    assert [(disk.name, disk.size) for disk in made.spec.disks] == [
        ("disk0", 1 << 30), ("disk1", 64 << 20)
    ]  # fmt: skip


def test_a_terminal_is_a_console_of_its_own(tmp_path: Path) -> None:
    consoles = boot.booted_by(Wish(terminal=True), image(tmp_path)).spec.consoles
    assert [(console.name, console.kind) for console in consoles] == [
        ("serial", "serial"), (boot.TERMINAL, "virtio")
    ]  # fmt: skip
    assert len(boot.booted_by(Wish(), image(tmp_path)).spec.consoles) == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image": "a", "kernel": Path("/nowhere")}, "--image"),
        ({"initrd": Path("/nowhere")}, "needs --kernel"),
        ({"modules": Path("/nowhere")}, "needs --kernel"),
        ({"kernel": Path("/nowhere")}, "a file that exists"),
        ({"shares": ("/nowhere:/src",)}, "a directory that exists"),
        ({"shares": ("nothing",)}, "--share"),
        ({"memory": "lots"}, "lots"),
        ({"disks": ("none",)}, "none"),
        ({"cpus": 0}, "cpus"),
    ],
)
def test_a_wish_that_cannot_be_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        boot.check(Wish(**fields))
    assert named in str(caught.value)


def test_every_problem_of_a_wish_is_told_at_once() -> None:
    with pytest.raises(InvalidSpec) as caught:
        boot.check(Wish(kernel=Path("/nowhere"), modules=Path("/nor/there")))
    assert "--kernel" in str(caught.value) and "--modules" in str(caught.value)
