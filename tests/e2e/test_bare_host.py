"""From pip alone: a fresh environment, an ordinary user, no QEMU, no compiler, no linker.

Everything is built and installed anew, which takes its while: only `make soak` runs it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.store import IMAGE_STORE

from vmlab.images import ImageStore
from vmlab.lab.preference import TINY
from vmlab.machine.architecture import Architecture

pytestmark = [pytest.mark.soak, pytest.mark.boots, pytest.mark.timeout(0)]

ROOT = Path(__file__).parents[2]
NOBODY = 65534
# Bound over by nothing: names of programs, and the places that they are in.
HIDE = r"""
for place in /usr/bin /usr/local/bin /bin /usr/libexec; do
    for program in "$place"/qemu-* "$place"/*gcc* "$place"/*g++* "$place"/*clang* "$place"/cc \
        "$place"/c++ "$place"/cpp* "$place"/*-ld* "$place"/ld "$place"/ld.[bgl]* "$place"/as \
        "$place"/*-as; do
        [ -f "$program" ] && mount --bind /dev/null "$(readlink -f "$program")" 2>/dev/null
    done
done
"$@"
"""


def interpreter() -> str:
    """A Python that every user of this host can run."""
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        path = shutil.which(name, path="/usr/local/bin:/usr/bin")
        code = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"
        if path and subprocess.run([path, "-c", code], check=False).returncode == 0:
            return path
    pytest.skip("needs a Python of the system's, 3.11 or later, with venv")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody can go through."""
    folder = Path(tempfile.mkdtemp(prefix="vmlab-bare-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def lend_image(store: Path) -> None:
    """Put the tiny image into a store: what it is fetched from is its recipe's business."""
    image = ImageStore(IMAGE_STORE).ensure(TINY[Architecture.RISCV64])
    shutil.copytree(image.directory, store / "images" / image.directory.name)
    shutil.copytree(IMAGE_STORE / "index", store / "index")


def test_pip_and_nothing_else_boots_a_guest(place: Path) -> None:
    if not (shutil.which("unshare") and shutil.which("setpriv")):
        pytest.skip("needs unshare and setpriv of util-linux")
    pip = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place), str(ROOT)]
    subprocess.run([sys.executable, *pip, *wheel], check=True)
    subprocess.run([interpreter(), "-m", "venv", str(place / "venv")], check=True)
    locked = re.sub(r"\s*\\\n\s*--hash=\S+", "", (ROOT / "constraints.txt").read_text())
    (place / "locked.txt").write_text(locked)
    built = next(place.glob("*.whl"))
    words = [*pip, "install", "--constraint", str(place / "locked.txt"), str(built)]
    subprocess.run([place / "venv" / "bin" / "python", *words], check=True)

    home = place / "home"
    home.mkdir()
    lend_image(home / "store")
    if os.geteuid() == 0:
        for path in (home, *home.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        namespace = ["unshare", "--mount"]
    else:
        user, namespace = [], ["unshare", "--map-root-user", "--mount"]
    clean = ["env", "-i", f"HOME={home}", "PATH=/usr/bin:/bin", "LANG=C.UTF-8"]
    clean.append(f"VMLAB_IMAGE_STORE={home}/store")
    # Where the host says so: what its apt reads.
    passed = [name for name in os.environ if name.startswith(("APT_", "VMLAB_DEBIAN"))]
    clean += [f"{name}={os.environ[name]}" for name in passed]
    run = [str(place / "venv" / "bin" / "vmlab"), "run", "--"]
    done = subprocess.run(
        [*namespace, "sh", "-c", HIDE, "sh", *user, *clean, *run, "uname -a; cat /proc/cpuinfo"],
        capture_output=True,
        text=True,
        check=False,
        timeout=3000,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"Linux \S+ .* riscv64 GNU/Linux\n", done.stdout)
    assert "rv64imafdc" in done.stdout
    assert "QEMU" not in done.stderr
