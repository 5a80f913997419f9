"""Full roots as they are built and used: minutes each, so only `make soak` runs them.

They need a Debian mirror, or what an earlier run fetched, and as many gigabytes as they say.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.store import IMAGE_STORE

from vmlab.images import ImageStore
from vmlab.images.roots import confinement, tools

SMALL = """
name = "small-root"
suite = "bookworm"
architecture = "x86_64"
format = "raw"
size = "1G"
kernel = "linux-image-amd64"
packages = ["systemd-sysv", "udev"]
"""
NOBODY = 65534

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        any(tools.find(name) is None for name in ("mmdebstrap", "mke2fs", "debugfs", "depmod")),
        reason="needs the Debian packages mmdebstrap, e2fsprogs, kmod",
    ),
]


def store_with_what_was_fetched(root: Path) -> ImageStore:
    """An empty store that need not fetch what the user's has."""
    root.mkdir()
    for folder in ("cache", "index"):
        (IMAGE_STORE / folder).mkdir(parents=True, exist_ok=True)
        (root / folder).symlink_to(IMAGE_STORE / folder)
    return ImageStore(root)


@pytest.mark.parametrize("name", ["debian-12-amd64", "debian-13-riscv64"])
def test_full_root_has_the_same_bytes_in_two_stores(tmp_path: Path, name: str) -> None:
    images = []
    for place in ("one", "two"):
        images.append(store_with_what_was_fetched(tmp_path / place).ensure(name))
    assert images[0].to_manifest() == images[1].to_manifest()


TOOLS = {
    "gcc": "gcc -g -o hello hello.c && ./hello",
    "make": "make -s made",
    "cargo": "cargo init -q --vcs none hi && cd hi && cargo build -q --offline && target/debug/hi",
    "clippy": "cd hi && cargo clippy -q --offline",
    "rustfmt": "cd hi && cargo fmt --check",
    "headers": "make -s -C /lib/modules/$(uname -r)/build M=$PWD modules && insmod m.ko"
    " && dmesg | grep 'm is in' && rmmod m",
    "gdb": "gdb -batch -ex 'break main' -ex run -ex bt ./hello | grep 'main ()'",
    "strace": "strace -o log ./hello && grep exit_group log",
    "perf": "perf stat -e task-clock ./hello",
    "fio": "fio --name=x --size=1M --filename=fio.dat",
    "stress-ng": "stress-ng --cpu 1 --timeout 1s -q",
}
ONLY_AMD64 = {
    "valgrind": "valgrind -q --error-exitcode=1 ./hello",
    "criu": "criu check",
    "kexec": "kexec -s -l /boot/vmlinuz-$(uname -r) --reuse-cmdline"
    " && grep 1 /sys/kernel/kexec_loaded",
}
SOURCES = {
    "hello.c": '#include <stdio.h>\nint main(void) { puts("compiled"); return 0; }\n',
    "Makefile": "obj-m := m.o\nmade:\n\t@echo made\n",
    "m.c": "#include <linux/module.h>\n"
    'static int __init m_in(void) { pr_info("m is in\\n"); return 0; }\n'
    "static void __exit m_out(void) {}\n"
    'module_init(m_in);\nmodule_exit(m_out);\nMODULE_LICENSE("GPL");\n',
}


