"""Results: the model, the journal that survives a crash, and the writers.

The public face; what is not named here is private to the package. `Recorder` writes results as
they happen, `read_run` reads a run back, `write` renders it, `schema` is the published format.
"""

from __future__ import annotations

from vmlab.report.attempt import AttemptRecorder
from vmlab.report.durable import Sync, write_atomically
from vmlab.report.escape import escape_controls
from vmlab.report.host import host_facts
from vmlab.report.journal_writer import Clock
from vmlab.report.json_report import parse, read_run
from vmlab.report.model import (
    SCHEMA,
    Artifact,
    Attempt,
    Check,
    Direction,
    FaultRecord,
    MachineRecord,
    Mark,
    Message,
    Metric,
    Outcome,
    Output,
    Phase,
    Run,
    Severity,
    Suite,
    Test,
    Totals,
    schema,
)
from vmlab.report.recorder import Recorder
from vmlab.report.text import show
from vmlab.report.writers import Writer, find_writer, write, writers

__all__ = [
    # the model
    "SCHEMA",
    "Artifact",
    "Attempt",
    "Check",
    "Direction",
    "FaultRecord",
    "MachineRecord",
    "Mark",
    "Message",
    "Metric",
    "Outcome",
    "Output",
    "Phase",
    "Run",
    "Severity",
    "Suite",
    "Test",
    "Totals",
    "schema",
    # recording and reading
    "AttemptRecorder",
    "Clock",
    "Recorder",
    "Sync",
    "host_facts",
    "parse",
    "read_run",
    # writing
    "Writer",
    "escape_controls",
    "find_writer",
    "show",
    "write",
    "write_atomically",
    "writers",
]
