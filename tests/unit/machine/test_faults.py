"""Faults and schedules as data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tests.unit.machine.strategies import json_values

from vmlab.machine.documents import build
from vmlab.machine.errors import InvalidSpec
from vmlab.machine.faults import At, DiskError, Fault, FaultKind, FaultSchedule, Nth

ONE_OF_EACH: dict[FaultKind, dict[str, Any]] = {
    FaultKind.DISK_ERROR: {"disk": "root", "operation": "write", "errno": "ENOSPC"},
    FaultKind.DISK_SLOW: {"disk": "root", "delay": 0.5},
    FaultKind.DISK_TORN_WRITE: {"disk": "root", "keep": "1K"},
    FaultKind.DISK_CORRUPT: {"disk": "root", "offset": "1M", "length": 16},
    FaultKind.POWER_CUT: {"restart": True},
    FaultKind.NET_LOSS: {"nic": "lan", "ratio": 0.1},
    FaultKind.NET_DELAY: {"nic": "lan", "delay": 1, "jitter": 0.5},
    FaultKind.NET_PARTITION: {"nic": "lan"},
    FaultKind.PAUSE: {},
    FaultKind.KILL: {},
    FaultKind.MEMORY_PRESSURE: {"leave": "64M"},
    FaultKind.CLOCK_JUMP: {"seconds": -3600},
    FaultKind.CPU_STALL: {"vcpu": 1},
    FaultKind.OPERATION_FAILURE: {"operation": "start", "message": "no"},
    FaultKind.OPERATION_HANG: {"operation": "migrate"},
    FaultKind.OPERATION_PARTIAL: {"operation": "create"},
    FaultKind.LOST_EVENT: {"event": "crashed"},
    FaultKind.STALE_STATUS: {"age": 2},
    FaultKind.HYPERVISOR_CRASH: {"restart_after": 1},
}
WHENS: list[dict[str, Any]] = [
    {"on": "time", "seconds": 3},
    {"on": "nth", "n": 2, "every": True},
    {"on": "chance", "probability": 0.25},
    {"on": "console", "text": "login:"},
]


def schedule() -> dict[str, Any]:
    return {
        "seed": 5,
        "faults": [
            {"kind": str(kind), "when": WHENS[position % 4], "duration": 1.5, **fields}
            for position, (kind, fields) in enumerate(ONE_OF_EACH.items())
        ],
    }


def test_there_is_a_fault_for_every_kind() -> None:
    union = get_args(get_args(Fault)[0])
    assert [one.model_fields["kind"].default for one in union] == list(FaultKind)
    assert list(ONE_OF_EACH) == list(FaultKind)


def test_a_schedule_of_every_fault_is_read_back_and_valid_by_its_schema() -> None:
    read = build(FaultSchedule, schedule())
    assert [fault.kind for fault in read.faults] == list(FaultKind)
    assert FaultSchedule.parse(read.model_dump_json(), form="json") == read
    validator = Draft202012Validator(FaultSchedule.model_json_schema())
    validator.validate(schedule())
    validator.validate(json.loads(read.model_dump_json()))


def test_a_schedule_is_loaded_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text('[[faults]]\nkind = "disk-error"\ndisk = "root"\n')
    loaded = FaultSchedule.load(tmp_path / "f.toml")
    assert loaded.faults == (DiskError(id="disk-error-1", disk="root", when=At(seconds=0)),)


def test_faults_have_an_id_each() -> None:
    read = build(FaultSchedule, {"faults": [{"kind": "kill"}, {"kind": "kill", "id": "k"}]})
    assert [fault.id for fault in read.faults] == ["kill-1", "k"]


@pytest.mark.parametrize(
    ("fault", "field", "value", "expected"),
    [
        ({"kind": "disk-eror"}, "kind", "disk-eror", "; did you mean 'disk-error'?"),
        ({"kind": 5}, "kind", 5, "one of 'disk-error', 'disk-slow'"),
        ({}, "kind", None, "one of 'disk-error', 'disk-slow'"),
        ({"kind": "disk-error"}, "disk", None, "this field has to be given"),
        ({"kind": "disk-error", "disk": 3}, "disk", 3, "1 to 63 letters"),
        ({"kind": "disk-error", "disk": "r", "dsik": 1}, "dsik", 1, "did you mean 'disk'?"),
        (
            {"kind": "disk-error", "disk": "r", "operation": "wirte"},
            "operation",
            "wirte",
            "one of 'read', 'write', 'flush', 'any'; did you mean 'write'?",
        ),
        ({"kind": "kill", "when": {"on": "tme"}}, "when.on", "tme", "did you mean 'time'?"),
        ({"kind": "kill", "when": {}}, "when.on", None, "one of 'time', 'nth', 'chance'"),
        ({"kind": "kill", "when": {"on": "nth"}}, "when.n", None, "has to be given"),
        ({"kind": "kill", "when": {"on": "nth", "n": 0}}, "when.n", 0, "at least 1"),
        ({"kind": "kill", "when": {"on": "nth", "n": True}}, "when.n", True, "a whole number"),
        ({"kind": "kill", "when": 5}, "when", 5, "a table of fields"),
        (
            {"kind": "kill", "when": {"on": "chance", "probability": 2}},
            "when.probability",
            2,
            "at most 1",
        ),
        ({"kind": "kill", "duration": 0}, "duration", 0, "more than 0"),
        ({"kind": "kill", "duration": float("nan")}, "duration", "nan", ""),
        ({"kind": "kill", "duration": float("inf")}, "duration", "inf", "a finite number"),
        ({"kind": "kill", "duration": "1s"}, "duration", "1s", "a number"),
        ({"kind": "kill", "duration": True}, "duration", True, "a number"),
        (
            {"kind": "operation-hang", "operation": "strat"},
            "operation",
            "strat",
            "; did you mean 'start'?",
        ),
        ({"kind": "lost-event", "event": "crash"}, "event", "crash", "; did you mean 'crashed'?"),
        ({"kind": "disk-corrupt", "disk": "r", "length": 0}, "length", 0, "at least 1"),
    ],
)
def test_each_error_names_field_value_and_what_would_be_right(
    fault: dict[str, Any], field: str, value: object, expected: str
) -> None:
    with pytest.raises(InvalidSpec) as caught:
        build(FaultSchedule, {"faults": [{"kind": "kill"}, fault]})
    (problem,) = caught.value.problems
    assert problem.field == f"faults.1.{field}"
    assert problem.value == value
    assert expected in problem.expected
    assert "FaultKind" not in str(caught.value)
    assert str(caught.value).startswith("fault schedule has 1 problem:")


def test_two_faults_cannot_have_one_id() -> None:
    with pytest.raises(InvalidSpec) as caught:
        build(FaultSchedule, {"faults": [{"kind": "kill", "id": "k"}, {"kind": "kill", "id": "k"}]})
    assert [(p.field, p.value) for p in caught.value.problems] == [("faults.1.id", "k")]


def test_the_numbers_of_a_fault_depend_on_seed_and_id_alone() -> None:
    one, two = FaultSchedule(seed=1), FaultSchedule(seed=2)
    assert one.random("a").random() == one.random("a").random()
    assert one.random("a").random() != one.random("b").random()
    assert one.random("a").random() != two.random("a").random()


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "kind": st.sampled_from([str(kind) for kind in FaultKind]) | json_values,
                "disk": json_values,
                "when": json_values
                | st.fixed_dictionaries({"on": st.sampled_from(["time", "nth"]) | json_values}),
                "duration": json_values,
                "operation": json_values,
            },
        ),
        max_size=3,
    )
)
def test_any_data_is_a_schedule_or_invalid_without_names_of_classes(
    faults: list[dict[str, Any]],
) -> None:
    try:
        build(FaultSchedule, {"faults": faults})
    except InvalidSpec as error:
        for problem in error.problems:
            assert problem.field.startswith("faults.")
            assert "FaultKind" not in problem.expected
            assert "Input" not in problem.expected


def test_triggers_have_what_they_need() -> None:
    assert Nth(n=3).every is False
