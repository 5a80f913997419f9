"""Metrics with their units, events with their data, and what importing the nouns costs."""

from __future__ import annotations

import subprocess
import sys
from types import UnionType
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from vmlab.machine.events import Event, EventType
from vmlab.machine.metrics import UNITS, CpuMetrics, MachineMetrics, MemoryMetrics


def measured(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The names of everything that a model measures."""
    found = []
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if get_origin(kind) is tuple:
            kind = get_args(kind)[0]
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += measured(kind, f"{prefix}{name}.")
        elif kind is not str and (prefix or name != "time"):
            assert isinstance(kind, type | UnionType)
            found.append(prefix + name)
    return found


def test_every_metric_has_a_kind_and_a_unit() -> None:
    assert sorted(UNITS) == sorted(measured(MachineMetrics))
    for name, (_, unit) in UNITS.items():
        assert ("bytes" in name) == (unit == "By")
        assert ("seconds" in name) == (unit == "s")


def test_metrics_cannot_be_negative() -> None:
    with pytest.raises(ValidationError):
        CpuMetrics(seconds=-1)
    with pytest.raises(ValidationError):
        MemoryMetrics(total_bytes=-1)


def test_an_event_is_the_same_in_another_process() -> None:
    event = Event(
        sequence=1,
        time=2.5,
        type=EventType.STATE,
        hypervisor="h",
        machine="i",
        name="a",
        operation="start-1",
        data={"from": "created", "to": "starting", "reason": ""},
    )
    assert Event.model_validate_json(event.model_dump_json()) == event
    with pytest.raises(ValidationError):
        event.sequence = 2  # that it is refused is the test


def test_errors_and_states_import_no_pydantic() -> None:
    program = (
        "import sys, vmlab.machine.errors, vmlab.machine.states\n"
        "sys.exit('pydantic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
