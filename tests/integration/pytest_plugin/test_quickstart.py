"""The quickstart is green as it stands: five tests and a plan, on the engine and on QEMU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.integration.projects import Project
from tests.needs import needs

EXAMPLE = Path(__file__).parents[3] / "examples" / "quickstart"

pytestmark = [
    pytest.mark.boots,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    needs("qemu-system-x86_64"),
    pytest.mark.skipif(
        not Path("/usr/riscv64-linux-gnu/include/stdio.h").exists()
        or shutil.which("riscv64-linux-gnu-gcc") is None,
        reason="needs the Debian packages gcc-riscv64-linux-gnu and libc6-dev-riscv64-cross",
    ),
]


def test_it_is_green_on_the_engine_and_on_qemu(project: Project) -> None:
    shutil.rmtree(project.path)
    shutil.copytree(EXAMPLE, project.path, ignore=shutil.ignore_patterns("build"))
    said = project.run("--vm-hypervisor", "embedded", "--vm-hypervisor", "qemu")
    assert (project.reports / "latest").exists(), said
    tests = project.tests()
    assert len(tests) == 12, said
    assert {test.outcome.value for test in tests.values()} == {"pass"}, said
    for hypervisor in ("embedded", "qemu"):
        cut = tests[f"test_what_was_added_survives_a_power_cut[{hypervisor}]"].attempts[-1]
        assert [fault.kind for fault in cut.faults] == ["power-cut"]
        sent = tests[f"test_a_ledger_is_sent_to_another_machine[{hypervisor}]"].attempts[-1]
        assert [machine.name for machine in sent.machines] == ["here", "there"]
    assert f"report: {(project.reports / 'latest').resolve() / 'report.html'}" in said
    assert not project.left()
