"""The checks: pure functions over what is known and what was seen, one for each code of a finding.

None of them looks at anything, so each is tested without a machine, a process or a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vmlab.manager.observer.checks import disks, guests, locks, machines, networks
from vmlab.manager.observer.difference import Difference
from vmlab.manager.observer.known import Known
from vmlab.manager.observer.seen import Seen

__all__ = ["Thresholds", "differences"]

_GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Thresholds:
    """From where on something is worth telling.

    Attributes:
        free_share: Share of a file system that should be free.
        free_bytes: Bytes that are enough, however large it is.
        drift: Seconds that a guest's clock may be off.
    """

    free_share: float = 0.1
    free_bytes: int = 10 * _GIB
    drift: float = 5.0


def differences(
    known: Known, seen: Seen, thresholds: Thresholds | None = None
) -> Iterator[Difference]:
    """All differences between what is known and what was seen, but those that are under way."""
    limits = thresholds or Thresholds()
    for difference in _all(known, seen, limits):
        if not difference.touches & known.busy:
            yield difference


def _all(known: Known, seen: Seen, limits: Thresholds) -> Iterator[Difference]:
    yield from machines.state_mismatch(known, seen)
    yield from machines.orphan_machine(known, seen)
    yield from machines.orphan_process(known, seen)
    yield from disks.missing_disk(known, seen)
    yield from disks.orphan_disk(known, seen)
    yield from disks.attachment_mismatch(known, seen)
    yield from disks.size_mismatch(known, seen)
    yield from networks.address_conflict(known, seen)
    yield from networks.leaked_address(known, seen)
    yield from networks.lost_interface(known, seen)
    yield from locks.stale_lock(known, seen)
    yield from guests.agent_unreachable(known, seen)
    yield from guests.clock_drift(known, seen, tolerance=limits.drift)
    yield from disks.storage_low(seen, share=limits.free_share, least=limits.free_bytes)
