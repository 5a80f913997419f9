"""The one error tree of vmlab.

Each error says what was tried, on which machine and hypervisor, what came back, and a hint of
what to do next. The command line prints `message` and `hint` and exits with `exit_code`; a
traceback is for vmlab's own mistakes only. Errors travel between processes as plain data
(`to_record`, `from_record`), so a remote back end raises what a local one would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date, time
from pathlib import PurePath
from typing import Any, ClassVar

__all__ = [
    "ChannelClosed",
    "CorruptSnapshot",
    "DeadlineExceeded",
    "FaultInjected",
    "HypervisorUnavailable",
    "InvalidSpec",
    "InvalidState",
    "MachineCrashed",
    "MachineExists",
    "MachineNotFound",
    "MigrationFailed",
    "OperationAborted",
    "OperationFailed",
    "ResourceExhausted",
    "ResourceNotFound",
    "SnapshotNotFound",
    "SpecProblem",
    "UnsupportedOperation",
    "VmlabError",
    "from_record",
]


class VmlabError(Exception):
    """Something that vmlab was asked to do cannot be done, and why.

    Args:
        message: What was tried and what came back, as one sentence without a full stop.
        hint: What to do next, or None where there is nothing to advise.
        machine: Name of the machine concerned, if any.
        hypervisor: Name of the hypervisor concerned, if any.
        operation: Name of the operation that failed, if any.
    """

    exit_code: ClassVar[int] = 3
    _fields: ClassVar[tuple[str, ...]] = ()
    _kinds: ClassVar[dict[str, type[VmlabError]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        VmlabError._kinds[cls.__name__] = cls

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        machine: str | None = None,
        hypervisor: str | None = None,
        operation: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.machine = machine
        self.hypervisor = hypervisor
        self.operation = operation

    def __str__(self) -> str:
        where = ", ".join(
            f"{label} {value!r}"
            for label, value in (("machine", self.machine), ("hypervisor", self.hypervisor))
            if value is not None and repr(value) not in self.message
        )
        return f"{self.message} ({where})" if where else self.message

    def to_record(self) -> dict[str, Any]:
        """The error as JSON-ready data; `from_record` makes the same error of it again."""
        record: dict[str, Any] = {
            "kind": type(self).__name__,
            "message": self.message,
            "hint": self.hint,
            "machine": self.machine,
            "hypervisor": self.hypervisor,
            "operation": self.operation,
        }
        for field in self._fields:
            record[field] = _thawed(getattr(self, field))
        notes = getattr(self, "__notes__", [])
        if notes:
            record["notes"] = list(notes)
        return record

    @classmethod
    def _build(cls, record: Mapping[str, Any]) -> VmlabError:
        error = cls.__new__(cls)
        context = {key: record.get(key) for key in ("hint", "machine", "hypervisor", "operation")}
        VmlabError.__init__(error, str(record.get("message", "unknown error")), **context)
        for field in cls._fields:
            setattr(error, field, _frozen(record.get(field)))
        for note in record.get("notes") or ():
            error.add_note(str(note))
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        # The constructors differ; pickle and copy take the same road as other processes do.
        return from_record, (self.to_record(),)


def from_record(record: Mapping[str, Any]) -> VmlabError:
    """The error that `VmlabError.to_record` described; an unknown kind is a plain VmlabError."""
    kind = VmlabError._kinds.get(str(record.get("kind")), VmlabError)
    return kind._build(record)


def _thawed(value: Any) -> Any:
    """`value` with lists for tuples, as JSON has them."""
    return [_thawed(part) for part in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    """`value` with tuples for JSON's lists."""
    return tuple(_frozen(part) for part in value) if isinstance(value, list | tuple) else value


class SpecProblem:
    """One thing wrong with a specification: where, what stands there, what would be right.

    `value` is None where nothing stands.
    """

    __slots__ = ("expected", "field", "value")

    def __init__(self, field: str, value: object, expected: str) -> None:
        self.field = field
        self.value = value
        self.expected = expected

    def __str__(self) -> str:
        stands = f" = {_written(self.value)}" if self.value is not None else ""
        return f"{self.field}{stands}: {self.expected}"

    def __repr__(self) -> str:
        return f"SpecProblem({self.field!r}, {self.value!r}, {self.expected!r})"


