"""The processes that belong to the manager's store, by their records and by their environment.

A store's name is the same in every home; a process is this one's if it is recorded here, or if its
command line leads into this home. proc(5).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import psutil

from vmlab.hypervisors.leftovers import marked
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.process_identity import ProcessIdentity
from vmlab.hypervisors.processes import MACHINE_VARIABLE, STORE_VARIABLE, recorded
from vmlab.manager.observer.collect.networks import network_directories
from vmlab.manager.observer.seen import SeenProcess

__all__ = ["processes_of"]

_NETWORK: Final = re.compile(r"/networks/([0-9a-f]{32})(?:/|\b)")


def processes_of(owners: Sequence[Owner], directory: Path) -> list[SeenProcess]:
    """The living processes of stores' machines and networks; reads files, so for a thread.

    Args:
        owners: The stores.
        directory: Where the manager keeps what is its own.
    """
    found: dict[ProcessIdentity, _What] = {}
    for owner in owners:
        for record in recorded(owner.directory):
            if record.alive:
                found[record.identity] = _What(record.argv, machine=record.machine)
    for network in network_directories(directory):
        for record in recorded(network):
            if record.alive:
                found[record.identity] = _What(record.argv, network=network.name)
    places = [directory, *(owner.directory for owner in owners)]
    places += [owner.runtime for owner in owners if owner.runtime is not None]
    ours = [str(path) for path in places]
    for identity, variables in marked():
        if STORE_VARIABLE not in variables or identity in found:
            continue
        argv = _argv(identity.pid)
        if any(path in word for word in argv for path in ours):
            network_id = _network_of(argv, str(directory))
            found[identity] = _What(argv, variables.get(MACHINE_VARIABLE), network_id)
    booted = psutil.boot_time()
    return [
        SeenProcess(
            pid=identity.pid,
            start=identity.start,
            began=_began(identity, booted),
            argv=what.argv,
            machine=what.machine,
            network=what.network,
        )
        for identity, what in sorted(found.items(), key=lambda one: one[0].pid)
        if identity.pid != os.getpid()
    ]


@dataclass(frozen=True, slots=True)
class _What:
    """What a process is for."""

    argv: tuple[str, ...]
    machine: str | None = None
    network: str | None = None


def _argv(pid: int) -> tuple[str, ...]:
    """The command line of a process; empty where it has ended or cannot be read."""
    try:
        data = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(word.decode("utf-8", "replace") for word in data.split(b"\0") if word)


def _began(identity: ProcessIdentity, booted: float) -> datetime:
    if Path("/proc/self/stat").exists():
        seconds = booted + identity.start / os.sysconf("SC_CLK_TCK")
    else:
        seconds = identity.start / 100
    return datetime.fromtimestamp(min(seconds, time.time()), UTC)


def _network_of(argv: tuple[str, ...], directory: str) -> str | None:
    """The network that a process works for, by the files that it was started with."""
    for word in argv:
        if directory in word and (match := _NETWORK.search(word)):
            return match[1]
    return None
