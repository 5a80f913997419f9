"""vmlab as a user calls it: in a process of its own, with real images and a home of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.store import IMAGE_STORE

from vmlab.images import Image
from vmlab.images.formats import cpio

AMD64 = ("--hypervisor", "qemu", "--image", "debian-12-amd64-tiny")
"""The options of a machine that most of these tests are about."""


class Vmlab:
    """The command `vmlab` with a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {
            **os.environ,
            "VMLAB_HOME": str(home),
            "VMLAB_IMAGE_STORE": str(IMAGE_STORE),
        }

    def start(self, *words: str, **given: Any) -> subprocess.Popen[bytes]:
        """Start it, with stdin from nowhere and stdout and stderr kept unless `given` says else."""
        streams = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "vmlab", *words], env=self.environment, **(streams | given)
        )

    def run(self, *words: str, input: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        """Run it to its end."""
        return subprocess.run(
            [sys.executable, "-m", "vmlab", *words],
            env=self.environment,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            check=False,
            timeout=300,
        )

    def processes(self) -> list[psutil.Process]:
        """What runs with this home, vmlab itself not counted."""
        return [
            process
            for process in psutil.process_iter(["cmdline", "cwd"])
            if any(str(self.home) in word for word in process.info["cmdline"] or ())
            or str(self.home) in (process.info["cwd"] or "")
        ]

    def engines(self) -> list[psutil.Process]:
        """Those of them that are embedded engines."""
        return [
            process for process in self.processes() if "vmlab.engine" in process.info["cmdline"]
        ]

    def files(self) -> list[Path]:
        """What lies in the home."""
        return [path for path in self.home.rglob("*") if not path.is_dir() and path.name != "lock"]

    @property
    def runs(self) -> list[Path]:
        """The directories of runs."""
        return list((self.home / "runs").iterdir())


def unpack_modules(image: Image, directory: Path) -> None:
    """What `make modules_install INSTALL_MOD_PATH=DIRECTORY` leaves, for a tiny image's kernel."""
    assert image.initrd is not None
    with image.initrd.open("rb") as file:
        for entry in cpio.read(file, source="initrd"):
            inside = re.search(r"lib/modules/(.*\.ko)$", entry.path)
            if inside is not None:
                place = directory / "lib" / "modules" / inside[1]
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(entry.data)


@pytest.fixture
def vmlab() -> Iterator[Vmlab]:
    home = Path(tempfile.mkdtemp(prefix="vmlab-e-"))
    yield Vmlab(home)
    shutil.rmtree(home)
