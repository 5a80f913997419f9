"""Frames that go through a process beside QEMU; QEMU's ends of the sockets are held here."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
from tests.unit.engine.monitor.wire import Wire

from vmlab.hypervisors.ownership import Home, Owner, Run
from vmlab.hypervisors.processes import OwnedProcess
from vmlab.hypervisors.qemu import wire_server
from vmlab.hypervisors.qemu.emulator import Emulator
from vmlab.hypervisors.qemu.wires import Wires
from vmlab.hypervisors.qmp import QmpError
from vmlab.machine.faults import NetDelay, NetLoss, Nth
from vmlab.machine.spec import MachineSpec

T = TypeVar("T")
SPEC = MachineSpec.of(name="vm", memory="64M", nics=[{"name": "net", "network": "user"}])


def framed(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


class End:
    """QEMU's end of a socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(str(path))

    def frame(self) -> bytes:
        (size,) = struct.unpack(">I", self._read(4))
        return self._read(size)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            assert part, "the other side has left"
            data += part
        return data


class Serving:
    """The server in a thread of this process, with QEMU's ends and who tells it things."""

    def __init__(self, directory: Path) -> None:
        names = [[f"w-{queue}-{way}.sock" for way in ("out", "back")] for queue in ("rx", "tx")]
        (directory / "w.json").write_text(json.dumps(names))
        self.status: list[int] = []
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()
        # The others are there before this one, which is there a moment before it can be had.
        self.wire = self._wire(directory / "w-qmp.sock")
        (self.sent, self.sent_on), (self.came, self.came_on) = (
            [End(directory / name) for name in pair] for pair in names
        )

    def _wire(self, path: Path) -> Wire:
        while True:
            try:
                return Wire(path)
            except (FileNotFoundError, ConnectionRefusedError):
                assert self.thread.is_alive(), self.status
                threading.Event().wait(0.01)

    def _serve(self) -> None:
        self.status.append(wire_server.main(["w.json"]))

    def tell(self, command: str, **arguments: Any) -> None:
        assert self.wire.ask(command, arguments=arguments) == {"return": {}}

    def leave(self) -> None:
        self.wire.close()
        for end in (self.sent, self.sent_on, self.came, self.came_on):
            end.socket.close()
        self.thread.join(60)
        assert self.status == [0]


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.chdir(tmp_path)
    made = Serving(tmp_path)
    yield made
    made.leave()


def test_frames_go_on_in_their_own_direction(serving: Serving) -> None:
    serving.sent.socket.sendall(framed(b"one") + framed(b""))
    serving.came.socket.sendall(framed(b"two" * 1000))
    assert [serving.sent_on.frame(), serving.sent_on.frame()] == [b"one", b""]
    assert serving.came_on.frame() == b"two" * 1000


def test_the_second_frame_is_lost_whichever_way_it_goes(serving: Serving) -> None:
    fault = {"ratio": 1.0, "when": {"nth": 2}}
    serving.tell("x-net-fault", id="f", name="nic-net", fault=fault)
    serving.sent.socket.sendall(framed(b"first"))
    assert serving.sent_on.frame() == b"first"
    serving.came.socket.sendall(framed(b"second") + framed(b"third"))
    assert serving.came_on.frame() == b"third"
    serving.tell("x-fault-end", id="f")
    serving.tell("x-fault-end", id="f")


def test_a_late_frame_comes_behind_those_after_it(serving: Serving) -> None:
    late = {"delay": 0.3, "when": {"nth": 1}}
    serving.tell("x-net-fault", id="f", name="nic-net", fault=late)
    serving.came.socket.sendall(framed(b"late") + framed(b"soon"))
    assert [serving.came_on.frame(), serving.came_on.frame()] == [b"soon", b"late"]
    told = serving.wire.error("x-net-fault", id="f", name="n", fault={"ratio": 2.0})
    assert "a ratio to 1" in told[1]


