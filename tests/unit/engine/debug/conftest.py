"""Machines with small guests and a debugger's socket, in this process, and a client of it."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmlab.engine.configuration import Boot, Configuration, Execution
from vmlab.engine.control import Control
from vmlab.engine.debug.commands import DebugCommands
from vmlab.engine.debug.gdbstub import GdbServer
from vmlab.engine.debug.packets import Mark, PacketReader, packet
from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.machine import Machine
from vmlab.engine.qapi import Cause

MEMORY = 8 << 20
PATIENCE = 250.0


class Client:
    """A client that acknowledges nothing, as GDB after its greeting."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))
        self.reader = PacketReader()
        self.waiting: list[bytes | Mark] = []
        assert self.ask("QStartNoAckMode", acknowledged=True) == "OK"

    def send(self, text: str) -> None:
        self.socket.sendall(packet(text.encode("latin-1")))

    def receive(self, *, acknowledged: bool = False) -> str:
        while True:
            while self.waiting:
                each = self.waiting.pop(0)
                if isinstance(each, bytes):
                    return each.decode("latin-1")
                assert acknowledged and each is Mark.RECEIVED, each
            data = self.socket.recv(1 << 16)
            assert data, "the stub hung up"
            self.waiting += self.reader.feed(data)

    def ask(self, text: str, *, acknowledged: bool = False) -> str:
        self.send(text)
        return self.receive(acknowledged=acknowledged)

    def ok(self, text: str) -> None:
        assert self.ask(text) == "OK", text

    def register(self, number: int) -> int:
        return int.from_bytes(bytes.fromhex(self.ask(f"p{number:x}")), "little")

    def memory(self, address: int, size: int) -> bytes:
        return bytes.fromhex(self.ask(f"m{address:x},{size:x}"))

    def monitor(self, line: str) -> Any:
        answer = bytes.fromhex(self.ask("qRcmd," + line.encode().hex())).decode()
        return json.loads(answer) if answer.startswith(("{", "[")) else answer

    def close(self) -> None:
        self.socket.close()


class Debugged:
    """A machine, its owner's thread, and its debugger's socket."""

    def __init__(self, configuration: Configuration, path: Path) -> None:
        self.path = path
        self.mistakes: list[BaseException] = []
        self.told: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.events: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
        self.quit: list[Cause] = []
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.reactor = Reactor(self.mistakes.append)
        self.machine = Machine(
            configuration, self.reactor, lambda what, why: self.told.put((what.value, why))
        )
        self.control = Control(self.machine, self.quit.append)
        self.control.emit = lambda name, data: self.events.put((name, data))
        DebugCommands(self.control, self._work.put)
        self.machine.harts.halted = lambda stop: self._work.put(lambda: self.control.trapped(stop))
        self.server = GdbServer(path, self.reactor, self.control, self._work.put)
        self.clients: list[Client] = []
        self._thread = threading.Thread(target=self._own)
        self._thread.start()
        self.reactor.start()

    def _own(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except BaseException as error:
                self.mistakes.append(error)

    def do(self, work: Callable[[], Any]) -> Any:
        """Have the owner's thread do something."""
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._work.put(lambda: done.put(work()))
        return done.get(timeout=PATIENCE)

    def connect(self) -> Client:
        self.clients.append(Client(self.path))
        return self.clients[-1]

    def event(self, name: str) -> object:
        while True:
            found, data = self.events.get(timeout=PATIENCE)
            if found == name:
                return data

    def close(self) -> None:
        self.do(self.server.close)
        for client in self.clients:
            client.close()
        self._work.put(None)
        self._thread.join()
        self.machine.close()
        self.reactor.close()
        assert self.mistakes == []


Debug = Callable[..., Debugged]


@pytest.fixture(params=list(Execution), ids=lambda execution: execution.value)
def execution(request: pytest.FixtureRequest) -> Execution:
    return request.param


@pytest.fixture
def debug(tmp_path: Path, execution: Execution) -> Iterator[Debug]:
    """Build a machine of a guest's code, which stands; fields of the configuration by name."""
    made: list[Debugged] = []

    def make(code: bytes, **changes: Any) -> Debugged:
        kernel = tmp_path / f"kernel{len(made)}"
        kernel.write_bytes(code)
        fields = {"name": "vm", "memory": MEMORY, "qmp": str(tmp_path / "q.sock")}
        fields |= {"boot": Boot(kernel=str(kernel)), "scsi": False, "execution": execution}
        path = tmp_path / f"gdb{len(made)}"
        made.append(Debugged(Configuration(**(fields | changes)), path))
        return made[-1]

    yield make
    for one in made:
        one.close()
