"""Roots on disks: what mke2fs and debugfs make of an archive, and what is said without them."""

from __future__ import annotations

import getpass
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from vmlab.images import ImageStore
from vmlab.images.errors import BuildFailed, FormatError, ImageError, ToolMissing
from vmlab.images.formats import tarball
from vmlab.images.importing import Parts, import_image
from vmlab.images.roots import confinement, ext4, tools
from vmlab.images.roots.mirror import serving
from vmlab.machine.architecture import Architecture, host_architecture

MakeStore = Callable[..., ImageStore]
Forms = dict[str, Callable[..., bytes]]
EPOCH = 1_700_000_000

needs_ext4 = pytest.mark.skipif(
    tools.find("mke2fs") is None or tools.find("debugfs") is None,
    reason="needs the Debian package e2fsprogs",
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


def elf_program(machine: int) -> bytes:
    return b"\x7fELF\x02\x01\x01" + bytes(11) + machine.to_bytes(2, "little") + bytes(100)


@needs_ext4
def test_root_without_a_kernel_is_lent_the_one_of_a_tiny_image_and_its_modules(
    make_store: MakeStore,
    tmp_path: Path,
    forms: Forms,
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vmlab.images import recipe as recipes
    from vmlab.images.roots import imported

    asked: list[Architecture] = []

    def base(store: ImageStore, name: str | None, architecture: Architecture) -> recipes.Recipe:
        asked.append(architecture)
        return recipes.read(recipe_file)

    monkeypatch.setattr(imported, "base_recipe", base)
    path = tmp_path / "root.tar"
    path.write_bytes(forms["tar"]([
        ("bin/tool", elf_program(243), 0o755), ("lib/x", b"", 0o644), ("boot", "/boot", 0o777),
    ]))  # fmt: skip
    image = import_image(make_store(), "container", Parts(root=path), size=16 << 20)
    assert asked == [Architecture.RISCV64]
    assert (image.architecture, image.kernel_release) == (Architecture.RISCV64, "6.99-test")
    assert image.kernel is not None
    assert image.kernel.read_bytes() == forms["riscv"]()
    assert image.disk is not None
    table = debugfs(image.disk, "cat /lib/modules/6.99-test/modules.dep")
    assert "kernel/drivers/net/virtio_net.ko: kernel/net/failover.ko" in table
    assert "unwanted" not in table
    assert "Mode:  0755" in debugfs(image.disk, "stat /lib/modules/6.99-test/kernel")
    with pytest.raises(ImageError, match="holds programs for riscv64"):
        import_image(make_store(), "c", Parts(root=path), architecture=Architecture.X86_64)


@needs_ext4
def test_links_of_a_root_that_lead_out_of_it_are_not_followed(
    make_store: MakeStore,
    tmp_path: Path,
    forms: Forms,
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vmlab.images import recipe as recipes
    from vmlab.images.roots import imported

    monkeypatch.setattr(imported, "base_recipe", lambda *_: recipes.read(recipe_file))
    outside = tmp_path / "outside"
    (outside / "modules" / "6.99-test").mkdir(parents=True)
    (outside / "vmlinuz-9.9").write_bytes(forms["riscv"]("9.9"))
    path = tmp_path / "root.tar"
    path.write_bytes(forms["tar"]([
        ("bin/tool", elf_program(243), 0o755), ("boot", str(outside), 0o777),
        ("lib", str(outside), 0o777), ("usr/lib/modules", str(outside / "modules"), 0o777),
    ]))  # fmt: skip
    image = import_image(make_store(), "sly", Parts(root=path), size=16 << 20)
    assert image.kernel_release == "6.99-test"
    assert [each.name for each in outside.rglob("*")] == ["modules", "vmlinuz-9.9", "6.99-test"]


def test_newest_kernel_of_a_root_is_taken(tmp_path: Path) -> None:
    from vmlab.images.roots import imported

    (tmp_path / "boot").mkdir()
    for release in ("6.1.0-9-amd64", "6.1.0-10-amd64", "5.10.0-30-amd64"):
        (tmp_path / "boot" / f"vmlinuz-{release}").write_bytes(b"")
    assert imported._kernel(tmp_path) == tmp_path / "boot" / "vmlinuz-6.1.0-10-amd64"


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


def ended(process: int) -> bool:
    """Whether a process runs no more; it may not have been waited for yet."""
    try:
        return not Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return True


@pytest.mark.skipif(tools.find("setpriv") is None, reason="needs the Debian package util-linux")
def test_tool_dies_with_whoever_runs_it(
    tmp_path: Path, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    pid_file = tmp_path / "pid"
    script = (
        "from pathlib import Path\nfrom vmlab.images.roots import tools\n"
        f"tools.run(['/bin/sh', '-c', 'echo $$ >{pid_file}; exec sleep 1000'], what='x', "
        f"log=Path({str(tmp_path / 'log')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        wait_until(lambda: pid_file.exists() and pid_file.read_text().strip() != "")
        child = int(pid_file.read_text())
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: ended(child))


def test_interrupted_tool_is_ended_with_what_it_started(
    tmp_path: Path, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    pid_file = tmp_path / "pid"

    def interrupt(pid: int) -> None:
        wait_until(lambda: pid_file.exists() and pid_file.read_text().strip() != "")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tools.run(["/bin/sh", "-c", f"sleep 1000 & echo $! >{pid_file}; wait"], what="x",
                  log=tmp_path / "log", admit=interrupt)  # fmt: skip
    child = int(pid_file.read_text())
    wait_until(lambda: ended(child))


def foreign() -> Architecture:
    """An architecture whose programs this host cannot run by itself."""
    return next(each for each in confinement._QEMU if each is not host_architecture())


def test_foreign_programs_run_in_a_private_binfmt_misc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    architecture = foreign()
    name, _ = confinement._QEMU[architecture]
    monkeypatch.setattr(confinement, "_BINFMT", tmp_path)
    monkeypatch.setattr(tools, "find", lambda name: f"/usr/bin/{name}")
    ready = confinement.confined(["mmdebstrap", "x"], architecture)
    assert ready.command[:2] == ["/usr/bin/unshare", "--user"]
    assert ready.command[-2:] == ["mmdebstrap", "x"]
    script = ready.command[-4]
    assert f"{name}-static:F" in script
    assert "\\x7fELF".replace("ELF", "\\x45\\x4c\\x46") in script
    # A host that has the emulator registered needs no namespace of a user's.
    (tmp_path / name).touch()
    monkeypatch.setattr(confinement, "_permitted", lambda words: True)
    registered = confinement.confined(["mmdebstrap", "x"], architecture)
    assert not any("register" in word for word in registered.command)


def test_foreign_root_without_emulator_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(confinement, "_BINFMT", tmp_path)
    monkeypatch.setattr(tools, "find", lambda name: None)
    for ask in (
        lambda: confinement.confined(["x"], foreign()),
        lambda: confinement.check(foreign(), what="building x"),
    ):
        with pytest.raises(ToolMissing) as caught:
            ask()
        assert "qemu-user-static" in (caught.value.hint or "")


class OrdinaryUser:
    """What an ordinary user's host answers; every answer is one that was seen."""

    def __init__(self, patch: pytest.MonkeyPatch, directory: Path) -> None:
        self.subuid = directory / "subuid"
        self.subuid.write_text("other:100000:65536\nlab:165536:65536\n")
        patch.setattr(os, "geteuid", lambda: 1000)
        patch.setattr(getpass, "getuser", lambda: "lab")
        patch.setattr(tools, "find", lambda name: f"/usr/bin/{name}")
        real = Path
        patch.setattr(
            confinement, "Path",
            lambda path: self.subuid if path in ("/etc/subuid", "/etc/subgid") else real(path),
        )  # fmt: skip
        self.answer(patch, 0, "")

    def answer(self, patch: pytest.MonkeyPatch, status: int, said: str) -> None:
        patch.setattr(
            confinement, "_tried",
            lambda words: subprocess.CompletedProcess(words, status, stdout="", stderr=said),
        )  # fmt: skip


def test_ordinary_user_installs_as_root_of_a_user_namespace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    OrdinaryUser(monkeypatch, tmp_path)
    own = host_architecture()
    assert own is not None
    confinement.check(own, what="building x")
    ready = confinement.confined(["mmdebstrap", "x"], own)
    assert ready.admit is None
    assert {"--user", "--map-auto", "--map-root-user", "--kill-child=KILL"} <= set(ready.command)


def test_ordinary_user_who_cannot_install_is_told_what_has_to_be_allowed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    user = OrdinaryUser(monkeypatch, tmp_path)
    own = host_architecture()
    assert own is not None
    user.subuid.write_text("other:100000:65536\n")
    with pytest.raises(ToolMissing, match="/etc/subuid lends none to lab") as caught:
        confinement.check(own, what="building x")
    assert "usermod --add-subuids 100000-165535 lab" in (caught.value.hint or "")
    user.subuid.write_text("1000:100000:65536\n")
    user.answer(monkeypatch, 1, "unshare: unshare failed: Operation not permitted\n")
    with pytest.raises(ToolMissing, match="unshare failed: Operation not permitted") as caught:
        confinement.check(own, what="building x")
    assert "user.max_user_namespaces" in (caught.value.hint or "")
    monkeypatch.setattr(tools, "find", lambda name: None if name == "newuidmap" else name)
    with pytest.raises(
        ToolMissing, match="building x as an ordinary user needs newuidmap"
    ) as caught:
        confinement.check(own, what="building x")
    assert "install uidmap" in (caught.value.hint or "")


can_confine = pytest.mark.skipif(
    os.geteuid() != 0
    or tools.find("unshare") is None
    or not confinement._permitted([tools.find("unshare") or "", *confinement._NAMESPACES]),
    reason="needs root with namespaces, and the Debian package util-linux",
)


@can_confine
def test_killed_installation_leaves_no_process_and_no_mount(
    tmp_path: Path, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    """A grandchild that nobody waits for, in a session of its own, and a mount: both go."""
    (tmp_path / "mnt").mkdir()
    script = tmp_path / "install"
    script.write_text(
        f"mount -t tmpfs x {tmp_path}/mnt && touch {tmp_path}/mnt/inside\n"
        f"setsid sh -c 'cd {tmp_path}/mnt; flock {tmp_path}/held sh -c "
        f'"echo started >{tmp_path}/started; exec sleep 600"\' &\nwait\n'
    )
    code = (
        "from pathlib import Path\n"
        "from vmlab.images.roots import confinement, tools\n"
        "from vmlab.machine.architecture import host_architecture\n"
        f"ready = confinement.confined(['/bin/sh', {str(script)!r}], host_architecture())\n"
        f"tools.run(ready.command, what='x', log=Path({str(tmp_path / 'log')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_until((tmp_path / "started").exists)
        assert not (tmp_path / "mnt" / "inside").exists()  # mounted where nobody else sees it
        held = FileLock(tmp_path / "held")
        with pytest.raises(Timeout):
            held.acquire(timeout=0)
    finally:
        process.kill()
        process.wait()
    held.acquire(timeout=300)  # the kernel lets go of the lock when the process has ended
    held.release()


def test_local_mirror_serves_the_snapshot_and_nothing_else(
    make_store: MakeStore, archive: object
) -> None:
    import urllib.error
    import urllib.request

    store = make_store()
    suite = store.suite("debian", "trixie")
    snapshot = suite.snapshot()
    archive.date += 1000  # the mirror moves on
    archive.publish()
    with serving(suite, snapshot, components=("main",), architecture="riscv64",
                 progress=lambda event: None) as (sources, failures):  # fmt: skip
        (only,) = sources
        assert (only.suite, only.components) == ("trixie", ("main",))

        def get(path: str) -> bytes:
            with urllib.request.urlopen(f"{only.url}/{path}", timeout=300) as answer:
                data: bytes = answer.read()
                return data

        assert b"Suite: stable" in get("dists/trixie/InRelease")
        name = "pool/busybox-static_1.0_riscv64.deb"
        assert get(name) == archive.path("busybox-static").read_bytes()
        for path in ("etc/passwd", "../../etc/passwd", "pool/none.deb", "",
                     "../trixie-updates/dists/trixie-updates/InRelease"):  # fmt: skip
            with pytest.raises(urllib.error.HTTPError) as caught:
                get(path)
            assert caught.value.code == 404
            caught.value.close()
        (archive.root / "pool" / "linux-image-riscv64_1.0_riscv64.deb").write_bytes(b"")
        with pytest.raises(urllib.error.HTTPError) as caught:
            get("pool/linux-image-riscv64_1.0_riscv64.deb")
        assert caught.value.code == 502
        caught.value.close()
        assert len(failures) == 1


ROOT = """
name = "small-root"
suite = "trixie"
architecture = "riscv64"
format = "raw"
size = "256M"
kernel = "linux-image-riscv64"
[[files]]
path = "/etc/note"
text = "one"
[modules]
load = ["virtio_console"]
late = []
available = []
"""


@pytest.fixture
def built_disks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Full roots are a few bytes, and every one that is built is told here."""
    from vmlab.images.roots import build

    seeds: list[str] = []

    def disk_of(*_: object, disk: Path, seed: str, **__: object) -> dict[str, str]:
        seeds.append(seed)
        disk.write_bytes(seed.encode())
        return {"base-files": "13"}

    monkeypatch.setattr(build, "check_tools", lambda recipe: {})
    monkeypatch.setattr(build, "_build_disk", disk_of)
    return seeds


def test_root_is_built_again_for_another_root_and_not_for_another_agent(
    make_store: MakeStore, tmp_path: Path, built_disks: list[str]
) -> None:
    from vmlab.images import recipe as recipes

    store = make_store()
    one = recipes.parse(ROOT)
    first = store.build(one, agent=lambda: b"#!/bin/sh\necho one\n")
    second = store.build(one, agent=lambda: b"#!/bin/sh\necho two\n")
    assert len(built_disks) == 1
    assert first.digest != second.digest
    assert first.disk is not None
    assert second.disk is not None
    assert first.disk.samefile(second.disk)
    assert first.files["initrd"].sha256 != second.files["initrd"].sha256
    assert second.source["packages"]["base-files"] == "13"
    assert store.verify() == []
    assert store.build_twice(one)[1].keys() <= {"initrd"}  # by vmlab's own agent
    store.remove(first.digest)
    assert second.disk.read_bytes() == built_disks[0].encode()
    assert store.build(one, agent=lambda: b"#!/bin/sh\necho two\n") == second
    built_disks.clear()
    other = recipes.parse(ROOT.replace("one", "another"))
    assert store.build(other, agent=lambda: None).disk is not None
    assert len(built_disks) == 1


def test_damaged_root_is_not_lent_to_another_image(
    make_store: MakeStore, built_disks: list[str]
) -> None:
    from vmlab.images import recipe as recipes

    store = make_store()
    recipe = recipes.parse(ROOT)
    first = store.build(recipe, agent=lambda: b"one")
    assert first.disk is not None
    first.disk.chmod(0o644)
    first.disk.write_bytes(b"x" * first.files["disk"].size)
    second = store.build(recipe, agent=lambda: b"two")
    assert len(built_disks) == 2
    assert second.disk is not None
    assert second.disk.read_bytes() == built_disks[1].encode()
