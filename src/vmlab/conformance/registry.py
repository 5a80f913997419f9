"""The checks of the suite: each a sentence of the contract and the coroutine that proves it.

A check is registered by `@check` in a module of `vmlab.conformance.checks`; importing that package
registers them all. What holds after every check, whatever it did, is an audit (`audits`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING

from vmlab.machine.capabilities import Capability

if TYPE_CHECKING:
    from vmlab.conformance.bench import Bench

CheckFunction = Callable[["Bench"], Awaitable[None]]


class Means(Enum):
    """What a check needs beside capabilities; a profile gives it or says why not."""

    GUEST = "the guest's own view (the profile has no probe)"
    CORRUPT = "a way to damage a snapshot (the profile has none)"
    CRASH = "a way to crash a machine from outside (neither the fault `kill` nor a process)"
    ECHO = "a guest that echoes a channel (the profile names none)"


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its id ("snapshot.memory-returns"), its clause of the contract, its needs."""

    id: str
    clause: str
    function: CheckFunction
    needs: tuple[Capability, ...] = ()
    means: tuple[Means, ...] = ()

    @property
    def topic(self) -> str:
        """The part of the id before the dot."""
        return self.id.partition(".")[0]


_checks: dict[str, Check] = {}


def check(
    id_: str,
    *,
    clause: str,
    needs: Iterable[Capability] = (),
    means: Iterable[Means] = (),
) -> Callable[[CheckFunction], CheckFunction]:
    """Register a coroutine function as a check.

    Args:
        id_: Topic, a dot, and what is checked.
        clause: One sentence of the contract, which the check proves.
        needs: Capabilities without which it is skipped.
        means: What else it needs.
    """

    def register(function: CheckFunction) -> CheckFunction:
        if id_ in _checks:
            raise ValueError(f"two checks have the id {id_!r}")
        _checks[id_] = Check(id_, clause, function, tuple(needs), tuple(means))
        return function

    return register


def checks() -> Mapping[str, Check]:
    """All checks by id, sorted."""
    from vmlab.conformance import checks as package

    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"{package.__name__}.{module}")
    return MappingProxyType(dict(sorted(_checks.items())))


def select(patterns: Iterable[str]) -> list[Check]:
    """The checks whose id matches one of the shell patterns; all of them without patterns."""
    wanted = list(patterns)
    return [
        found
        for found in checks().values()
        if not wanted or any(fnmatchcase(found.id, pattern) for pattern in wanted)
    ]
