"""Where a run's report goes, and its seed: chosen before anything of the run is imported.

Each run has a directory of its own, so that runs do not collide and none overwrites another's.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vmlab.machine.places import reports_directory

if TYPE_CHECKING:
    from vmlab.pytest_plugin.options import Settings


def new_directory(settings: Settings) -> Path:
    """A directory for a run, which is not there yet; its name sorts by time."""
    now = datetime.now(UTC)
    place = settings.report or reports_directory()
    return place / f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


def new_seed(settings: Settings) -> int:
    """The run's seed: what was asked for, or a number that can be typed again."""
    return settings.seed if settings.seed is not None else secrets.randbelow(1 << 32)
