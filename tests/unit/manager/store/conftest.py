"""An empty store in SQLite, and what is often put into one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vmlab.hypervisors.ownership import Home
from vmlab.manager.settings import Settings
from vmlab.manager.store.database import Database


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a manager with a home of its own."""
    return Settings(home=Home.open(tmp_path / "home"))


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    """An open store that is empty."""
    database = Database.open(settings)
    yield database
    database.close()
