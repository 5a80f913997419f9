"""What soak tests measure is kept where VMLAB_RESULTS names a directory, as `make soak` does."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["kept", "note", "write"]

# Read before the tests get an environment of their own.
_RESULTS = os.environ.get("VMLAB_RESULTS")


def kept() -> bool:
    """Whether anybody wants figures."""
    return bool(_RESULTS)


def write(file: str, figures: Mapping[str, Any], indent: int = 1) -> None:
    """Keep these figures as the file of that name, if anybody wants them."""
    if _RESULTS:
        path = Path(_RESULTS) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=indent) + "\n", encoding="utf-8")


def note(file: str, title: str, figures: Mapping[str, Any]) -> None:
    """Keep these figures, with their date, beside others in the file of that name."""
    if _RESULTS:
        path = Path(_RESULTS) / file
        known = json.loads(path.read_text("utf-8")) if path.exists() else {}
        today = time.strftime("%Y-%m-%d", time.gmtime())
        write(file, known | {title: {"date": today, **figures}})
