"""What `@pytest.mark.vm(...)` says of a test's machine, checked when the test is collected.

A mark nearer to the test comes before one of its class, and that before its module's.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from vmlab.machine.errors import InvalidSpec, SpecProblem, VmlabError
from vmlab.pytest_plugin.options import SCOPES, Scope

if TYPE_CHECKING:
    from vmlab.machine.faults import FaultSchedule
    from vmlab.machine.spec import Share

NAME: Final = "vm"


class BadMark(pytest.Collector.CollectError):
    """A mark that cannot be meant; pytest shows the text and no traceback."""


@dataclass(frozen=True, slots=True)
class VmMark:
    """What a test's marks say; None, and empty, is what they do not.

    Attributes:
        image: The image that its machines boot.
        memory: Bytes of each machine's memory.
        cpus: vCPUs of each machine.
        hypervisors: Names of the hypervisors that it runs on.
        shares: Directories of the host inside the guests.
        scope: How long the template lives that machines are forked from.
        fault: What is broken while it runs, in each machine or in the one that a fault names.
        seeded: Whether `fault` says its seed; else the test's is taken.
        timeout: Seconds that it has, its machines' boot included.
    """

    image: str | None = None
    memory: int | None = None
    cpus: int | None = None
    hypervisors: tuple[str, ...] = ()
    shares: tuple[Share, ...] = ()
    scope: Scope | None = None
    fault: FaultSchedule | None = None
    seeded: bool = False
    timeout: float | None = None


def mark_of(node: pytest.Item | pytest.Collector) -> VmMark:
    """What the marks of a test say; relative paths are seen from its file's directory.

    Raises:
        BadMark: naming the argument, its value and what would be right.
    """
    reader = _Reader(node.path if node.path.is_dir() else node.path.parent)
    given: dict[str, Any] = {}
    for mark in reversed(list(node.iter_markers(NAME))):
        given |= reader.arguments(mark)
    values = {name: reader.read(name, value) for name, value in given.items() if value is not None}
    if reader.problems:
        error = InvalidSpec(reader.problems, what="@pytest.mark.vm")
        raise BadMark(
            f"{node.nodeid}: {error.message}\nhint: `pytest --markers` shows what it takes"
        )
    if "share" in values:
        values["shares"] = values.pop("share")
    if "fault" in values:
        values["fault"], values["seeded"] = values["fault"]
    return VmMark(**values)


@dataclass
class _Reader:
    """Reads arguments of marks, and gathers what is wrong with them."""

    directory: Path
    problems: list[SpecProblem] = field(default_factory=list)

    def arguments(self, mark: pytest.Mark) -> Mapping[str, Any]:
        if mark.args:
            right = "named arguments only, such as memory='1G'"
            self.problems.append(SpecProblem("vm(...)", mark.args[0], right))
        known: dict[str, Any] = {}
        for name, value in mark.kwargs.items():
            if name in ARGUMENTS:
                known[name] = value
                continue
            close = difflib.get_close_matches(name, ARGUMENTS, n=1)
            meant = f"did you mean {close[0]!r}? " if close else ""
            right = f"{meant}the arguments are {', '.join(ARGUMENTS)}"
            self.problems.append(SpecProblem(name, value, right))
        return known

    def read(self, name: str, value: object) -> Any:
        try:
            return ARGUMENTS[name](value, self.directory)
        except InvalidSpec as error:
            # Of a document: what is wrong inside it has names of its own.
            self.problems += [
                SpecProblem(f"{name}: {problem.field}", problem.value, problem.expected)
                for problem in error.problems
            ]
        except VmlabError as error:
            self.problems.append(SpecProblem(name, value, error.message))
        except ValueError as error:
            self.problems.append(SpecProblem(name, value, str(error)))
        return None


def _image(value: object, directory: Path) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError('the name of an image, such as "debian-12-amd64-tiny"')
    return value


def _memory(value: object, directory: Path) -> int:
    from vmlab.machine.sizes import MIB, parse_size

    size = parse_size(value)
    if size < MIB:
        raise ValueError('at least 1 MiB, such as "512M"')
    return size


def _cpus(value: object, directory: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number, at least 1")
    return value


def _hypervisors(value: object, directory: Path) -> tuple[str, ...]:
    from vmlab.hypervisors import registry
    from vmlab.machine.fields import choice

    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError('a list of at least one name, such as ["embedded", "qemu"]')
    known = registry.names()
    for name in value:
        if name not in known:
            raise ValueError(f"each has to be {choice(name, known)}")
    return tuple(dict.fromkeys(value))


def _shares(value: object, directory: Path) -> tuple[Share, ...]:
    from vmlab.guests.shares import parse_share

    texts = [value] if isinstance(value, str) else value
    right = 'a directory and its place in the guest, as ".:/src" or ".:/src:rw", or a list of those'
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ValueError(right)
    shares = []
    for number, text in enumerate(cast("Sequence[str]", texts)):
        source, colon, place = text.partition(":")
        here = directory / Path(source).expanduser()
        if not source or not colon or not place.startswith("/"):
            raise ValueError(right)
        if not here.is_dir():
            raise ValueError(f"{here} is no directory")
        shares.append(parse_share(f"{here}:{place}", f"share{number}"))
    return tuple(shares)


def _scope(value: object, directory: Path) -> Scope:
    if not isinstance(value, str) or value not in SCOPES:
        raise ValueError("one of " + ", ".join(map(repr, SCOPES)))
    return cast("Scope", value)


def _fault(value: object, directory: Path) -> tuple[FaultSchedule, bool]:
    from pydantic import BaseModel

    from vmlab.machine.documents import build
    from vmlab.machine.faults import FaultSchedule

    if isinstance(value, FaultSchedule):
        return value, "seed" in value.model_fields_set
    if isinstance(value, str | Path):
        path = directory / value
        if not path.is_file():
            raise ValueError(f"a file with a schedule: there is none at {path}")
        schedule = FaultSchedule.load(path)
        return schedule, "seed" in schedule.model_fields_set
    if isinstance(value, Mapping) and ("faults" in value or not value):
        data: object = value
    elif isinstance(value, Mapping | BaseModel):
        data = {"faults": [value]}
    elif isinstance(value, Sequence):
        data = {"faults": list(value)}
    else:
        raise ValueError("a schedule: a file's path, a table, a fault, or a list of faults")
    schedule = build(FaultSchedule, data)
    return schedule, "seed" in schedule.model_fields_set


def _timeout(value: object, directory: Path) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < cast("float", value) < float("inf"):
        raise ValueError("seconds, as a number greater than 0")
    return float(cast("float", value))


ARGUMENTS: Final[Mapping[str, Callable[[object, Path], Any]]] = {
    "image": _image,
    "memory": _memory,
    "cpus": _cpus,
    "hypervisors": _hypervisors,
    "share": _shares,
    "scope": _scope,
    "fault": _fault,
    "timeout": _timeout,
}
"""The arguments of the mark, and what reads each; a ValueError says what would be right."""

MEANINGS: Final[Mapping[str, str]] = {
    "image": "the image that its machines boot, by name",
    "memory": 'memory of each machine, as bytes or as `"1G"`',
    "cpus": "vCPUs of each machine",
    "hypervisors": "the hypervisors that it runs on, each in turn; `--vm-hypervisor` picks from "
    "them; on one that is not here it is skipped",
    "share": 'a directory of this host in the guests, `".:/src"` or `".:/src:rw"`, or a list of '
    "those",
    "scope": 'how long the template lives that its machines are forked from: `"session"`, '
    '`"module"`, or `"function"`, where each boots',
    "fault": "what is broken while it runs: a schedule's file, a table, a fault, or a list of "
    "faults ([faults](faults.md))",
    "timeout": "seconds that it has, its machines' boot included",
}
"""What each argument is, for people; in Markdown."""
