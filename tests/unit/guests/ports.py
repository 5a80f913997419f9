"""Pseudo-terminals in place of virtio-serial ports, so that the agent's shell runs on the host.

A stand-in for the transport only: the agent's script and the host's half are the real ones.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import tty
from contextlib import suppress
from pathlib import Path

from vmlab.guests import agent
from vmlab.hypervisors.base import Channel


class PtyChannel(Channel):
    """The host's end of a pseudo-terminal."""

    def __init__(self, name: str, master: int) -> None:
        self.name = name
        self._fd = os.dup(master)
        os.set_blocking(self._fd, False)
        self._closed = False

    async def _ready(self, *, write: bool) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        add = loop.add_writer if write else loop.add_reader
        remove = loop.remove_writer if write else loop.remove_reader
        add(self._fd, lambda: future.done() or future.set_result(None))
        try:
            await future
        finally:
            remove(self._fd)

    async def read(self, size: int = 65536) -> bytes:
        while not self._closed:
            try:
                return os.read(self._fd, size)
            except BlockingIOError:
                await self._ready(write=False)
        return b""

    async def write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                await self._ready(write=True)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._fd)


class HostedAgent:
    """The agent's script running on this host under a given shell."""

    def __init__(self, directory: Path, shell: list[str]) -> None:
        self._masters: dict[str, int] = {}
        self._slaves: list[int] = []
        ports = directory / "ports"
        ports.mkdir()
        for name in agent.CHANNELS:
            master, slave = os.openpty()
            tty.setraw(slave)
            (ports / name).symlink_to(os.ttyname(slave))
            self._masters[name] = master
            self._slaves.append(slave)
        # GNU tar writes no archive to a terminal, which only these stand-ins for ports are.
        programs = directory / "bin"
        programs.mkdir()
        (programs / "tar").symlink_to("/bin/busybox")
        script = directory / "agent.sh"
        body = agent.script().split(b"\n", 1)[1]
        script.write_bytes(b"#!" + " ".join(shell).encode() + b"\n" + body)
        script.chmod(0o755)
        self.process = subprocess.Popen(
            [*shell, str(script)],
            env={
                **os.environ,
                "PATH": f"{programs}:{os.environ['PATH']}",
                "VMLAB_PORTS": str(ports),
            },
            start_new_session=True,
        )

    async def open(self, name: str) -> Channel:
        return PtyChannel(name, self._masters[name])

    def hang_up(self, slot: int) -> None:
        """What the guest sees of a host that has died: the end of a slot's ports."""
        for name in (f"vmlab.{slot}", f"vmlab.{slot}.err"):
            os.close(self._masters.pop(name))

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()
        for fd in (*self._masters.values(), *self._slaves):
            os.close(fd)
