"""Metrics of past runs, in SQLite: what baselines are made of.

One file for a user, in write-ahead mode (https://www.sqlite.org/wal.html), so that any number of
processes read and write it at once; each change is one transaction. It holds runs that a baseline
names and nothing else: a run goes with the last baseline that has it.

Where it is: `VMLAB_HISTORY`, else `history` in the table `[report]` of the configuration file, else
`history.sqlite` in `VMLAB_HOME` or in the user's data directory.
"""

from __future__ import annotations

import os
import sqlite3
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from vmlab.machine.errors import VmlabError
from vmlab.report.comparison import middle_of
from vmlab.report.difference import MetricKey, measured
from vmlab.report.model import Run
from vmlab.report.parts import Direction
from vmlab.report.write_ahead import write_ahead

__all__ = ["Baseline", "History", "RunSamples", "history_path", "samples_of_run"]

VARIABLE: Final = "VMLAB_HISTORY"
_PATIENCE_S: Final = 60.0
"""How long a writer waits for others; each transaction takes milliseconds."""

_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE runs (
    id TEXT PRIMARY KEY,
    started TEXT NOT NULL,
    tool TEXT NOT NULL,
    outcome TEXT NOT NULL,
    hostname TEXT NOT NULL,
    command TEXT NOT NULL
) STRICT;
CREATE TABLE samples (
    run TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    unit TEXT NOT NULL,
    hypervisor TEXT NOT NULL,
    direction TEXT NOT NULL,
    value REAL NOT NULL
) STRICT;
CREATE INDEX samples_by_run ON samples (run);
CREATE TABLE baselines (name TEXT PRIMARY KEY, created TEXT NOT NULL, note TEXT NOT NULL) STRICT;
CREATE TABLE baseline_runs (
    baseline TEXT NOT NULL REFERENCES baselines (name) ON DELETE CASCADE,
    run TEXT NOT NULL REFERENCES runs (id),
    PRIMARY KEY (baseline, run)
) STRICT;
"""


@dataclass(frozen=True)
class RunSamples:
    """What one run measured: for each metric all its samples, in order."""

    id: str
    outcome: str
    values: Mapping[MetricKey, Sequence[float]]
    directions: Mapping[MetricKey, Direction]

    def median(self, key: MetricKey) -> float | None:
        """The run's own figure for a metric; None if it did not measure it."""
        values = self.values.get(key)
        return middle_of(values) if values else None


@dataclass(frozen=True)
class Baseline:
    """Runs under a name, oldest first."""

    name: str
    created: datetime
    note: str
    runs: tuple[str, ...]


def samples_of_run(run: Run) -> RunSamples:
    """What `run` measured."""
    values: dict[MetricKey, list[float]] = {}
    directions: dict[MetricKey, Direction] = {}
    for key, direction, value in measured(run):
        values.setdefault(key, []).append(value)
        directions[key] = direction
    return RunSamples(run.id, run.outcome.value, values, directions)


def history_path(environment: Mapping[str, str] | None = None) -> Path:
    """Where the history is, by the environment and the configuration file.

    Raises:
        VmlabError: The configuration file cannot be read, or names no path.
    """
    import platformdirs

    environment = os.environ if environment is None else environment
    if named := environment.get(VARIABLE):
        return Path(named)
    configuration = Path(
        environment.get("VMLAB_CONFIG")
        or platformdirs.user_config_path("vmlab", appauthor=False) / "config.toml"
    )
    try:
        table = tomllib.loads(configuration.read_text("utf-8")).get("report", {})
    except FileNotFoundError:
        table = {}
    except (OSError, ValueError) as error:
        raise VmlabError(
            f"cannot read {configuration}: {error}",
            hint="correct it, or name another: VMLAB_CONFIG",
        ) from error
    chosen = table.get("history") if isinstance(table, dict) else table
    if chosen is not None:
        if not isinstance(chosen, str) or not chosen:
            raise VmlabError(
                f"{configuration}: report.history = {chosen!r} is no path",
                hint='write history = "/path/to/history.sqlite" in the table [report]',
            )
        return configuration.parent / Path(chosen).expanduser()
    if home := environment.get("VMLAB_HOME"):
        return Path(home) / "history.sqlite"
    return platformdirs.user_data_path("vmlab", appauthor=False) / "history.sqlite"


