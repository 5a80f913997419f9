"""The suite as pytest sees it: one test for each check of each hypervisor.

`vmlab conformance NAME` runs it; `pytest --pyargs vmlab.conformance` runs it on the simulator.
"""

from __future__ import annotations

import pytest

from vmlab.conformance.plugin import cases_of, session_of
from vmlab.conformance.session import Case
from vmlab.report import Outcome


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case of the session."""
    cases = cases_of(metafunc.config)
    metafunc.parametrize("case", cases, ids=[case.label for case in cases])


def test_contract(case: Case, pytestconfig: pytest.Config) -> None:
    """The hypervisor keeps this clause of the contract."""
    result = session_of(pytestconfig).run(case)
    if result.outcome is Outcome.SKIP:
        pytest.skip(result.reason)
    if result.outcome is not Outcome.PASS:
        pytest.fail(f"{case.clause}\n{result.reason}\n{result.details}", pytrace=False)
