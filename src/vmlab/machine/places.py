"""Where in the user's directories vmlab keeps what outlives a run, when nobody says where.

Not where anything is now: nothing is looked at or made here. The directories are the XDG Base
Directory Specification's, as platformdirs has them; light, for it is asked in every process.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["reports_directory"]


def reports_directory() -> Path:
    """The directory that runs' directories are in, each with its report."""
    from platformdirs import user_state_path

    return user_state_path("vmlab", appauthor=False) / "reports"
