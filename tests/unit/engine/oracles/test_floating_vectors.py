"""Every floating-point operation on edge values in every rounding mode gives QEMU's bits and flags.

The reference executor does the same on fewer values; its arithmetic is compared with that of
rational numbers as well (tests/unit/engine/isa/test_softfloat.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.engine.oracles.code import DATA, in_qemu, needs_qemu, on_hart
from tests.unit.engine.oracles.floating import Suite, suites

from vmlab.engine.accel.lockstep import Executor

pytestmark = needs_qemu

MANY, FEW = suites(), suites(few=True)
VECTORS = 250_000


def compare(suite: Suite, executor: Executor, folder: Path) -> None:
    code, data = suite.program(), suite.data
    whole = suite.result - DATA + suite.size
    ours = on_hart(executor, code, data, whole)
    found = suite.differences(ours, in_qemu(code, data, folder, whole))
    if found:
        pytest.fail("\n".join([f"{len(found)} of {len(ours) // 16} differ", *found[:20]]))


@pytest.mark.parametrize("suite", MANY, ids=lambda suite: suite.title)
def test_edge_values_give_the_bits_and_flags_of_qemu(
    suite: Suite, interpreter: Executor, tmp_path: Path
) -> None:
    compare(suite, interpreter, tmp_path)


@pytest.mark.parametrize("suite", FEW, ids=lambda suite: suite.title)
def test_the_reference_agrees_on_some(suite: Suite, reference: Executor, tmp_path: Path) -> None:
    compare(suite, reference, tmp_path)


def test_there_are_many() -> None:
    assert sum(len(suite.tuples) * len(suite.steps) for suite in MANY) > VECTORS
