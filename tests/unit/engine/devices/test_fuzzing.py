"""Ten thousand hostile inputs for every device, a million where time allows; found ones are kept.

An input that breaks a device is printed as hexadecimal; put it into corpus/NAME.txt with a word
on what it found, and it is run first from then on.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from tests.figures import note
from tests.unit.engine.devices.fuzzing import LUCK, NAMES, MemoryDisk, Target, target
from tests.unit.engine.devices.machines import Engine

from vmlab.engine.devices.virtio.block import VirtioBlock

CORPUS = Path(__file__).parent / "corpus"
INPUTS = 10_000
SOAK = 1_000_000
# Read before the tests get an environment of their own.
SEED = int(os.environ.get("VMLAB_FUZZ_SEED", "2"))


def inputs(name: str) -> list[bytes]:
    """The kept inputs of a device: one a line, hexadecimal, with a comment behind it."""
    path = CORPUS / f"{name}.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [bytes.fromhex(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]


def attack(fuzzed: Target, count: int, seed: int) -> set[int]:
    """Run random inputs; which device statuses were seen at the end of their doings."""
    noise = random.Random(seed)
    seen = set()
    reset = fuzzed.device.reset

    def noted() -> None:
        seen.add(fuzzed.device.state.status)
        reset()

    fuzzed.device.reset = noted
    for number in range(count):
        data = noise.randbytes(noise.choice((20, 60, 150)))
        try:
            fuzzed.run(data)
        except Exception as error:
            error.add_note(f"seed {seed}, input {number}: {data.hex()}")
            raise
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_kept_inputs_break_nothing(name: str) -> None:
    for luck in range(LUCK):
        fuzzed = target(name)
        if isinstance(fuzzed.device, VirtioBlock) and isinstance(fuzzed.device.disk, MemoryDisk):
            fuzzed.device.disk.calls = luck  # so that each of its calls fails once
        for data in inputs(name):
            fuzzed.run(data)
        fuzzed.check()
        fuzzed.engine.close()


@pytest.mark.parametrize("name", NAMES)
def test_no_input_breaks_a_device(name: str) -> None:
    fuzzed = target(name)
    seen = attack(fuzzed, INPUTS, seed=1)
    assert any(status & 64 for status in seen), "some inputs broke the rules"
    assert any(status & 64 == 0 and status & 4 for status in seen), "some did not"
    fuzzed.engine.close()


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_no_input_of_a_million_breaks_a_device(name: str) -> None:
    fuzzed = target(name)
    began = time.process_time()
    attack(fuzzed, SOAK, SEED)
    fuzzed.engine.close()
    seconds = round(time.process_time() - began)
    note("engine-fuzzing.json", name, {"seed": SEED, "inputs": SOAK, "cpu_seconds": seconds})


def test_no_access_to_any_register_breaks_the_board() -> None:
    """Devices without rings: every window, every size, any value."""
    engine = Engine(harts=2, separate_aclint=True)
    noise = random.Random(3)
    windows = engine.bus.windows()
    for number in range(10 * INPUTS):
        window = windows[noise.randrange(len(windows))]
        size = noise.choice(sorted(window.sizes))
        span = min(window.size, noise.choice((0x40, 0x4000, window.size)))
        address = window.base + noise.randrange(span) // size * size
        if noise.random() < 0.5:
            engine.bus.write(address, size, noise.getrandbits(8 * size))
        else:
            assert 0 <= engine.bus.read(address, size) < 1 << (8 * size)
        if number % 50 == 0:
            engine.clock.advance(noise.randrange(1 << noise.randrange(1, 40)))
            engine.board.uart.receive(noise.randbytes(noise.randrange(30)))
            engine.board.plic.set_level(noise.randrange(1, 97), noise.random() < 0.5)
    engine.board.reset()
    assert engine.read(0x1000_0005, 1) == 0x60
    engine.close()
