"""Stores in both databases: SQLite's file, and a PostgreSQL server of the tests' own."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.integration.ordinary_user import NOBODY

from vmlab.hypervisors.ownership import Home
from vmlab.manager.settings import Settings
from vmlab.manager.store.database import Database

_numbers = itertools.count()


def postgres_program(name: str) -> str:
    """A program of the server's, of the newest version that is installed."""
    # Debian has them beside each other, by version, and not where programs are looked for.
    found = sorted(
        Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4])
    )
    if found:
        return str(found[-1])
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"needs {name}: Debian's package postgresql")
    return program


class PostgresServer:
    """A server that is reached by a socket in its own directory, and runs as an ordinary user."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # initdb and postgres refuse to be root's.
        self._as_user = []
        if os.geteuid() == 0:
            os.chown(directory, NOBODY, NOBODY)
            self._as_user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        data = str(directory / "data")
        environment = {**os.environ, "LC_ALL": "C", "HOME": str(directory)}
        options = ["--username=vmlab", "--auth=trust", "--encoding=UTF8", "--no-sync"]
        subprocess.run(
            [*self._as_user, postgres_program("initdb"), *options, data],
            check=True,
            capture_output=True,
            cwd=directory,
            env=environment,
            timeout=300,
        )
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(directory),
            "fsync": "off",
            "shared_buffers": "16MB",
        }
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        self._process = subprocess.Popen(
            [*self._as_user, postgres_program("postgres"), "-D", data, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            cwd=directory,
            env=environment,
        )
        self._said: list[str] = []
        ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=[ready])
        self._reader.start()
        assert ready.wait(timeout=240), "".join(self._said)
        assert self._process.poll() is None, "".join(self._said)

    def _read(self, ready: threading.Event) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line)
            if "ready to accept connections" in line:
                ready.set()
        ready.set()

    def new_database(self) -> str:
        """The address of an empty schema, which is a database of its own to who is given it."""
        import psycopg

        address = f"postgresql://vmlab@/postgres?host={self.directory}"
        # A new database would be eight megabytes to be copied, and to be removed.
        name = f"t{next(_numbers)}"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return f"{address}&options=-csearch_path%3D{name}"

    def close(self) -> None:
        """Stop it, and wait until it is gone."""
        self._process.send_signal(signal.SIGINT)  # "fast shutdown": postgres(1)
        self._process.wait(timeout=240)
        self._reader.join(timeout=60)
        assert self._process.stderr is not None
        self._process.stderr.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server for all tests."""
    directory = Path(tempfile.mkdtemp(prefix="vmlab-pg-"))
    try:
        server = PostgresServer(directory)
        try:
            yield server
        finally:
            server.close()
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest) -> Callable[[], str | None]:
    """Makes addresses of empty databases: of one kind, then of the other."""
    if request.param == "sqlite":
        return lambda: None  # the file in the home
    new_database: Callable[[], str] = request.getfixturevalue("postgres").new_database
    return new_database


@pytest.fixture
def settings(new_url: Callable[[], str | None], tmp_path: Path) -> Settings:
    """Settings of a manager with a home and a database of its own, once of each kind."""
    return Settings(home=Home.open(tmp_path / "home"), database_url=new_url())


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    """An open store that is empty."""
    database = Database.open(settings)
    yield database
    database.close()