class InvalidSpec(VmlabError):
    """A specification or an argument that cannot work: every problem of it, with its file.

    Args:
        problems: What is wrong, in the order of the fields.
        source: The file it stands in, if it stands in one.
        what: What has the problems, where `source` does not say it.
        operation: The operation that it was given to.
    """

    exit_code = 2
    _fields = ("source", "problem_rows")

    def __init__(
        self,
        problems: list[SpecProblem],
        *,
        source: str | None = None,
        hint: str | None = None,
        machine: str | None = None,
        hypervisor: str | None = None,
        operation: str = "create",
        what: str = "machine specification",
    ) -> None:
        self.source = source
        self.problem_rows: tuple[Any, ...] = tuple(
            (problem.field, _plain(problem.value), problem.expected) for problem in problems
        )
        lines = "\n".join(f"  {problem}" for problem in problems[:_MOST_PROBLEMS])
        if len(problems) > _MOST_PROBLEMS:
            lines += f"\n  and {len(problems) - _MOST_PROBLEMS} more"
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__(
            f"{source or what} has {count}:\n{lines}",
            hint=hint or "`vmlab schema` prints every field with its type and meaning",
            machine=machine,
            hypervisor=hypervisor,
            operation=operation,
        )

    @property
    def problems(self) -> tuple[SpecProblem, ...]:
        """The problems, in the order of the fields."""
        return tuple(SpecProblem(str(row[0]), row[1], str(row[2])) for row in self.problem_rows)


def _plain(value: object) -> str | int | float | bool | None:
    """`value` where JSON can hold it, else its representation."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        # Python refuses to write numbers of more than some thousand digits.
        bits = value.bit_length()
        return int(value) if bits <= _MOST_BITS else f"a number of {bits} bits"
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, str):
        # An enum's member that is text stands for that text.
        return str.__str__(value)
    if isinstance(value, PurePath | date | time):
        return str(value)
    try:
        return repr(value)
    except (RecursionError, ValueError):
        # Nested too deeply, or holding a number that is too long to be written.
        return f"a {type(value).__name__}"


_MOST_BITS = 1024
_MOST_PROBLEMS = 20
"""How many problems a message lists; `problems` has them all."""


def _written(value: object) -> str:
    """`value` as a specification would have it: "text" in quotes, true, 2, [1, 2]."""
    if isinstance(value, bool):
        return "true" if value else "false"
    plain = _plain(value)
    return repr(plain) if isinstance(value, str) or not isinstance(plain, str) else plain


class InvalidState(VmlabError):
    """A call that the machine's present state does not allow.

    `expected` are the names of the states that would allow it, `actual` the present one.
    """

    _fields = ("expected", "actual")

    def __init__(
        self,
        operation: str,
        *,
        expected: tuple[str, ...],
        actual: str,
        machine: str | None = None,
        hypervisor: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.expected = expected
        self.actual = actual
        allowed = " or ".join(expected) if expected else "no state at all"
        super().__init__(
            f"cannot {operation} a machine that is {actual}: it has to be {allowed}",
            hint=hint,
            machine=machine,
            hypervisor=hypervisor,
            operation=operation,
        )


class UnsupportedOperation(VmlabError):
    """The hypervisor does not have the capability that a call or a specification needs."""

    _fields = ("capability",)

    def __init__(
        self,
        capability: str,
        *,
        hypervisor: str,
        machine: str | None = None,
        operation: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.capability = capability
        super().__init__(
            f"hypervisor {hypervisor!r} does not have the capability {capability!r}",
            hint=hint or "`vmlab hypervisors` lists what each one can do on this host",
            machine=machine,
            hypervisor=hypervisor,
            operation=operation,
        )


class HypervisorUnavailable(VmlabError):
    """The hypervisor cannot be used on this host, is unknown, or does not answer."""

    exit_code = 4


class ResourceNotFound(VmlabError):
    """Something named in a call does not exist (a disk, a NIC, a channel)."""


class MachineNotFound(ResourceNotFound):
    """No machine has that name or id."""


class SnapshotNotFound(ResourceNotFound):
    """The machine has no snapshot of that name."""


class MachineExists(VmlabError):
    """A machine of that name exists already; names are unique on a hypervisor."""


class ResourceExhausted(VmlabError):
    """A limit was reached: machines, vCPUs, memory, disk, ports."""


class OperationFailed(VmlabError):
    """The hypervisor tried and could not; the machine's state tells what became of it."""


class CorruptSnapshot(OperationFailed):
    """A snapshot's contents are not what was written; nothing was restored from it."""


class MigrationFailed(OperationFailed):
    """A migration that did not arrive; the machine runs on where it was."""


class MachineCrashed(OperationFailed):
    """The machine died underneath an operation."""


class FaultInjected(OperationFailed):
    """The operation failed because a fault schedule said so."""


class OperationAborted(OperationFailed):
    """The operation was ended from elsewhere: the machine was killed meanwhile."""


class ChannelClosed(OperationFailed):
    """A console or guest channel ended before the answer did."""


class DeadlineExceeded(VmlabError, TimeoutError):
    """An operation took longer than its deadline and was undone.

    `seconds` is the time that it was given.
    """

    _fields = ("seconds",)

    def __init__(
        self,
        operation: str,
        *,
        seconds: float,
        machine: str | None = None,
        hypervisor: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.seconds = seconds
        super().__init__(
            f"{operation} did not finish within {seconds:g} s and was undone",
            hint=hint or "give it a longer timeout, or look at the console for what it waits for",
            machine=machine,
            hypervisor=hypervisor,
            operation=operation,
        )
