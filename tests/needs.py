"""Programs that tests need: where one is missing, they are skipped and say what to install.

`need` is for fixtures and bodies of tests, `needs` a mark. What all tests need is in
tools/debian-packages.txt.
"""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["need", "needs"]

_PACKAGES = {
    "chromium": "chromium",
    "mkfs.ext4": "e2fsprogs",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-ppc64": "qemu-system-ppc",
    "qemu-system-riscv64": "qemu-system-misc",
    "qemu-system-x86_64": "qemu-system-x86",
}


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def _reason(program: str) -> str:
    return f"needs {program}, of the Debian package {_PACKAGES[program]}"


def need(program: str) -> str:
    """The program's path; skips the test where it is not installed."""
    found = _find(program)
    if found is None:
        pytest.skip(_reason(program))
    return found


def needs(program: str) -> pytest.MarkDecorator:
    """A mark: the test is skipped where the program is not installed."""
    return pytest.mark.skipif(_find(program) is None, reason=_reason(program))
