"""The table of states and transitions, and the one thing that moves along it."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmlab.machine.errors import InvalidState, OperationFailed
from vmlab.machine.states import (
    LIVE,
    OFF,
    OPERATIONS,
    STABLE,
    TRANSITIONS,
    Lifecycle,
    MachineState,
)

S = MachineState
PASSING = [state for state in MachineState if not state.is_stable]

# The way of each operation that changes the state: what it passes through, where it ends.
WAYS: dict[str, tuple[MachineState, frozenset[MachineState]]] = {
    "start": (S.STARTING, frozenset({S.RUNNING})),
    "stop": (S.STOPPING, frozenset({S.STOPPED})),
    "kill": (S.STOPPING, frozenset({S.STOPPED})),
    "pause": (S.PAUSING, frozenset({S.PAUSED})),
    "resume": (S.RESUMING, frozenset({S.RUNNING})),
    "restart": (S.RESTARTING, frozenset({S.RUNNING})),
    "snapshot": (S.SNAPSHOTTING, frozenset({S.CREATED, S.RUNNING, S.PAUSED, S.STOPPED})),
    "fork": (S.SNAPSHOTTING, frozenset({S.RUNNING, S.PAUSED})),
    "restore": (S.RESTORING, frozenset({S.RUNNING, S.PAUSED, S.STOPPED})),
    "migrate": (S.MIGRATING, frozenset({S.DELETING})),
    "delete": (S.DELETING, frozenset({S.DELETED})),
}


def reachable(start: MachineState) -> set[MachineState]:
    found: set[MachineState] = set()
    ahead: list[MachineState] = [start]
    while ahead:
        for state in TRANSITIONS[ahead.pop()] - found:
            found.add(state)
            ahead.append(state)
    return found


def test_the_table_is_complete_and_nothing_leads_to_itself() -> None:
    assert set(TRANSITIONS) == set(MachineState)
    assert all(state not in to for state, to in TRANSITIONS.items())


def test_nothing_leads_out_of_deleted() -> None:
    assert TRANSITIONS[S.DELETED] == frozenset()


def test_every_state_can_reach_deleted() -> None:
    assert [state for state in MachineState if state is not S.DELETED and S.DELETED not in
            reachable(state)] == []  # fmt: skip


def test_every_state_that_passes_can_end_in_ones_that_last() -> None:
    for state in PASSING:
        assert TRANSITIONS[state] & STABLE, state
        assert S.FAILED in TRANSITIONS[state]
        assert S.UNKNOWN in TRANSITIONS[state]


def test_states_are_either_passing_or_lasting() -> None:
    assert all(state.value.endswith("ing") for state in PASSING)
    assert {state for state in MachineState if state.value.endswith("ing")} == {
        *PASSING,
        S.RUNNING,
    }
    assert OFF <= STABLE
    assert not OFF & LIVE
    assert all(state.is_live == (state in LIVE) for state in MachineState)


def test_every_operation_can_go_its_way_from_every_state_it_may_begin_in() -> None:
    for operation, (via, ends) in WAYS.items():
        for state in OPERATIONS[operation] & STABLE:
            assert via in TRANSITIONS[state], f"{operation} cannot begin in {state}"
            # Where it fails, it goes back.
            back = S.STOPPED if operation == "kill" and state in OFF else state
            assert back in TRANSITIONS[via], f"{operation} cannot return to {state}"
        for end in ends:
            assert end in TRANSITIONS[via], f"{operation} cannot end in {end}"


def test_every_passing_state_belongs_to_an_operation() -> None:
    assert {via for via, _ in WAYS.values()} == set(PASSING)


def test_operations_are_refused_for_a_deleted_machine() -> None:
    assert [name for name, states in OPERATIONS.items() if S.DELETED in states] == []
    with pytest.raises(TypeError):
        OPERATIONS["fly"] = frozenset()  # that it is refused is the test


@given(st.sampled_from(list(MachineState)), st.lists(st.sampled_from(list(MachineState))))
def test_a_machine_moves_along_the_table_and_tells_of_it(
    start: MachineState, moves: list[MachineState]
) -> None:
    told: list[tuple[MachineState, MachineState, str]] = []
    lifecycle = Lifecycle("a", "h", start, lambda old, new, why: told.append((old, new, why)))
    expected: list[tuple[MachineState, MachineState, str]] = []
    for move in moves:
        before = lifecycle.state
        if move is before:
            lifecycle.move(move, "again")
        elif move in TRANSITIONS[before]:
            lifecycle.move(move, "because")
            expected.append((before, move, "because"))
            assert lifecycle.reason == "because"
        else:
            with pytest.raises(OperationFailed, match=f"from {before.value} to {move.value}"):
                lifecycle.move(move)
            assert lifecycle.state is before
    assert told == expected


@given(st.sampled_from(list(MachineState)), st.sampled_from(list(OPERATIONS)))
def test_an_operation_begins_only_where_the_table_says(state: MachineState, name: str) -> None:
    lifecycle = Lifecycle("a", "h", state)
    if state in OPERATIONS[name]:
        lifecycle.require(name)
        return
    with pytest.raises(InvalidState) as caught:
        lifecycle.require(name)
    assert set(caught.value.expected) == set(OPERATIONS[name])
    assert (caught.value.actual, caught.value.operation) == (state.value, name)
    lifecycle.require(name, frozenset({state}))


def advice(operation: str, states: Iterable[MachineState]) -> set[str | None]:
    found = set()
    for state in states:
        with pytest.raises(InvalidState) as caught:
            Lifecycle("a", "h", state).require(operation)
        found.add(caught.value.hint)
    return found


def test_refusals_advise_what_to_do() -> None:
    assert advice("start", [S.DELETED]) == {"the machine is gone: create a new one"}
    assert advice("delete", [S.RUNNING, S.PAUSED]) == {
        "stop or kill it first, or delete it with force"
    }
    assert advice("pause", OFF) == {"start it first"}
    assert advice("restart", [S.PAUSED]) == {"resume it first"}
    assert advice("start", [S.RUNNING]) == {None}