@pytest.mark.parametrize("name", ["debian-12-amd64-dev", "debian-13-riscv64-dev"])
def test_every_tool_of_a_developers_image_works_in_its_guest(tmp_path: Path, name: str) -> None:
    wanted = {**TOOLS, **(ONLY_AMD64 if "amd64" in name else {})}
    lines = ["mkdir /root/lab && cd /root/lab && cp /src/* . || exit 2"]
    lines += [
        f"if ({command}) >out 2>&1; then echo 'works: {tool}'; "
        f"else echo 'FAILS: {tool}'; cat out; fi"
        for tool, command in wanted.items()
    ]
    shared = tmp_path / "src"
    shared.mkdir()
    (shared / "tools.sh").write_text("\n".join(lines) + "\n")
    for file, text in SOURCES.items():
        (shared / file).write_text(text)
    command = [
        sys.executable, "-m", "vmlab", "run", "--image", name, "--memory", "1G",
        "--share", f"{shared}:/src", "--", "sh", "/src/tools.sh",
    ]  # fmt: skip
    environment = {**os.environ, "VMLAB_IMAGE_STORE": str(IMAGE_STORE)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    works = {line.removeprefix("works: ") for line in done.stdout.splitlines()
             if line.startswith("works: ")}  # fmt: skip
    assert works == set(wanted), done.stdout


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def processes_of(place: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline", "pid"]):
        words = " ".join(process.info["cmdline"] or ())
        if str(place) in words and process.pid != os.getpid():
            found.append(f"{process.pid} {words[:200]}")
    return found


def test_full_root_that_is_killed_in_the_middle_leaves_no_process_no_mount_and_no_file(
    tmp_path: Path, small: Path
) -> None:
    store = store_with_what_was_fetched(tmp_path / "store")
    command = [sys.executable, "-m", "vmlab", "image", "build", str(small), "--store",
               str(store.root)]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            installed = list(store.root.glob("work/*/mmdebstrap.*/var/lib/dpkg/info/*.list"))
            if len(installed) > 40:
                break
            time.sleep(0.2)
        assert process.poll() is None, "it was over before it could be killed"
        process.send_signal(signal.SIGKILL)
    end = time.monotonic() + 60
    while processes_of(store.root / "work"):
        assert time.monotonic() < end, processes_of(store.root / "work")
        time.sleep(0.2)
    assert str(store.root / "work") not in Path("/proc/self/mounts").read_text()
    assert store.ensure(small).name == "small-root"
    assert list((store.root / "work").iterdir()) == []


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """A directory of an ordinary user's, where pytest does not close it to others."""
    directory = Path(tempfile.mkdtemp(prefix="vmlab-u-"))
    directory.chmod(0o755)
    (directory / "small.toml").write_text(SMALL)
    shutil.copytree(IMAGE_STORE / "index", directory / "store" / "index")
    (directory / "store" / "cache").mkdir()
    shutil.copytree(IMAGE_STORE / "cache" / "sha256", directory / "store" / "cache" / "sha256")
    for place in (directory, *directory.rglob("*")):
        os.chown(place, NOBODY, NOBODY)
    yield directory
    shutil.rmtree(directory)


# In a mount namespace of its own, where /etc/subuid lends the ordinary user ids, and where the
# interpreter can be reached although it may lie in a home directory that is closed to others.
AS_NOBODY = """
mount --bind {lent} /etc/subuid
mount --bind {lent} /etc/subgid
mkdir -p {away}
mount --bind {python} {away}
case {python} in
    /root/*)
        mount -t tmpfs -o mode=755 closed /root
        mkdir -p {python}
        mount --bind {away} {python}
        ;;
esac
cd /
exec setpriv --reuid 65534 --regid 65534 --clear-groups env HOME=/nonexistent VMLAB_CONFIG=/none \
    PYTHONPATH={path} PYTHONDONTWRITEBYTECODE=1 "$@"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.skipif(tools.find("newuidmap") is None, reason="needs the Debian package uidmap")
def test_ordinary_user_builds_the_same_full_root_as_root_does(
    tmp_path: Path, small: Path, nobodys: Path
) -> None:
    by_root = store_with_what_was_fetched(tmp_path / "roots").ensure(small)
    lent = tmp_path / "lent"
    lent.write_text("nobody:100000:65536\n")
    away = tmp_path / "python"
    script = AS_NOBODY.format(
        lent=lent,
        away=away,
        python=sys.base_prefix,
        path=":".join(path for path in sys.path if path),
    )
    store = nobodys / "store"
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh",
               sys.executable, "-m", "vmlab", "image", "build", str(nobodys / "small.toml"),
               "--store", str(store)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (image,) = ImageStore(store).images()
    assert image.directory.stat().st_uid == NOBODY
    assert image.to_manifest() == by_root.to_manifest()


def test_this_host_can_build_for_every_architecture() -> None:
    for architecture in confinement._QEMU:
        confinement.check(architecture, what="a test")
