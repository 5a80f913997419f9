"""Machine states and the one table of transitions between them.

Every back end has these states and no others; `Lifecycle` is the only place that changes one.
A state ending in "-ing" lasts as long as one operation; the others last until something happens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType

from vmlab.machine.errors import InvalidState, OperationFailed


class MachineState(StrEnum):
    """What a machine is doing."""

    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    RESUMING = "resuming"
    STOPPING = "stopping"
    STOPPED = "stopped"
    RESTARTING = "restarting"
    SNAPSHOTTING = "snapshotting"
    RESTORING = "restoring"
    MIGRATING = "migrating"
    FAILED = "failed"
    DELETING = "deleting"
    DELETED = "deleted"
    UNKNOWN = "unknown"

    @property
    def is_stable(self) -> bool:
        """Whether the state lasts without an operation under way."""
        return self in STABLE

    @property
    def is_live(self) -> bool:
        """Whether guest code runs or could go on running: the machine holds its memory."""
        return self in LIVE


_S = MachineState

STABLE = frozenset(
    {_S.CREATED, _S.RUNNING, _S.PAUSED, _S.STOPPED, _S.FAILED, _S.DELETED, _S.UNKNOWN}
)
LIVE = frozenset(
    {
        _S.STARTING,
        _S.RUNNING,
        _S.PAUSING,
        _S.PAUSED,
        _S.RESUMING,
        _S.STOPPING,
        _S.RESTARTING,
        _S.SNAPSHOTTING,
        _S.RESTORING,
        _S.MIGRATING,
    }
)
OFF = frozenset({_S.CREATED, _S.STOPPED, _S.FAILED})
"""States in which the machine has no running guest and can be deleted or changed at rest."""


def _table() -> dict[MachineState, frozenset[MachineState]]:
    fails = {_S.FAILED, _S.UNKNOWN}
    at_rest = {_S.SNAPSHOTTING, _S.RESTORING, _S.MIGRATING, _S.DELETING}
    resting = {_S.CREATED, _S.RUNNING, _S.PAUSED, _S.STOPPED}
    table = {
        _S.CREATED: {_S.STARTING, *at_rest},
        # A start that is cancelled returns to where it came from.
        _S.STARTING: {_S.RUNNING, _S.CREATED, _S.STOPPED},
        # A guest stops by itself, and a hypervisor pauses one whose disk reports an error.
        _S.RUNNING: {
            _S.PAUSING,
            _S.PAUSED,
            _S.STOPPING,
            _S.STOPPED,
            _S.RESTARTING,
            _S.SNAPSHOTTING,
            _S.RESTORING,
            _S.MIGRATING,
        },
        _S.PAUSING: {_S.PAUSED, _S.RUNNING, _S.STOPPED},
        # Somebody resumes or kills it behind vmlab's back.
        _S.PAUSED: {
            _S.RESUMING,
            _S.RUNNING,
            _S.STOPPING,
            _S.STOPPED,
            _S.SNAPSHOTTING,
            _S.RESTORING,
            _S.MIGRATING,
        },
        _S.RESUMING: {_S.RUNNING, _S.PAUSED, _S.STOPPED},
        _S.STOPPING: {_S.STOPPED, _S.RUNNING, _S.PAUSED},
        _S.STOPPED: {_S.STARTING, *at_rest},
        _S.RESTARTING: {_S.RUNNING, _S.STOPPED},
        _S.SNAPSHOTTING: {*resting},
        _S.RESTORING: {*resting},
        # A machine that arrived elsewhere is deleted here.
        _S.MIGRATING: {*resting, _S.DELETING},
        _S.FAILED: {_S.STARTING, _S.STOPPING, _S.STOPPED, _S.RESTORING, _S.DELETING},
        _S.DELETING: {_S.DELETED, _S.CREATED, _S.STOPPED},
        _S.UNKNOWN: {*resting, _S.STOPPING, _S.DELETING},
    }
    complete = {state: frozenset((to | fails) - {state}) for state, to in table.items()}
    return complete | {_S.DELETED: frozenset()}


TRANSITIONS: Mapping[MachineState, frozenset[MachineState]] = MappingProxyType(_table())
"""From each state, the states that may come next."""

OPERATIONS: Mapping[str, frozenset[MachineState]] = MappingProxyType(
    {
        "start": frozenset({_S.CREATED, _S.STOPPED, _S.FAILED}),
        "stop": frozenset({_S.RUNNING, _S.PAUSED, _S.UNKNOWN}),
        "kill": frozenset({*LIVE, _S.FAILED, _S.UNKNOWN}),
        "pause": frozenset({_S.RUNNING}),
        "resume": frozenset({_S.PAUSED}),
        "restart": frozenset({_S.RUNNING}),
        "snapshot": frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.STOPPED}),
        "delete_snapshot": frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.STOPPED, _S.FAILED}),
        "restore": frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.STOPPED, _S.FAILED}),
        "fork": frozenset({_S.RUNNING, _S.PAUSED}),
        "migrate": frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.STOPPED}),
        "plug_disk": frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.STOPPED}),
        "unplug_disk": frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.STOPPED}),
        "plug_nic": frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.STOPPED}),
        "unplug_nic": frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.STOPPED}),
        "resize": frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.STOPPED}),
        "resize_disk": frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.STOPPED}),
        "pin": frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.STOPPED}),
        "inject": frozenset({_S.RUNNING, _S.PAUSED}),
        "clear_fault": frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.STOPPED, _S.FAILED}),
        "channel": frozenset({_S.RUNNING, _S.PAUSED}),
        "screenshot": frozenset({_S.RUNNING, _S.PAUSED}),
        "send_keys": frozenset({_S.RUNNING}),
        "delete": frozenset({_S.CREATED, _S.STOPPED, _S.FAILED, _S.UNKNOWN}),
        "info": frozenset(MachineState) - {_S.DELETED},
        "console": frozenset(MachineState) - {_S.DELETED},
        "metrics": LIVE,
    }
)
"""The states in which each operation may begin; `status` may be asked in any."""


class Lifecycle:
    """The state of one machine, and the only thing that may change it.

    Args:
        machine: Name of the machine, for errors.
        hypervisor: Name of its hypervisor, for errors.
        state: The state to begin with.
        on_change: Called after each change with the old state, the new one and the reason.
    """

    __slots__ = ("_hypervisor", "_machine", "_on_change", "_state", "reason")

    def __init__(
        self,
        machine: str,
        hypervisor: str,
        state: MachineState = MachineState.CREATED,
        on_change: Callable[[MachineState, MachineState, str], None] | None = None,
    ) -> None:
        self._machine = machine
        self._hypervisor = hypervisor
        self._state = state
        self._on_change = on_change
        self.reason = ""

    @property
    def state(self) -> MachineState:
        """The present state."""
        return self._state

    def require(self, operation: str, allowed: frozenset[MachineState] | None = None) -> None:
        """Refuse `operation` unless the present state allows it to begin.

        Args:
            operation: Its name.
            allowed: The states it may begin in, where OPERATIONS does not say that.

        Raises:
            InvalidState: with the states that would allow it and the actual one.
        """
        if allowed is None:
            allowed = OPERATIONS[operation]
        if self._state not in allowed:
            raise InvalidState(
                operation,
                expected=tuple(state.value for state in MachineState if state in allowed),
                actual=self._state.value,
                machine=self._machine,
                hypervisor=self._hypervisor,
                hint=_advice(operation, self._state),
            )

    def move(self, to: MachineState, reason: str = "") -> None:
        """Go to state `to`; going where the machine already is does nothing.

        Raises:
            OperationFailed: the table has no such transition, which is a mistake of the caller's.
        """
        old = self._state
        if to is old:
            return
        if to not in TRANSITIONS[old]:
            raise OperationFailed(
                f"no transition leads from {old.value} to {to.value}",
                machine=self._machine,
                hypervisor=self._hypervisor,
            )
        self._state = to
        self.reason = reason
        if self._on_change is not None:
            self._on_change(old, to, reason)


def _advice(operation: str, actual: MachineState) -> str | None:
    """What to do about an operation refused in state `actual`, where that can be said."""
    if actual is _S.DELETED:
        return "the machine is gone: create a new one"
    if operation == "delete" and actual in LIVE:
        return "stop or kill it first, or delete it with force"
    if operation in {"pause", "stop", "restart", "fork", "channel", "screenshot"} and actual in OFF:
        return "start it first"
    if actual is _S.PAUSED:
        return "resume it first"
    return None
