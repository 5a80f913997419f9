"""Which hypervisors there are: the entry points of the group `vmlab.hypervisors`.

Listing imports none of them. One that cannot be imported is listed with the reason and harms no
other; so is one whose probe fails or does not answer.
"""

from __future__ import annotations

import difflib
import threading
import time
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from vmlab.hypervisors.base import HypervisorProvider, Probe
from vmlab.machine.errors import HypervisorUnavailable

__all__ = ["GROUP", "names", "probe_all", "provider"]

GROUP: Final = "vmlab.hypervisors"
"""The group of entry points; the value of each names a `HypervisorProvider`, not its class."""


def _registered() -> dict[str, list[EntryPoint]]:
    """The entry points by name; several where packages disagree about what a name means."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        # The same distribution may be on the path twice: installed, and as a source tree.
        found.setdefault(entry.name, {})[entry.value] = entry
    return {name: list(found[name].values()) for name in sorted(found)}


def names() -> list[str]:
    """The names of all hypervisors that are registered, whether they work or not."""
    return list(_registered())


def provider(name: str) -> HypervisorProvider:
    """The hypervisor of that name, imported now.

    Raises:
        HypervisorUnavailable: there is none of that name, or it cannot be imported.
    """
    registered = _registered()
    if name not in registered:
        close = difflib.get_close_matches(name, registered, n=1)
        raise HypervisorUnavailable(
            f"there is no hypervisor {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
            hint=f"there are {', '.join(registered)}; `vmlab hypervisors` tells what works here"
            if registered
            else "vmlab is not installed properly: install it again",
            hypervisor=name,
        )
    return _load(name, registered[name])


def _load(name: str, entries: list[EntryPoint]) -> HypervisorProvider:
    if len(entries) > 1:
        values = " and ".join(
            f"{entry.value} ({entry.dist.name if entry.dist else 'unknown package'})"
            for entry in entries
        )
        raise HypervisorUnavailable(
            f"hypervisor {name!r} is registered as {values}",
            hint="uninstall one of the packages",
            hypervisor=name,
        )
    entry = entries[0]
    package = entry.dist.name if entry.dist else "its package"
    try:
        loaded = entry.load()
    except Exception as error:
        raise HypervisorUnavailable(
            f"hypervisor {name!r} cannot be imported: {type(error).__name__}: {error}",
            hint=f"install {package} again, with what it needs",
            hypervisor=name,
        ) from error
    if not isinstance(loaded, HypervisorProvider):
        raise HypervisorUnavailable(
            f"hypervisor {name!r}: {entry.value} is {loaded!r}, and no HypervisorProvider",
            hint=f"this is a mistake in {package}: the entry point has to name an object",
            hypervisor=name,
        )
    return loaded


def probe_all(timeout: float = 60.0, only: Iterable[str] | None = None) -> list[Probe]:
    """What works here of each hypervisor, by name; they are asked all at once.

    One that does not answer within `timeout` seconds is reported as such, and left to itself.

    Args:
        timeout: Seconds for all of them together.
        only: Names of those that are asked; None is all.

    Raises:
        HypervisorUnavailable: `only` has a name that does not exist.
    """
    registered = _registered()
    chosen = list(registered) if only is None else list(only)
    for name in chosen:
        if name not in registered:
            provider(name)  # raises, with the name that was meant
    answers: dict[str, Probe] = {}

    def ask(name: str) -> Callable[[], None]:
        def work() -> None:
            answers[name] = _probe(name, registered[name])

        return work

    # Daemons: one that hangs must not keep the process from ending.
    threads = [threading.Thread(target=ask(name), daemon=True) for name in chosen]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = f"its probe did not answer within {timeout:g} s"
    return [
        answers.get(name) or Probe(hypervisor=name, available=False, reason=late) for name in chosen
    ]


def _probe(name: str, entries: list[EntryPoint]) -> Probe:
    """The hypervisor's own answer, or why it gave none."""
    try:
        return _load(name, entries).probe()
    except HypervisorUnavailable as error:
        return Probe(hypervisor=name, available=False, reason=error.message, hint=error.hint)
    except Exception as error:
        # Anybody's package, and the others' answers are wanted all the same.
        reason = f"its probe failed: {type(error).__name__}: {error}"
        return Probe(hypervisor=name, available=False, reason=reason)
