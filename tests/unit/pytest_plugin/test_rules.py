"""What of a machine's incidents fails a test is said by the user's rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.unit.pytest_plugin.conftest import Project

pytest_plugins = ["pytester"]

Written = Callable[[str], Project]

COMPLAINS = """
    import asyncio

    def test_it(vm):
        async def complain():
            simulated = vm.machine.hypervisor.world.machines[vm.machine.id]
            simulated.print("[    9.000000] BUG: scheduling while atomic: it\\n")
            await asyncio.sleep(60)
        vm.run(complain())
"""


def test_what_rules_tolerate_fails_no_test(written: Written) -> None:
    project = written(COMPLAINS)
    assert project.run().ret == pytest.ExitCode.TESTS_FAILED
    assert "scheduling while atomic" in project.tests()["test_it"].attempts[-1].reason
    (project.path / "rules.toml").write_text('tolerate = ["bug"]\n')
    assert project.run("--vm-rules", "rules.toml").ret == pytest.ExitCode.OK
    (project.path / "pytest.ini").write_text("[pytest]\nvm_rules = rules.toml\n")
    assert project.run().ret == pytest.ExitCode.OK


def test_rules_that_cannot_be_meant_are_refused_before_anything_runs(written: Written) -> None:
    project = written(COMPLAINS)
    (project.path / "rules.toml").write_text('tolerate = ["bugs"]\n')
    for name, told in (("rules.toml", "one of panic"), ("none.toml", "a file that can be read")):
        result = project.run("--vm-rules", name)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert told in result.stderr.str() and "--vm-rules" in result.stderr.str()
