"""A network namespace of a test's own, and computers that are plugged into what is made there.

The test's own thread moves into the namespace, and with it every thread and program that is started
from there; the host's interfaces are in another one and cannot be reached.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Client", "own_namespace", "run"]

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_PROGRAMS = ("ip", "nft", "dnsmasq", "ovs-vswitchd", "busybox", "nsenter", "unshare")


def _libc(call: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, call)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")


def run(*words: str | Path, check: bool = True) -> str:
    """What a command prints."""
    try:
        done = subprocess.run(
            [str(word) for word in words], capture_output=True, text=True, check=False, timeout=240
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{error}: {error.stdout!r}{error.stderr!r}") from error
    assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def own_namespace() -> Iterator[None]:
    """This thread is in a network namespace of its own, where `lo` is up; needs root."""
    for program in _PROGRAMS:
        assert shutil.which(program), f"{program} is not installed: see tools/debian-packages.txt"
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _libc("unshare", _CLONE_NEWNET)
        try:
            run("ip", "link", "set", "lo", "up")
            yield
        finally:
            _libc("setns", before, _CLONE_NEWNET)
    finally:
        os.close(before)


class Client:
    """A computer on a wire: a namespace with one interface, eth0."""

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.port = f"wire{self.number}"
        self.mac = f"52:54:00:aa:{self.number >> 8:02x}:{self.number & 255:02x}"
        # The shell says that it is in its namespace, and stays until its input ends.
        self._process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo there && read over"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        assert said == b"there\n", f"{said!r}: it ended with {self._process.poll()}"
        pid = str(self._process.pid)
        peer = f"peer{self.number}"
        run("ip", "link", "add", self.port, "type", "veth", "peer", "name", peer)
        run("ip", "link", "set", peer, "netns", pid)
        run("ip", "link", "set", self.port, "up")
        self.run("ip", "link", "set", peer, "name", "eth0", "address", self.mac)
        self.run("ip", "link", "set", "eth0", "up")

    def run(self, *words: str | Path, check: bool = True) -> str:
        """What a command prints there."""
        net = f"--net=/proc/{self._process.pid}/ns/net"
        return run("nsenter", net, *words, check=check)

    def script(self, text: str, *arguments: str) -> str:
        """What a program of Python's prints there."""
        return self.run(sys.executable, "-c", textwrap.dedent(text), *arguments)

    def plug(self, bridge: str) -> None:
        """Put it on a bridge."""
        run("ip", "link", "set", self.port, "master", bridge)

    def ask(self, *, tries: int = 120, mine: bool = True) -> dict[str, str]:
        """What a DHCP server tells it, and nothing if nobody does; takes the address if `mine`."""
        with tempfile.TemporaryDirectory(prefix="vmlab-dhcp-") as directory:
            told = Path(directory, "told")
            script = Path(directory, "script")
            script.write_text(
                f'#!/bin/sh\n[ "$1" = bound ] || exit 0\nenv >{told}\n'
                + ('ip addr add "$ip/$mask" dev eth0\n' if mine else "")
                + ('[ -z "$router" ] || ip route add default via "$router"\n' if mine else "")
            )
            script.chmod(0o755)
            words = ["-f", "-q", "-n", "-t", str(tries), "-T", "1", "-i", "eth0", "-s", str(script)]
            self.run("busybox", "udhcpc", *words, check=tries > 3)
            if not told.exists():
                return {}
            pairs = (line.partition("=") for line in told.read_text().splitlines())
            return {name: value for name, _, value in pairs}

    def reaches(self, address: str, *, tries: int = 120) -> bool:
        """Whether somebody answers there to a ping, each try of which takes a second."""
        words = ["busybox", "ping", "-c", "1", "-W", "1", address]
        return any("1 packets received" in self.run(*words, check=False) for _ in range(tries))

    def address_of(self, name: str, server: str) -> str:
        """What a DNS server says when it is asked for a name."""
        for _ in range(30):
            # It waits for five seconds, and a server that is busy may need longer.
            said = self.run("busybox", "nslookup", name, server, check=False)
            if "timed out" not in said:
                break
        return said

    def close(self) -> None:
        """Take it away."""
        self._process.communicate(b"over\n")
