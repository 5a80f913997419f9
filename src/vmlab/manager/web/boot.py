"""The boot timeline of a machine: the steps of its last start and the states that it went through.

Drawn as the report draws a test's: `vmlab.report.drawing.timeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from markupsafe import Markup

from vmlab.manager.documents import (
    ENDED,
    EventDocument,
    MachineDocument,
    OperationDocument,
    StepDocument,
)
from vmlab.report.drawing import timeline
from vmlab.report.model import Attempt, MachineRecord, Mark, Outcome, Phase

__all__ = ["Booting", "Row", "booting"]

_STARTS: Final = ("machine.start", "machine.restart", "machine.create", "machine.clone")
_OUTCOMES: Final = {
    "running": Outcome.PENDING,
    "failed": Outcome.FAIL,
    "undone": Outcome.FAIL,
    "skipped": Outcome.SKIP,
}


@dataclass(frozen=True, slots=True)
class Row:
    """Something that happened: seconds after the start was begun, how long it took, in words."""

    at: float
    what: str
    took: float | None
    text: str


@dataclass(frozen=True, slots=True)
class Booting:
    """The timeline, drawn and in words."""

    words: str
    drawing: Markup
    rows: list[Row]


def booting(
    machine: MachineDocument,
    operations: Sequence[OperationDocument],
    events: Sequence[EventDocument],
) -> Booting | None:
    """How the machine was started last; None if it never was, or if that is long forgotten.

    Args:
        machine: The machine.
        operations: Of it, the newest first.
        events: Of it, in any order.
    """
    start = next((one for one in operations if _started(one)), None)
    if start is None or start.started is None:
        return None
    begun, ended = start.started, start.ended
    steps = [step for step in start.steps if step.started is not None]
    changes = sorted(
        (
            event
            for event in events
            if event.kind == "machine.state"
            and begun <= event.at
            and (ended is None or event.at <= ended)
        ),
        key=lambda event: event.id,
    )
    rows = [
        Row(_after(begun, step.started), step.name, _took(step), step.text)
        for step in steps
        if step.started is not None
    ]
    rows += [
        Row(_after(begun, change.at), str(change.data.get("state", "")), None, _why(change))
        for change in changes
    ]
    took = None if ended is None else _after(begun, ended)
    return Booting(
        words=_words(machine, start, took),
        drawing=Markup(timeline(_attempt(machine, begun, took, steps, changes))),
        rows=sorted(rows, key=lambda row: row.at),
    )


def _started(operation: OperationDocument) -> bool:
    if operation.dry_run or operation.kind not in _STARTS:
        return False
    return operation.kind in _STARTS[:2] or bool(operation.request.get("start"))


def _words(machine: MachineDocument, start: OperationDocument, took: float | None) -> str:
    when = f"{start.created:%Y-%m-%d %H:%M:%S} UTC"
    if start.state not in ENDED or took is None:
        return f"{machine.name} is being started since {when}."
    if start.state == "succeeded":
        return f"It took {took:.2f} s on {when}."
    return f"The start of {when} {start.state} after {took:.2f} s."


def _after(begun: datetime, moment: datetime | None) -> float:
    return 0.0 if moment is None else max(0.0, (moment - begun).total_seconds())


def _took(step: StepDocument) -> float | None:
    return None if step.ended is None else _after(step.started or step.ended, step.ended)


def _why(change: EventDocument) -> str:
    return str(change.data.get("reason", ""))


def _attempt(
    machine: MachineDocument,
    begun: datetime,
    took: float | None,
    steps: Sequence[StepDocument],
    changes: Sequence[EventDocument],
) -> Attempt:
    """The start as an attempt at it, which is what the report draws."""
    return Attempt(
        outcome=Outcome.PENDING if took is None else Outcome.PASS,
        duration_s=took,
        phases=tuple(
            Phase(
                name=step.name,
                outcome=_OUTCOMES.get(step.state, Outcome.PASS),
                started_s=_after(begun, step.started),
                duration_s=_took(step),
                message=step.text,
            )
            for step in steps
        ),
        machines=(
            MachineRecord(
                name=machine.name,
                hypervisor=machine.hypervisor,
                timeline=tuple(
                    Mark(
                        at_s=_after(begun, change.at),
                        kind=str(change.data.get("state", "state")),
                        text=_why(change),
                    )
                    for change in changes
                ),
            ),
        ),
    )
