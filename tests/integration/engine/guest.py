"""A guest on an engine process of its own, booted for tests."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import QMPClient
from tests.store import IMAGE_STORE

from vmlab.guests.agent import CHANNELS, AgentChannel
from vmlab.guests.command import Command
from vmlab.hypervisors.monitored.streams import SocketChannel
from vmlab.images import ImageStore
from vmlab.machine.errors import ChannelClosed

T = TypeVar("T")

TINY = "debian-13-riscv64-tiny"
PATIENCE = 900


class Guest:
    """A guest on an engine process: commands by its agent, and the process by QMP."""

    def __init__(self, folder: Path, patience: float = PATIENCE) -> None:
        self.folder = folder
        self.patience = patience
        self.process = subprocess.Popen([sys.executable, "-m", "vmlab.engine", folder / "m.toml"])
        self.runner = asyncio.Runner()
        self.qmp = QMPClient("test")
        self.agent = AgentChannel(self._open)

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(work, self.patience))

    async def _open(self, name: str) -> SocketChannel:
        path = self.folder / f"{name}.sock"
        while True:
            assert self.process.poll() is None, "the engine has ended"
            with suppress(ChannelClosed):  # it is not there, or not listened at yet
                return await SocketChannel.open(name, "vm", path)
            await asyncio.sleep(0.02)

    async def connect(self) -> None:
        await self.agent.connect(timeout=self.patience)
        await self.qmp.connect(str(self.folder / "q.sock"))

    def order(self, command: str, **arguments: Any) -> Any:
        return self.do(self.qmp.execute(command, arguments or None))

    def run(self, text: str) -> str:
        """What a command prints; its status has to be 0."""
        out, err = bytearray(), bytearray()

        async def take_out(data: bytes) -> None:
            out.extend(data)

        async def take_err(data: bytes) -> None:
            err.extend(data)

        status = self.do(self.agent.run(Command(text), stdout=take_out, stderr=take_err))
        assert status == 0, f"{text}: {status} {err.decode()}"
        return out.decode()

    def close(self) -> None:
        try:
            self.do(self.agent.close())
            # An engine that has ended has said so already; it may have left an order unread.
            with suppress(EOFError, ConnectionError):
                self.do(self.qmp.disconnect())
        finally:
            self.runner.close()
            self.process.kill()
            self.process.wait()


def start(
    folder: Path,
    harts: int,
    more: str = "",
    firmware: str = "",
    *,
    image: str = TINY,
    megabytes: int = 256,
    patience: float = PATIENCE,
) -> Guest:
    """Boot an image, whose guest is the caller's to close.

    Args:
        folder: For the machine's file and sockets.
        harts: How many.
        more: Lines of the machine's file.
        firmware: A file for M mode.
        image: A recipe's name or file.
        megabytes: Of memory.
        patience: Seconds that a command may take.
    """
    made = ImageStore(IMAGE_STORE).ensure(image)
    lines = [f'name = "vm"\nmemory = {megabytes << 20}\nharts = {harts}\nqmp = "q.sock"', more]
    lines += [f'[boot]\nkernel = "{made.kernel}"\ninitrd = "{made.initrd}"']
    lines += [f'cmdline = "{made.cmdline} console=ttyS0"']
    lines += [f'firmware = "{firmware}"'] if firmware else []
    lines += ['[serial]\nsocket = "s.sock"\nlog = "s.log"']
    lines += [f'[[channels]]\nname = "{name}"\nsocket = "{name}.sock"' for name in CHANNELS]
    (folder / "m.toml").write_text("\n".join(lines))
    guest = Guest(folder, patience)
    try:
        guest.do(guest.connect())
    except BaseException:
        guest.close()
        raise
    return guest
