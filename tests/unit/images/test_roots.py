"""Roots on disks: what mke2fs and debugfs make of an archive, and what is said without them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vmlab.images import ImageStore
from vmlab.images.errors import BuildFailed, FormatError, ImageError, ToolMissing
from vmlab.images.formats import tarball
from vmlab.images.importing import Parts, import_image
from vmlab.images.roots import emulation, ext4, tools
from vmlab.images.roots.mirror import serving
from vmlab.machine.architecture import Architecture

MakeStore = Callable[..., ImageStore]
Forms = dict[str, Callable[..., bytes]]
EPOCH = 1_700_000_000

needs_ext4 = pytest.mark.skipif(
    tools.find("mke2fs") is None or tools.find("debugfs") is None,
    reason="mke2fs and debugfs (e2fsprogs) are not installed",
)


def small_root() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.mtime, info.mode = kind, EPOCH - 100, 0o644
            data = fields.pop("data", b"")
            assert isinstance(data, bytes)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))

        add("./", tarfile.DIRTYPE, mode=0o755)
        add("./bin", tarfile.DIRTYPE, mode=0o755)
        add("./bin/sh", data=b"shell", mode=0o4755, uid=0, gid=0)
        add("./bin/bash", tarfile.LNKTYPE, linkname="./bin/sh")
        add("./home", tarfile.DIRTYPE, mode=0o2750, uid=1000, gid=1001)
        add("./home/a file", data=b"x" * 5000, uid=1000, gid=1001, mode=0o600)
        add("./etc/link", tarfile.SYMTYPE, linkname="/bin/sh")
        add("./dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
        add("./capable", data=b"c", pax_headers={"SCHILY.xattr.user.note": "hello"})
    return buffer.getvalue()


def make(tmp_path: Path, name: str) -> Path:
    root = tmp_path / name
    scratch = tmp_path / f"{name}.scratch"
    root.mkdir()
    scratch.mkdir()
    entries = tarball.extract(io.BytesIO(small_root()), root, source="root.tar")
    output = tmp_path / f"{name}.ext4"
    ext4.make(root, entries, output, size=16 << 20, seed="s", epoch=EPOCH, scratch=scratch)
    return output


def debugfs(image: Path, command: str) -> str:
    program = tools.find("debugfs")
    assert program is not None
    return subprocess.run(
        [program, "-R", command, str(image)], capture_output=True, text=True, check=True
    ).stdout


@needs_ext4
def test_files_have_the_owners_modes_devices_and_attributes_of_the_archive(
    tmp_path: Path,
) -> None:
    image = make(tmp_path, "a")
    shell = debugfs(image, "stat /bin/sh")
    assert "Mode:  04755" in shell
    assert "Links: 2" in shell
    home = debugfs(image, 'stat "/home/a file"')
    assert "User:  1000   Group:  1001" in home
    assert "Mode:  0600" in home
    for time in ("ctime", "crtime"):  # the host gives every copy others
        assert f"{time}: 0x{EPOCH:08x}:" in home
    assert f"mtime: 0x{EPOCH - 100:08x}:" in home
    assert "Mode:  02750" in debugfs(image, "stat /home")
    assert "Device major/minor number: 01:03" in debugfs(image, "stat /dev/null")
    assert 'Fast link dest: "/bin/sh"' in debugfs(image, "stat /etc/link")
    assert 'user.note (5) = "hello"' in debugfs(image, "ea_list /capable")
    assert debugfs(image, 'cat "/home/a file"') == "x" * 5000


@needs_ext4
def test_file_system_is_sound_and_the_same_every_time(tmp_path: Path) -> None:
    one = make(tmp_path, "one")
    os.utime(tmp_path / "one", (5, 5))
    two = make(tmp_path, "two")
    assert one.read_bytes() == two.read_bytes()
    fsck = tools.find("e2fsck")
    if fsck is not None:  # it comes with mke2fs
        result = subprocess.run([fsck, "-fn", str(one)], capture_output=True, check=False)
        assert result.returncode == 0, result.stdout
    assert one.stat().st_blocks * 512 < 8 << 20


@needs_ext4
def test_root_that_does_not_fit_is_said_to_not_fit(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "large").write_bytes(os.urandom(4 << 20))
    with pytest.raises(BuildFailed, match="making the file system failed"):
        ext4.make(root, [], tmp_path / "out", size=2 << 20, seed="s", epoch=EPOCH,
                  scratch=tmp_path)  # fmt: skip


@needs_ext4
def test_name_that_debugfs_cannot_be_given_is_refused(tmp_path: Path, forms: Forms) -> None:
    root = tmp_path / "root"
    root.mkdir()
    data = forms["tar"]([('say "quit"', b"", 0o644)])
    entries = tarball.extract(io.BytesIO(data), root, source="x")
    with pytest.raises(FormatError, match="cannot be handled"):
        ext4.make(root, entries, tmp_path / "out", size=8 << 20, seed="s", epoch=EPOCH,
                  scratch=tmp_path)  # fmt: skip


@needs_ext4
def test_tarred_root_becomes_a_disk_with_a_kernel_and_an_initramfs(
    make_store: MakeStore,
    tmp_path: Path,
    forms: Forms,
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vmlab.images import recipe as recipes
    from vmlab.images.roots import imported

    monkeypatch.setattr(imported, "base_recipe", lambda *_: recipes.read(recipe_file))
    path = tmp_path / "root.tar.gz"
    import gzip

    path.write_bytes(gzip.compress(small_root()))
    store = make_store()
    with pytest.raises(ImageError, match="no kernel in /boot"):
        import_image(store, "mine", Parts(root=path))
    kernel = tmp_path / "Image"
    kernel.write_bytes(forms["riscv"]())
    image = import_image(store, "mine", Parts(root=path, kernel=kernel), size=16 << 20)
    assert image.disk is not None
    assert image.initrd is not None
    assert (image.disk_format, image.architecture) == ("raw", Architecture.RISCV64)
    assert image.cmdline == "root=LABEL=vmlab-root quiet panic=-1"
    assert image.channels == ("agent", "console")
    assert debugfs(image.disk, "cat /bin/bash") == "shell"
    assert store.ensure("mine") == image


def test_missing_tools_are_named_with_what_to_install(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "find", lambda name: None)
    store = make_store()
    with pytest.raises(ToolMissing) as caught:
        store.ensure("debian-12-amd64")
    assert "mmdebstrap, mke2fs, debugfs, depmod" in caught.value.message
    assert "install e2fsprogs kmod mmdebstrap" in (caught.value.hint or "")
    assert not (store.root / "cache").exists()


def test_failing_tool_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=r"this and that failed: sh ended with status 3:\n.*sad"):
        tools.run(["/bin/sh", "-c", "echo sad; exit 3"], what="this and that",
                  log=tmp_path / "log")  # fmt: skip


@pytest.mark.skipif(tools.find("setpriv") is None, reason="setpriv (util-linux) is not installed")
def test_tool_dies_with_whoever_runs_it(
    tmp_path: Path, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    pid_file = tmp_path / "pid"
    script = (
        "from pathlib import Path\nfrom vmlab.images.roots import tools\n"
        f"tools.run(['/bin/sh', '-c', 'echo $$ >{pid_file}; exec sleep 60'], what='x', "
        f"log=Path({str(tmp_path / 'log')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        wait_until(lambda: pid_file.exists() and pid_file.read_text().strip() != "")
        child = int(pid_file.read_text())
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not Path(f"/proc/{child}/cmdline").exists()
               or not Path(f"/proc/{child}/cmdline").read_bytes())  # fmt: skip


def test_interrupted_tool_is_ended_with_what_it_started(
    tmp_path: Path, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    pid_file = tmp_path / "pid"

    def interrupt(pid: int) -> None:
        wait_until(lambda: pid_file.exists() and pid_file.read_text().strip() != "")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tools.run(["/bin/sh", "-c", f"sleep 60 & echo $! >{pid_file}; wait"], what="x",
                  log=tmp_path / "log", admit=interrupt)  # fmt: skip
    child = int(pid_file.read_text())
    wait_until(lambda: not Path(f"/proc/{child}/cmdline").exists()
               or not Path(f"/proc/{child}/cmdline").read_bytes())  # fmt: skip


def test_foreign_programs_run_in_a_private_binfmt_misc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(emulation, "_BINFMT", tmp_path)
    monkeypatch.setattr(tools, "find", lambda name: f"/usr/bin/{name}")
    ready = emulation.wrapped(["mmdebstrap", "--mode=unshare", "x"], Architecture.RISCV64)
    command = ready.command
    assert command[0] == "/usr/bin/unshare"
    assert command[-3:] == ["mmdebstrap", "--mode=root", "x"]
    script = command[command.index("-ec") + 1]
    assert "qemu-riscv64-static:F" in script
    assert "\\x7fELF".replace("ELF", "\\x45\\x4c\\x46") in script
    (tmp_path / "qemu-riscv64").touch()
    assert emulation.wrapped(["mmdebstrap"], Architecture.RISCV64) == emulation.Wrapped(
        ["mmdebstrap"]
    )


def test_foreign_root_without_emulator_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(emulation, "_BINFMT", tmp_path)
    monkeypatch.setattr(tools, "find", lambda name: None)
    with pytest.raises(ToolMissing) as caught:
        emulation.wrapped(["x"], Architecture.PPC64LE)
    assert "qemu-user-static" in (caught.value.hint or "")


def test_local_mirror_serves_the_snapshot_and_nothing_else(
    make_store: MakeStore, archive: object
) -> None:
    import urllib.error
    import urllib.request

    store = make_store()
    suite = store.suite("debian", "trixie")
    snapshot = suite.snapshot()
    archive.date += 1000  # type: ignore[attr-defined]  # the mirror moves on
    archive.publish()  # type: ignore[attr-defined]
    with serving(suite, snapshot, components=("main",), architecture="riscv64",
                 progress=lambda event: None) as (sources, failures):  # fmt: skip
        (only,) = sources
        assert (only.suite, only.components) == ("trixie", ("main",))

        def get(path: str) -> bytes:
            with urllib.request.urlopen(f"{only.url}/{path}", timeout=10) as answer:
                data: bytes = answer.read()
                return data

        assert b"Suite: stable" in get("dists/trixie/InRelease")
        name = "pool/busybox-static_1.0_riscv64.deb"
        assert get(name) == archive.path("busybox-static").read_bytes()  # type: ignore[attr-defined]
        for path in ("etc/passwd", "../../etc/passwd", "pool/none.deb", "",
                     "../trixie-updates/dists/trixie-updates/InRelease"):  # fmt: skip
            with pytest.raises(urllib.error.HTTPError) as caught:
                get(path)
            assert caught.value.code == 404
            caught.value.close()
        (archive.root / "pool" / "linux-image-riscv64_1.0_riscv64.deb").write_bytes(b"")  # type: ignore[attr-defined]
        with pytest.raises(urllib.error.HTTPError) as caught:
            get("pool/linux-image-riscv64_1.0_riscv64.deb")
        assert caught.value.code == 502
        caught.value.close()
        assert len(failures) == 1