class History:
    """The history in a file, which is made if it is not there. A context manager.

    Raises:
        VmlabError: From every method: the file cannot be read or written, or is no history.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = history_path() if path is None else path
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=_PATIENCE_S, isolation_level=None)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        with self._errors():
            write_ahead(self._connection, _PATIENCE_S)
            self._connection.execute("PRAGMA foreign_keys = ON")
        with self._transaction() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _SCHEMA.split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            elif version != _VERSION:
                raise VmlabError(
                    f"{self.path} is a history of version {version}, not {_VERSION}",
                    hint=f"a later vmlab made it: use that, or another file ({VARIABLE})",
                )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise VmlabError(
                f"the history {self.path} cannot be used: {error}",
                hint=f"check the file and its directory, or name another with {VARIABLE}",
            ) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._errors():
            # Immediate: two that read first and write then would refuse each other.
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def save(
        self, name: str, runs: Iterable[Run], *, note: str = "", replace: bool = False
    ) -> Baseline:
        """Keep the metrics of `runs` as baseline `name`.

        Args:
            name: Any line of text.
            runs: At least one; the same run counts once.
            note: For people.
            replace: Whether a baseline of that name goes.

        Raises:
            VmlabError: There is one of that name, there are no runs, or none measured anything.
        """
        if not name or not name.isprintable():
            raise VmlabError(f"{name!r} cannot name a baseline", hint="use one line of text")
        named = {run.id: run for run in runs}
        if not any(samples_of_run(run).values for run in named.values()):
            raise VmlabError(
                f"baseline {name!r} would be empty: none of {len(named)} runs has a metric",
                hint="record metrics in the tests, as vm.record('boot_s', seconds, unit='s')",
            )
        created = datetime.now(UTC)
        with self._transaction() as connection:
            if self._exists(name):
                if not replace:
                    raise VmlabError(
                        f"there is a baseline {name!r} already",
                        hint="choose another name, or replace it with --force",
                    )
                self._remove(name)
            connection.execute(
                "INSERT INTO baselines VALUES (?, ?, ?)", (name, created.isoformat(), note)
            )
            for run in named.values():
                self._add(run)
                connection.execute("INSERT INTO baseline_runs VALUES (?, ?)", (name, run.id))
        return self.baseline(name)

    def _exists(self, name: str) -> bool:
        found = self._connection.execute("SELECT 1 FROM baselines WHERE name = ?", (name,))
        return found.fetchone() is not None

    def _add(self, run: Run) -> None:
        facts = (
            run.id,
            run.started.isoformat(),
            run.tool,
            run.outcome.value,
            str(run.environment.get("hostname", "")),
            run.command_line,
        )
        added = self._connection.execute(
            "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", facts
        )
        if added.rowcount == 0:
            return  # another baseline has it
        self._connection.executemany(
            "INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?)",
            [
                (run.id, key.name, key.unit, key.hypervisor, direction.value, value)
                for key, direction, value in measured(run)
            ],
        )

    def baselines(self) -> list[Baseline]:
        """All of them, by name."""
        with self._errors():
            names = self._connection.execute("SELECT name FROM baselines ORDER BY name").fetchall()
        return [self.baseline(name) for (name,) in names]

    def baseline(self, name: str) -> Baseline:
        """The baseline of that name.

        Raises:
            VmlabError: There is none; those that there are are named.
        """
        with self._errors():
            found = self._connection.execute(
                "SELECT created, note FROM baselines WHERE name = ?", (name,)
            ).fetchone()
            runs = self._connection.execute(
                "SELECT id FROM runs JOIN baseline_runs ON run = id WHERE baseline = ? "
                "ORDER BY started, id",
                (name,),
            ).fetchall()
        if found is None:
            raise self._unknown(name)
        return Baseline(name, datetime.fromisoformat(found[0]), found[1], tuple(r for (r,) in runs))

    def _unknown(self, name: str) -> VmlabError:
        with self._errors():
            rows = self._connection.execute("SELECT name FROM baselines ORDER BY name").fetchall()
        known = ", ".join(repr(other) for (other,) in rows) or "none"
        return VmlabError(
            f"there is no baseline {name!r} in {self.path}",
            hint=f"`vmlab baseline save NAME RUN...` makes one; there are: {known}",
        )

    def samples(self, name: str) -> list[RunSamples]:
        """What each run of a baseline measured, oldest first."""
        return [self._samples(run) for run in self.baseline(name).runs]

    def _samples(self, run: str) -> RunSamples:
        with self._errors():
            (outcome,) = self._connection.execute(
                "SELECT outcome FROM runs WHERE id = ?", (run,)
            ).fetchone()
            rows = self._connection.execute(
                "SELECT name, unit, hypervisor, direction, value FROM samples WHERE run = ? "
                "ORDER BY rowid",
                (run,),
            ).fetchall()
        values: dict[MetricKey, list[float]] = {}
        directions: dict[MetricKey, Direction] = {}
        for metric, unit, hypervisor, direction, value in rows:
            key = MetricKey(metric, unit, hypervisor)
            values.setdefault(key, []).append(value)
            directions[key] = Direction(direction)
        return RunSamples(run, outcome, values, directions)

    def remove(self, name: str) -> None:
        """Remove a baseline, and the runs that no other has.

        Raises:
            VmlabError: There is none of that name.
        """
        with self._transaction():
            if not self._exists(name):
                raise self._unknown(name)
            self._remove(name)

    def _remove(self, name: str) -> None:
        self._connection.execute("DELETE FROM baselines WHERE name = ?", (name,))
        self._connection.execute("DELETE FROM runs WHERE id NOT IN (SELECT run FROM baseline_runs)")

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
