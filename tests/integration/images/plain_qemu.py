"""A guest in a plain QEMU, with nothing of vmlab's around it: what an image is by itself."""

from __future__ import annotations

import os
import re
import selectors
import subprocess
import time

import pytest

from vmlab.images import Image
from vmlab.images.roots import tools
from vmlab.machine.architecture import Architecture

SECONDS = 900  # for what takes five on a machine that has nothing else to do

MACHINES = {
    Architecture.X86_64: ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", "max"],
    Architecture.RISCV64: ["qemu-system-riscv64", "-M", "virt", "-cpu", "rv64"],
    Architecture.AARCH64: ["qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a72"],
    Architecture.PPC64LE: ["qemu-system-ppc64", "-M", "pseries"],
}


PACKAGES = {
    **dict.fromkeys(("mke2fs", "debugfs"), "e2fsprogs"),
    **{"mmdebstrap": "mmdebstrap", "depmod": "kmod", "qemu-img": "qemu-utils"},
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-system-riscv64": "qemu-system-misc",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-ppc64": "qemu-system-ppc",
}
"""Which Debian package has a program; all are in tools/debian-packages.txt."""


def needs(*programs: str) -> None:
    missing = sorted({PACKAGES[name] for name in programs if tools.find(name) is None})
    if missing:
        pytest.skip(f"needs the Debian packages {', '.join(missing)}")


def needs_qemu(architecture: Architecture) -> None:
    needs(MACHINES[architecture][0])


class Guest:
    """A QEMU with the guest's console on its standard input and output."""

    def __init__(self, image: Image, append: str, *more: str, memory: str = "512") -> None:
        boot = [] if image.kernel is None else [
            "-kernel", str(image.kernel), "-initrd", str(image.initrd),
            "-append", f"console={image.architecture.console} {image.cmdline} {append}",
        ]  # fmt: skip
        command = [
            *MACHINES[image.architecture], "-m", memory, "-display", "none", "-nodefaults",
            "-no-user-config", "-no-reboot", "-serial", "stdio", *boot, *more,
        ]  # fmt: skip
        self.seen = b""
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.waiting = selectors.DefaultSelector()
        assert self.process.stdout is not None
        self.waiting.register(self.process.stdout, selectors.EVENT_READ)

    def wait_for(self, pattern: bytes, seconds: float = SECONDS) -> re.Match[bytes]:
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.seen, re.DOTALL)) is None:
            left = end - time.monotonic()
            assert left > 0, f"no {pattern!r} in {seconds} s:\n{self.seen[-3000:].decode()}"
            if self.waiting.select(left):
                data = os.read(self.process.stdout.fileno(), 65536)
                assert data, f"the guest ended before {pattern!r}:\n{self.seen[-3000:].decode()}"
                self.seen += data
        self.seen = self.seen[found.end() :]
        return found

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def shell(self, command: str, seconds: float = SECONDS) -> str:
        """What a command prints; its status has to be 0."""
        # The marks are put together by the shell, so the echo of the line has none.
        self.type(f"{command}; echo =$?=; echo end'mark'\n")
        text = self.wait_for(rb"(.*?)\r?\nendmark", seconds)[1].decode(errors="replace")
        body, _, status = text.rpartition("=0=")
        assert body or status != text, f"{command} failed: {text}"
        return body

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.waiting.close()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue
