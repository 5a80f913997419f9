"""Two machines to drive devices on: the engine's board, and QEMU's, stepped through qtest."""

from __future__ import annotations

import select
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from vmlab.engine.board import Board
from vmlab.engine.devices.clock import ManualClock
from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.devices.virtio.device import VirtioDevice
from vmlab.engine.devices.workers import InlineWorkers
from vmlab.engine.memory.ram import Ram

MIB = 1 << 20
RAM_BASE = 0x8000_0000


def _failed(error: BaseException) -> None:
    raise error


class Engine:
    """The engine's board without a hart. Interrupts are read at the PLIC's inputs."""

    def __init__(self, harts: int = 1, memory: int = 8 * MIB, **options: object) -> None:
        self.ram = Ram(memory)
        self.clock = ManualClock(wall_nanoseconds=1_700_000_000_000_000_000)
        self.workers = InlineWorkers()
        self.reactor = Reactor(_failed)
        self.pending: dict[tuple[int, int], bool] = {}
        self.ends: list[tuple[str, int]] = []
        self.board = Board(
            self.ram,
            harts,
            self.clock,
            self._set_pending,
            lambda kind, code: self.ends.append((kind, code)),
            **options,
        )
        self.bus = self.board.bus

    def _set_pending(self, hart: int, bit: int, level: bool) -> None:
        self.pending[hart, bit] = level

    def plug(self, make: Callable[[Engine], VirtioDevice]) -> int:
        return self.board.plug(make(self))

    def read(self, address: int, size: int) -> int:
        return self.bus.read(address, size)

    def write(self, address: int, size: int, value: int) -> None:
        self.bus.write(address, size, value)

    def peek(self, address: int, size: int) -> bytes:
        return self.ram.read(address, size)

    def poke(self, address: int, data: bytes) -> None:
        self.ram.write(address, data)

    def level(self, source: int) -> bool:
        return bool(self.board.plic.state.level[source >> 5] >> (source & 31) & 1)

    def close(self) -> None:
        for device in self.board.devices():
            device.close()
        self.reactor.close()
        self.ram.close()


class Qemu:
    """QEMU's virt board, its harts asleep; memory and registers by qtest commands."""

    def __init__(self, folder: Path, *arguments: str, harts: int = 1) -> None:
        self.folder = folder
        path = folder / "qtest.sock"
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.listen(1)
        self.process = subprocess.Popen(
            [
                "qemu-system-riscv64", "-M", "virt", "-accel", "tcg", "-smp", str(harts),
                # wfi, and back to it: QEMU's network devices receive in a running machine only.
                "-device", "loader,addr=0x80000000,data=0xffdff06f10500073,data-len=8",
                "-m", "128M", "-display", "none", "-nodefaults", "-bios", "none",
                "-qtest", f"unix:{path}", "-qtest-log", "/dev/null",
                "-global", "virtio-mmio.force-legacy=false", *arguments,
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        with server:
            readable, _, _ = select.select([server], [], [], 250)
            if not readable:
                self.process.kill()
                raise RuntimeError(f"QEMU does not come: {self.process.communicate()[0]!r}")
            self.connection, _ = server.accept()
        self.connection.settimeout(250)
        self.buffer = b""

    def ask(self, command: str) -> str:
        self.connection.sendall(command.encode() + b"\n")
        while True:
            while b"\n" not in self.buffer:
                data = self.connection.recv(65536)
                if not data:
                    raise RuntimeError(f"QEMU is gone: {self.process.communicate()[0]!r}")
                self.buffer += data
            line, self.buffer = self.buffer.split(b"\n", 1)
            words = line.decode().split()
            if words[0] != "OK":
                raise RuntimeError(f"{command}: {line.decode()}")
            return words[1] if len(words) > 1 else ""

    def read(self, address: int, size: int) -> int:
        return int(self.ask(f"read{'?bw?l???q'[size]} {address:#x}"), 16)

    def write(self, address: int, size: int, value: int) -> None:
        self.ask(f"write{'?bw?l???q'[size]} {address:#x} {value:#x}")

    def peek(self, address: int, size: int) -> bytes:
        return bytes.fromhex(self.ask(f"read {address:#x} {size:#x}")[2:]) if size else b""

    def poke(self, address: int, data: bytes) -> None:
        if data:
            self.ask(f"write {address:#x} {len(data):#x} 0x{data.hex()}")

    def level(self, source: int) -> bool | None:
        """QEMU does not show the level of a line."""
        return None

    def close(self) -> None:
        self.connection.close()
        self.process.terminate()
        try:
            self.process.communicate(timeout=250)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


def have_qemu() -> bool:
    return shutil.which("qemu-system-riscv64") is not None
