"""Random programs end as in qemu-riscv64: registers, `fcsr` and memory, to the bit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.figures import note
from tests.unit.engine.accel.test_lockstep import FIGURES
from tests.unit.engine.oracles.code import DATA, in_qemu, needs_qemu, on_hart
from tests.unit.engine.oracles.programs import SETS, Batch, jumps

from vmlab.engine.accel.interpreter import InterpreterExecutor
from vmlab.engine.accel.reference import ReferenceExecutor

pytestmark = needs_qemu

PROGRAMS = 50
SOAK = 1_000_000


def compare(batch: Batch, interpreter: InterpreterExecutor, folder: Path) -> None:
    data = bytes(batch.data)
    ours = on_hart(interpreter, batch.code, data, batch.size)
    theirs = in_qemu(batch.code, data, folder, batch.size)
    if found := batch.difference(ours, theirs):
        pytest.fail(found)


@pytest.mark.parametrize("extensions", SETS)
def test_programs_end_as_in_qemu(
    extensions: str, interpreter: InterpreterExecutor, tmp_path: Path
) -> None:
    for seed in (1, 2):
        compare(Batch(extensions, seed, PROGRAMS), interpreter, tmp_path)


def test_the_reference_agrees_as_well(reference: ReferenceExecutor, tmp_path: Path) -> None:
    batch = Batch(SETS[-1], 3, 20)
    data = bytes(batch.data)
    ours = on_hart(reference, batch.code, data, batch.size)
    assert batch.difference(ours, in_qemu(batch.code, data, tmp_path, batch.size)) is None


def test_jumps_go_as_in_qemu(
    interpreter: InterpreterExecutor, reference: ReferenceExecutor, tmp_path: Path
) -> None:
    code, size = jumps()
    theirs = in_qemu(code, b"", tmp_path, size)
    assert on_hart(interpreter, code, b"", size) == theirs
    assert on_hart(reference, code, b"", size) == theirs
    assert len(theirs) == size and DATA.to_bytes(8, "little")[:2] != theirs[:2]


@pytest.mark.soak
@pytest.mark.parametrize("extensions", SETS)
def test_a_million_instructions_end_as_in_qemu(
    extensions: str, interpreter: InterpreterExecutor, tmp_path: Path
) -> None:
    done, seed, began = 0, 10, time.process_time()
    while done < SOAK:
        batch = Batch(extensions, seed, 500)
        compare(batch, interpreter, tmp_path)
        done, seed = done + batch.instructions, seed + 1
    figures = {"instructions": done, "cpu_seconds": round(time.process_time() - began)}
    note(FIGURES, f"{extensions}, as in qemu-riscv64", figures)