def test_a_socket_that_cannot_be_made_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.sock").write_text("")
    (tmp_path / "w.json").write_text(json.dumps([["taken.sock", "back.sock"]]))
    assert wire_server.main(["w.json"]) == 3
    assert "the socket 'taken.sock' cannot be opened" in capsys.readouterr().err


def test_what_is_no_frame_ends_its_direction(serving: Serving) -> None:
    serving.sent.socket.sendall(struct.pack(">I", 1 << 30))
    assert serving.sent_on.socket.recv(1) == b""
    serving.came.socket.sendall(framed(b"goes on"))
    assert serving.came_on.frame() == b"goes on"


class Qemu:
    """Holds QEMU's ends of what it is told to connect to."""

    def __init__(self, directory: Path, refuses: str = "") -> None:
        self.directory = directory
        self.daemons = SimpleNamespace(processes=list[OwnedProcess]())
        self.running = True
        self.told: list[str] = []
        self.ends: dict[str, End] = {}
        self._refuses = refuses

    async def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        name = arguments["id"]
        self.told.append(f"{command} {name}")
        if self.told[-1] == self._refuses:
            raise QmpError("no", command=command)
        if command == "chardev-add":
            self.ends[name] = End(self.directory / f"{name}.sock")
        elif command == "chardev-remove" and name in self.ends:
            self.ends.pop(name).socket.close()


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    run = Run.begin(Home.open(tmp_path / "home"))
    yield run.owner
    run.close()


def within(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(120):
            return await work()

    return asyncio.run(limited())


def test_a_nic_goes_its_own_way_again_when_its_last_fault_ends(
    tmp_path: Path, owner: Owner
) -> None:
    qemu = Qemu(tmp_path)
    wires = Wires(cast("Emulator", qemu), owner, "1")

    async def work() -> None:
        one = await wires.strike(SPEC, "one", NetLoss(nic="net", when=Nth(n=5)))
        other = await wires.strike(SPEC, "other", NetDelay(nic="net", delay=1))
        added = [each for each in qemu.told if each.startswith("object-add")]
        # Nothing that comes back may go out again.
        assert added == [
            f"object-add wire1-{queue}-{way}"
            for queue, way in (("rx", "back"), ("rx", "out"), ("tx", "out"), ("tx", "back"))
        ]
        await one()
        assert len(qemu.ends) == 4
        await other()
        await other()
        assert qemu.ends == {}
        (process,) = qemu.daemons.processes
        assert await process.wait() == 0
        again = await wires.strike(SPEC, "again", NetLoss(nic="net"))
        assert "object-add wire2-rx-out" in qemu.told
        qemu.running = False
        await again()
        for end in qemu.ends.values():
            end.socket.close()
        assert await qemu.daemons.processes[1].wait() == 0

    within(work)


def test_a_fault_that_the_process_refuses_leaves_the_nic_its_way(
    tmp_path: Path, owner: Owner
) -> None:
    qemu = Qemu(tmp_path)
    wires = Wires(cast("Emulator", qemu), owner, "1")
    wrong = NetLoss(nic="net").model_copy(update={"ratio": 2.0})

    async def work() -> None:
        with pytest.raises(QmpError, match="a ratio to 1"):
            await wires.strike(SPEC, "f", wrong)
        assert qemu.ends == {}
        assert await qemu.daemons.processes[0].wait() == 0

    within(work)


@pytest.mark.parametrize("refuses", ["object-add wire1-tx-out", "chardev-add wire1-tx-back"])
def test_nothing_is_left_where_qemu_refuses(tmp_path: Path, owner: Owner, refuses: str) -> None:
    qemu = Qemu(tmp_path, refuses)
    wires = Wires(cast("Emulator", qemu), owner, "1")

    async def work() -> None:
        with pytest.raises(QmpError):
            await wires.strike(SPEC, "f", NetLoss(nic="net"))
        assert qemu.ends == {}
        (process,) = qemu.daemons.processes
        assert not process.running

    within(work)
