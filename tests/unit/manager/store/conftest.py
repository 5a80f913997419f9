"""An empty store in SQLite, and what is often put into one."""

from __future__ import annotations

import shutil
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


@pytest.fixture(scope="session")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that is made once, to be copied."""
    settings = Settings(home=Home.open(tmp_path_factory.mktemp("blank")))
    Database.open(settings).close()
    return settings.directory / "manager.sqlite3"


@pytest.fixture
def database(settings: Settings, blank: Path) -> Iterator[Database]:
    """An open store that is empty."""
    shutil.copyfile(blank, settings.directory / blank.name)
    database = Database.open(settings)
    yield database
    database.close()
