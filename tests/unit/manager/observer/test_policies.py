"""Policies: read from text, a machine's own before the manager's, none that removes data."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import InvalidSpec
from vmlab.manager.observer.difference import CODES
from vmlab.manager.observer.policies import policy_for, read_policies, repair_for
from vmlab.manager.observer.repairs import REPAIRS
from vmlab.manager.settings import Settings

MISMATCH = "machine-state-mismatch"


def test_policies_are_read_from_text_and_from_a_mapping():
    text = " machine-state-mismatch = reconcile , orphan-disk=quarantine,"
    expected = {MISMATCH: "reconcile", "orphan-disk": "quarantine"}
    assert read_policies(text) == expected
    assert read_policies(expected) == expected
    assert read_policies("") == {}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("no-such-code=report", "no-such-code"),
        ("orphan-disk", "orphan-disk"),
        ("orphan-disk=delete", "quarantine"),
        ("storage-low=reconcile", "report"),
        (7, "CODE=POLICY"),
    ],
)
def test_a_policy_that_is_none_is_refused_by_what_would_be_one(value, says):
    with pytest.raises(ValueError, match=says):
        read_policies(value)


def test_a_variable_that_is_wrong_is_named(tmp_path):
    with pytest.raises(InvalidSpec, match="VMLAB_FINDINGS"):
        Settings.from_environment(
            {"VMLAB_FINDINGS": "orphan-disk=away"}, home=Home.open(tmp_path / "home")
        )


def test_what_nobody_has_a_policy_for_is_reported(known):
    assert policy_for(MISMATCH, {"one"}, known, {}) == "report"
    assert policy_for(MISMATCH, {"one"}, known, {MISMATCH: "adopt"}) == "adopt"


def test_a_machines_own_policy_goes_before_the_managers(known):
    own = replace(known.machines[0], policies={MISMATCH: "report"})
    known = replace(known, machines=(own,))
    assert policy_for(MISMATCH, {"one"}, known, {MISMATCH: "adopt"}) == "report"
    assert policy_for("orphan-disk", {"one"}, known, {"orphan-disk": "adopt"}) == "adopt"


def test_machines_that_want_different_things_are_only_reported(known):
    code = "disk-attachment-mismatch"
    one = replace(known.machines[0], policies={code: "adopt"})
    two = replace(one, id="two", at="m-two", policies={code: "reconcile"})
    known = replace(known, machines=(one, two))
    assert policy_for(code, {"one", "two"}, known, {}) == "report"
    assert policy_for(code, {"two"}, known, {}) == "reconcile"


def test_a_policy_does_only_what_can_be_done_and_removes_nothing():
    assert repair_for(MISMATCH, "report", ["adopt"]) is None
    assert repair_for(MISMATCH, "adopt", ["adopt", "reconcile"]) == "adopt"
    assert repair_for(MISMATCH, "reconcile", ["adopt"]) is None
    for code, what in CODES.items():
        for action in what.destroys:
            assert repair_for(code, action, list(what.actions)) is None


def test_every_action_of_every_code_has_a_repair_and_no_other_has():
    assert set(REPAIRS) == {
        (code, action) for code, what in CODES.items() for action in what.actions
    }
