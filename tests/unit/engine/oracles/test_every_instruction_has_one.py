"""Every instruction of the table is compared with somebody outside, or with counted vectors.

`pytest -s` prints who and how often; nothing here runs them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from tests.unit.engine.oracles import vectors
from tests.unit.engine.oracles.assembly import PREFIX, PROGRAMS, used
from tests.unit.engine.oracles.differences import QEMU_FAULTS
from tests.unit.engine.oracles.floating import suites
from tests.unit.engine.oracles.programs import SETS, Batch, jumps
from tests.unit.engine.oracles.steps import names
from tests.unit.engine.oracles.test_single_instructions import COUNT

from vmlab.engine.isa.riscv64 import RISCV64

SOME = 10
VECTORS = {"ctzw": 8, "cbo.zero": 15, "cbo.inval": 12, "cbo.clean": 10, "cbo.flush": 10}
"""The least number of vectors of an instruction that has nothing else."""


def in_user_mode() -> Counter[str]:
    """How often qemu-riscv64 meets each instruction, at least: only some programs are made here."""
    count: Counter[str] = Counter()
    for extensions in SETS:
        for seed in (1, 2):
            count += Batch(extensions, seed, SOME).code.used
    count += jumps()[0].used
    for suite in suites():
        for operation, _ in suite.steps:
            count[operation.name] += len(suite.tuples)
    return count


@pytest.mark.skipif(
    shutil.which(PREFIX + "gcc") is None, reason="needs Debian's gcc-riscv64-linux-gnu"
)
def test_every_instruction_has_an_oracle(tmp_path: Path) -> None:
    oracles = {
        "unicorn": Counter(dict.fromkeys(names(), COUNT)) + Counter({"sc.w": 4, "sc.d": 4}),
        "qemu-riscv64": in_user_mode(),
        "qemu-system-riscv64": sum((used(each, tmp_path) for each in PROGRAMS), Counter()),
        "vectors": vectors.counted(),
    }
    print(f"\n{'extension':12}{'instructions':>13}", *(f"{each:>20}" for each in oracles))
    for extension in dict.fromkeys(each.extension for each in RISCV64):
        those = [each.name for each in RISCV64 if each.extension == extension]
        cells = [
            f"{sum(name in count for name in those):>5}, {sum(count[name] for name in those):>8} x"
            for count in oracles.values()
        ]
        print(f"{extension:12}{len(those):>13}", *(f"{cell:>20}" for cell in cells))
    uncovered = [
        each.name for each in RISCV64 if not any(count[each.name] for count in oracles.values())
    ]
    assert uncovered == []
    outside = ("unicorn", "qemu-riscv64", "qemu-system-riscv64")
    alone = {each.name for each in RISCV64 if not any(oracles[one][each.name] for one in outside)}
    assert alone == set(VECTORS)
    assert set(QEMU_FAULTS) <= alone
    assert {
        name: min(oracles["vectors"][name], least) for name, least in VECTORS.items()
    } == VECTORS
