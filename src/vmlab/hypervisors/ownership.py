"""Who a machine belongs to, and where its files are.

A run's machines die with the process that made them; a store's outlive it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Owner:
    """A run or a store: its kind, its id, and the directory that holds its machines' files."""

    kind: Literal["run", "store"]
    id: str
    directory: Path

    def __str__(self) -> str:
        return f"{self.kind}:{self.id}"
