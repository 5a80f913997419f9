"""The phases of a plan: what is run in the guest, in which order, and what is taken from it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vmlab.machine.fields import Flag, Name, Number, Text, Wrong, choice
from vmlab.report import Direction

MOST_PHASES: Final = 500
"""Phases of one plan."""

DEFAULT_TIMEOUT: Final = 600.0
"""Seconds of a phase that names no timeout."""

LONGEST: Final = 30 * 86400.0
"""Seconds of the longest timeout."""

GuestPath = Annotated[
    str,
    Text(r"^/[^\0\n]{0,4000}$", 'an absolute path in the guest such as "/root/*.xml", in one line'),
]
"""An absolute path in the guest; where it says so, a pattern of the shell's."""

LONGEST_SCRIPT: Final = 64 << 10
"""Bytes of the longest script; what is longer belongs into a file of a share."""

_SCRIPT = Text(r"^[^\0]*[^\s\0][^\0]*$", "a command, or several lines of them")
_VARIABLE = Text(r"^[A-Za-z_][A-Za-z0-9_]{0,254}$", "letters, digits and '_', no digit first")
Environment = dict[
    Annotated[str, _VARIABLE], Annotated[str, Text(r"^[^\0]*$", "text without NUL, in quotes")]
]
"""Environment variables and their values."""

LARGEST_ENVIRONMENT: Final = 32 << 10
"""Bytes of all variables of a phase and their values."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MetricPattern(_Table):
    """A number that a phase prints: every line that the pattern matches is a sample."""

    name: Annotated[str, Text(r"^[^\0\n]{1,200}$", "a name of at most 200 characters")] | None = (
        Field(None, description="name of the metric; the names of the pattern's groups if left out")
    )
    pattern: str = Field(
        min_length=1,
        max_length=4096,
        description="regular expression of Python's, searched in each line of stdout and stderr; "
        "its group is the number",
    )
    unit: str = Field("", max_length=50, description='unit of the number, such as "MB/s"')
    direction: Direction = Field(Direction.NONE, description="which way it gets better")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            compiled = re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise Wrong("pattern", self.pattern, f"a regular expression ({error})") from error
        if self.name is not None and compiled.groups != 1:
            raise Wrong(
                "pattern",
                self.pattern,
                "a pattern with one group, which is the number; write (?:...) for other groups",
            )
        if self.name is None and (
            not compiled.groups or len(compiled.groupindex) < compiled.groups
        ):
            raise Wrong(
                "pattern",
                self.pattern,
                "groups with names, such as (?P<seconds>[0-9.]+), or a name beside it",
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The metric of each group of the pattern, in the order of the groups."""
        if self.name is not None:
            return (self.name,)
        return tuple(re.compile(self.pattern).groupindex)


class Phase(_Table):
    """One step: a shell script in the guest, and what it leaves there."""

    name: Name = Field(description="name of the phase, one of its kind in the plan")
    run: Annotated[str, _SCRIPT] = Field(
        description="shell text for the guest's /bin/sh; the first command that fails ends it"
    )
    timeout: Number = Field(DEFAULT_TIMEOUT, gt=0, le=LONGEST, description="seconds that it has")
    needs: tuple[Name, ...] | None = Field(
        None,
        description="phases that have to succeed before it; the one before it if left out, "
        "none if empty",
    )
    continue_on_error: Flag = Field(
        False,
        alias="continue-on-error",
        description="whether its failure fails neither the plan nor the phases that need it",
    )
    directory: GuestPath | None = Field(None, description="directory in the guest where it runs")
    environment: Environment = Field(
        default_factory=dict, description="variables beside those of the plan"
    )
    artifacts: tuple[GuestPath, ...] = Field(
        (),
        description="files and directories of the guest to keep, however it ends; "
        "patterns of the shell's",
    )
    results: tuple[GuestPath, ...] = Field(
        (),
        description="files of the guest in JUnit XML or TAP whose tests are tests of their own; "
        "patterns of the shell's",
    )
    metrics: tuple[MetricPattern, ...] = Field((), description="numbers that it prints")

    @model_validator(mode="after")
    def _short_enough(self) -> Self:
        size = len(self.run.encode("utf-8", "surrogatepass"))
        if size > LONGEST_SCRIPT:
            right = f"at most {LONGEST_SCRIPT} bytes; put more into a script of a share"
            raise Wrong("run", f"{size} bytes", right)
        return self


def needs_of(phases: Sequence[Phase]) -> dict[str, tuple[str, ...]]:
    """What each phase needs, in the order of the file.

    Raises:
        Wrong: a name stands twice or is unknown, or phases need each other in a circle.
    """
    first: dict[str, int] = {}
    for position, phase in enumerate(phases):
        if phase.name in first:
            expected = f"a name that phases.{first[phase.name]} has not"
            raise Wrong(f"phases.{position}.name", phase.name, expected)
        first[phase.name] = position
    needs: dict[str, tuple[str, ...]] = {}
    before: tuple[str, ...] = ()
    for position, phase in enumerate(phases):
        for number, name in enumerate(phase.needs or ()):
            where = f"phases.{position}.needs.{number}"
            if name == phase.name:
                raise Wrong(where, name, "another phase; it cannot need itself")
            if name not in first:
                others = [other for other in first if other != phase.name]
                raise Wrong(where, name, choice(name, others) if others else "no other phase")
        needs[phase.name] = before if phase.needs is None else tuple(dict.fromkeys(phase.needs))
        before = (phase.name,)
    circle = _circle(needs)
    if circle:
        where = f"phases.{first[circle[0]]}.needs"
        raise Wrong(
            where,
            list(needs[circle[0]]),
            f"no circle: {' needs '.join([*circle, circle[0]])}",
        )
    return needs


def in_order(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """The phases, each after those that it needs, else as they stand in the file.

    Raises:
        Wrong: as `needs_of`.
    """
    needs = needs_of(phases)
    waiting, done = list(phases), list[Phase]()
    names: set[str] = set()
    while waiting:
        # There is one: nothing needs itself, not even by way of others.
        ready = next(phase for phase in waiting if names.issuperset(needs[phase.name]))
        waiting.remove(ready)
        done.append(ready)
        names.add(ready.name)
    return tuple(done)


def _circle(needs: dict[str, tuple[str, ...]]) -> list[str]:
    """Names that need each other, each the next one and the last the first; none if there are."""
    left = dict(needs)
    while True:
        free = [name for name, wanted in left.items() if not any(one in left for one in wanted)]
        if not free:
            break
        for name in free:
            del left[name]
    if not left:
        return []
    # What is left needs something that is left: whoever follows that comes back.
    path = [next(iter(left))]
    while True:
        following = next(one for one in left[path[-1]] if one in left)
        if following in path:
            return path[path.index(following) :]
        path.append(following)
