"""Time that a host as busy as any needs to say what its machines do; no test rests on how much."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vmlab.hypervisors.operation import DEFAULT_TIMEOUTS

__all__ = ["patient"]

_SECONDS = 240.0
_READINGS = ("status", "info", "metrics", "snapshots", "console", "channel")


@contextmanager
def patient() -> Iterator[None]:
    """What only asks a hypervisor is not given up after seconds in which all may stand still."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _READINGS:
            patch.setitem(DEFAULT_TIMEOUTS, name, _SECONDS)
        yield
