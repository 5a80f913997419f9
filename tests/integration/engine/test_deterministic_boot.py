"""Debian boots to its agent's greeting, instruction by instruction the same, in as many exits.

How often a boot leaves native code is kept in benchmarks/results/engine-boot-exits.json, by reason;
how often the beginning of one on two harts does, in engine-boot-exits-two-harts.json beside it.
Where it has changed for a good reason (or the image has), record it anew:

    VMLAB_RESULTS=benchmarks/results .venv/bin/python -m pytest \
        tests/integration/engine/test_deterministic_boot.py
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.figures import kept, write
from tests.store import IMAGE_STORE

from vmlab.engine import firmware
from vmlab.engine.configuration import Boot, Configuration, SocketPort, Time, TimeMode
from vmlab.engine.devices.reactor import Reactor
from vmlab.engine.devices.virtio.console import VirtioConsole
from vmlab.engine.machine import Machine
from vmlab.guests.agent import CHANNELS
from vmlab.images import ImageStore

pytestmark = [pytest.mark.boots, pytest.mark.timeout(3600)]

_PATIENCE = 1500
PER_TICK = 10
_RECORDS = Path(__file__).parents[3] / "benchmarks/results"
RECORDED, RECORDED_TWO_HARTS = "engine-boot-exits.json", "engine-boot-exits-two-harts.json"
TOLERANCE = 0.05
FROM_OUTSIDE = "request"
"""The reason of exits that another thread asked for; the number of these is the host's affair."""
EARLY = 300_000_000


@dataclass(frozen=True)
class Moment:
    """What a machine is at one moment."""

    instructions: int
    harts: list[dict[str, int]]
    memory: str
    said: bytes


class Boots:
    """A deterministic machine with Debian in this process, its channels joined."""

    def __init__(self, folder: Path, seed: int, harts: int) -> None:
        image = ImageStore(IMAGE_STORE).ensure("debian-13-riscv64-tiny")
        folder.mkdir()
        channels = [SocketPort(str(folder / f"c{at}"), name) for at, name in enumerate(CHANNELS)]
        made = Configuration(
            "vm",
            192 << 20,
            str(folder / "qmp"),
            harts=harts,
            boot=Boot(str(image.kernel), str(image.initrd), f"{image.cmdline} console=ttyS0"),
            serial=SocketPort(str(folder / "s"), log=str(folder / "log")),
            channels=channels,
            time=Time(TimeMode.DETERMINISTIC, PER_TICK),
            seed=seed,
        )
        self._log = folder / "log"
        self._mistakes: list[object] = []
        self._stood = threading.Event()
        self._reactor = Reactor(self._mistakes.append)
        self._clients: list[socket.socket] = []
        self.machine = Machine(made, self._reactor, lambda *what: self._mistakes.append(what))
        console = next(
            each for each in self.machine.board.devices() if isinstance(each, VirtioConsole)
        )
        # Who is connected is seen by the guest: all are before it begins.
        for channel in channels:
            client = socket.socket(socket.AF_UNIX)
            self._clients.append(client)
            client.connect(channel.socket)
        ports = [port for port in console.ports if port.name]
        while not all(port.endpoint.connected for port in ports):
            self._reactor.poll(_PATIENCE)
        (self._slot,) = [port.endpoint for port in ports if port.name == "vmlab.0"]

    def close(self) -> None:
        self.machine.close()
        self._reactor.close()
        for client in self._clients:
            client.close()
        assert self._mistakes == []

    def _stand(self) -> None:
        self.machine.harts.ask_to_pause()
        self._stood.set()

    def _run(self) -> Moment:
        machine = self.machine
        machine.resume()
        assert self._stood.wait(_PATIENCE), f"{[hex(hart.pc) for hart in machine.harts]}"
        self._stood.clear()
        machine.pause()
        memory = hashlib.sha256(machine.ram.read(machine.ram.base, machine.ram.size)).hexdigest()
        harts = [hart.architectural() for hart in machine.harts]
        return Moment(machine.clock.instructions, harts, memory, self._log.read_bytes())

    def to(self, instructions: int) -> Moment:
        """Run until so many have retired."""
        self.machine.clock.call_at(instructions * 100 // PER_TICK, self._stand)
        return self._run()

    def to_greeting(self, monkeypatch: pytest.MonkeyPatch) -> Moment:
        """Run until the agent says that it is there."""
        heard = bytearray()
        send = self._slot.send

        def listen(data: bytes) -> int:
            heard.extend(data)
            if b"\x01hello 1 " in heard and heard.endswith(b"\n"):
                self._stand()
            return send(data)

        monkeypatch.setattr(self._slot, "send", listen)
        return self._run()

    def exits(self) -> dict[str, int]:
        """How often the harts left native code, by reason."""
        total: dict[str, int] = {}
        for hart in range(len(self.machine.harts)):
            for reason, count in self.machine.harts.exits(hart).items():
                total[reason] = total.get(reason, 0) + count
        return {reason: count for reason, count in total.items() if count}


Begin = Callable[..., Boots]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    made: list[Boots] = []

    def start(seed: int, harts: int = 1) -> Boots:
        made.append(Boots(tmp_path / str(len(made)), seed, harts))
        return made[-1]

    yield start
    for each in made:
        each.close()


def test_two_boots_are_the_same_to_the_last_bit(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, other = begin(seed=1), begin(seed=1), begin(seed=2)
    # The first stands for a while on its way, which changes nothing.
    early = first.to(EARLY)
    end = first.to_greeting(monkeypatch)
    assert end == second.to_greeting(monkeypatch)
    different = other.to(EARLY)
    assert different.memory != early.memory
    exits, again = first.exits(), second.exits()
    for each in (exits, again):
        each.pop(FROM_OUTSIDE, None)
    # Where the first one stood on its way a budget ended; that is all.
    exits["budget"] -= 1
    assert exits == again
    compare_with_record(again, RECORDED)


def test_two_harts_boot_the_same_however_often_they_stand(begin: Begin) -> None:
    straight, paused = begin(seed=1, harts=2), begin(seed=1, harts=2)
    expected = straight.to(2 * EARLY)
    assert all(hart["privilege"] < 3 for hart in expected.harts)
    exits = straight.exits()
    exits.pop(FROM_OUTSIDE, None)
    del exits["budget"]  # the ends of turns
    compare_with_record(exits, RECORDED_TWO_HARTS)
    called = {extension for hart in range(2) for extension, _ in straight.machine.harts.calls(hart)}
    assert firmware.BASE in called
    assert firmware.RFENCE not in called, "harts fence for each other by themselves"
    stop, pauses, machine = threading.Event(), 0, paused.machine

    def disturb() -> None:
        nonlocal pauses
        while not stop.wait(0.005):
            if not machine.running:
                continue  # it has not begun, and is not begun by this
            machine.harts.pause()
            pauses += 1
            if machine.clock.instructions < 2 * EARLY:
                machine.harts.resume()

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        assert paused.to(2 * EARLY) == expected
    finally:
        stop.set()
        disturber.join()
    assert pauses > 1


def compare_with_record(exits: dict[str, int], record: str) -> None:
    """Compare the exits of a boot with those that are on record, or put them on record."""
    if kept():
        write(record, exits, indent=2)
        return
    recorded = json.loads((_RECORDS / record).read_text())
    total, expected = sum(exits.values()), sum(recorded.values())
    assert abs(total - expected) <= TOLERANCE * expected, (
        f"{total} exits to Python, {expected} on record; by reason: {exits}, {recorded}; "
        "this file says how to record anew"
    )
