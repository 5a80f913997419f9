"""A writer that is killed at any moment: what was committed is there, and nothing half."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from vmlab.manager.settings import Settings
from vmlab.manager.store import queries
from vmlab.manager.store.database import Database
from vmlab.manager.store.tables import DiskRow, EventRow, MachineRow

_ROUNDS = 10


def agrees_with_itself(s: Session) -> int:
    """Whether the store is as some transaction of `writer.step` left it; returns which one."""
    machines = {row.id: row.name for row in s.scalars(select(MachineRow))}
    if not machines:
        return 0  # killed before its first transaction
    counter = queries.find_machine(s, "counter")
    steps = int(counter.labels["count"])
    assert counter.version == steps + 1
    # The rows themselves: a writer that nobody stops for a while makes more than a page has.
    disks = {disk.name[1:]: machines.get(disk.machine_id) for disk in s.scalars(select(DiskRow))}
    assert {name[1:]: name for name in machines.values() if name != "counter"} == disks
    events = s.scalars(select(EventRow).order_by(EventRow.id)).all()
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    made = {event.subject for event in events if event.kind == "machine.created"}
    deleted = {event.subject for event in events if event.kind == "machine.deleted"}
    assert made - deleted == set(machines)
    assert len(made) == steps + 1
    return steps


@pytest.fixture
def nursery(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """A process that forks writers to that store."""
    arguments = [str(settings.home.directory)]
    if settings.database_url is not None:
        arguments.append(settings.database_url)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.manager.store.writer", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[4],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    with process:
        try:
            yield process
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(timeout=240) == 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its writer, too


def test_what_a_killed_writer_has_acknowledged_is_there(
    settings: Settings, nursery: subprocess.Popen[str]
) -> None:
    assert nursery.stdin is not None and nursery.stdout is not None
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    acknowledged = 0
    for turn in range(_ROUNDS):
        nursery.stdin.write("go\n")
        nursery.stdin.flush()
        writer = int(nursery.stdout.readline())
        if turn % 5:
            for _ in range(chance.randrange(1, 12)):
                acknowledged = int(nursery.stdout.readline())
        # And somewhere within the next one; in every fifth turn, while the store is opened.
        time.sleep(chance.uniform(0, 0.004 if turn % 5 else 0.15))
        os.kill(writer, signal.SIGKILL)
        while (line := nursery.stdout.readline()) != "dead\n":
            acknowledged = int(line)
        database = Database.open(settings)
        try:
            there = database.read_now(agrees_with_itself)
        finally:
            database.close()
        # One more may be there that was committed and could not be acknowledged any more.
        assert acknowledged <= there <= acknowledged + 1, f"turn {turn} of seed {seed}"
        acknowledged = there
