"""A store with machines on networks, and the networks of a manager that has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vmlab.hypervisors.ownership import Home
from vmlab.manager.networks.networks import Networks
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


@pytest.fixture
def networks(settings: Settings, database: Database) -> Networks:
    """The networks of a manager; nothing of them is on the host."""
    return Networks(settings, database)
