"""The error tree: what errors say, and how they travel."""

from __future__ import annotations

import copy
import json
import pickle
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmlab.machine import errors
from vmlab.machine.errors import (
    DeadlineExceeded,
    InvalidSpec,
    InvalidState,
    OperationFailed,
    SpecProblem,
    UnsupportedOperation,
    VmlabError,
    from_record,
)

text = st.text(max_size=20)
context = st.fixed_dictionaries({"machine": st.none() | text, "hint": st.none() | text})
values = st.none() | st.booleans() | st.integers() | st.floats() | text | st.lists(text)
rows = st.lists(st.builds(SpecProblem, text, values, text), min_size=1, max_size=3)

WITH_FIELDS: dict[type[VmlabError], st.SearchStrategy[VmlabError]] = {
    InvalidSpec: st.builds(
        lambda problems, source, context: InvalidSpec(problems, source=source, **context),
        rows,
        st.none() | text,
        context,
    ),
    InvalidState: st.builds(
        lambda expected, context: InvalidState("op", expected=expected, actual="x", **context),
        st.lists(text).map(tuple),
        context,
    ),
    UnsupportedOperation: st.builds(
        lambda capability, context: UnsupportedOperation(capability, hypervisor="h", **context),
        text,
        context,
    ),
    DeadlineExceeded: st.builds(
        lambda seconds, context: DeadlineExceeded("op", seconds=seconds, **context),
        st.floats(0, 1e9),
        context,
    ),
}


def subclasses(kind: type[VmlabError]) -> set[type[VmlabError]]:
    return {kind}.union(*(subclasses(one) for one in kind.__subclasses__()))


ALL = sorted(
    (kind for kind in subclasses(VmlabError) if kind.__module__ == errors.__name__),
    key=lambda kind: kind.__name__,
)


def an_error(kind: type[VmlabError]) -> st.SearchStrategy[VmlabError]:
    plain = st.builds(
        lambda message, context: kind(message, hypervisor="h", operation="op", **context),
        text,
        context,
    )
    return WITH_FIELDS.get(kind, plain)


def everything(error: VmlabError) -> dict[str, Any]:
    own = {field: getattr(error, field) for field in type(error)._fields}
    names = ("message", "hint", "machine", "hypervisor", "operation", "exit_code")
    notes = getattr(error, "__notes__", [])
    return own | {name: getattr(error, name) for name in names} | {"notes": notes}


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_an_error_is_the_same_in_another_process(
    kind: type[VmlabError], data: st.DataObject
) -> None:
    error = data.draw(an_error(kind))
    if data.draw(st.booleans()):
        error.add_note("a note")
    record = json.loads(json.dumps(error.to_record(), allow_nan=False))
    for other in (
        from_record(record),
        from_record(error.to_record()),
        copy.copy(error),
        pickle.loads(pickle.dumps(error)),
    ):
        assert type(other) is kind
        assert everything(other) == everything(error)
        assert str(other) == str(error)
        assert other.args == error.args


def test_every_error_is_public_and_says_what_it_is() -> None:
    assert {kind.__name__ for kind in ALL} <= set(errors.__all__)
    assert all(kind.__doc__ and kind.__doc__ != VmlabError.__doc__ for kind in ALL[:-1])


def test_an_error_of_an_unknown_kind_is_a_plain_one() -> None:
    error = from_record({"kind": "Newer", "message": "m", "hint": "h", "more": 1})
    assert type(error) is VmlabError
    assert (error.message, error.hint) == ("m", "h")
    assert from_record({}).message == "unknown error"


def test_the_text_tells_machine_and_hypervisor_unless_the_message_does() -> None:
    assert str(OperationFailed("no", machine="a", hypervisor="h")) == (
        "no (machine 'a', hypervisor 'h')"
    )
    assert str(OperationFailed("no 'a'", machine="a")) == "no 'a'"


def test_a_deadline_is_a_timeout_to_python() -> None:
    with pytest.raises(TimeoutError, match=r"start did not finish within 1\.5 s and was undone"):
        raise DeadlineExceeded("start", seconds=1.5)


def test_a_wrong_state_tells_the_right_ones() -> None:
    error = InvalidState("start", expected=("created", "stopped"), actual="running")
    assert str(error) == ("cannot start a machine that is running: it has to be created or stopped")
    assert "no state at all" in str(InvalidState("fly", expected=(), actual="running"))


class Colour(StrEnum):
    RED = "red"


class Unwritable:
    def __repr__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize(
    ("value", "shown", "travels_as"),
    [
        ("a", "f = 'a': x", "a"),
        (True, "f = true: x", True),
        (False, "f = false: x", False),
        (1.5, "f = 1.5: x", 1.5),
        (float("nan"), "f = nan: x", "nan"),
        (None, "f: x", None),
        ([1], "f = [1]: x", "[1]"),
        (Colour.RED, "f = 'red': x", "red"),
        (Path("/a"), "f = /a: x", "/a"),
        (date(2020, 1, 2), "f = 2020-01-02: x", "2020-01-02"),
        pytest.param(
            1 << 20000, "f = a number of 20001 bits: x", "a number of 20001 bits", id="long"
        ),
        ([1 << 20000], "f = a list: x", "a list"),
        (Unwritable(), "f = a Unwritable: x", "a Unwritable"),
    ],
)
def test_values_are_shown_as_their_author_wrote_them(
    value: object, shown: str, travels_as: object
) -> None:
    error = InvalidSpec([SpecProblem("f", value, "x")])
    assert str(error) == f"machine specification has 1 problem:\n  {shown}"
    (problem,) = error.problems
    assert problem.value == travels_as
    assert repr(problem) == f"SpecProblem('f', {travels_as!r}, 'x')"
