"""The boot timeline and the charts: what they show, in shapes and in words."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from vmlab.machine.metrics import (
    CpuMetrics,
    DiskMetrics,
    MachineMetrics,
    MemoryMetrics,
    NicMetrics,
)
from vmlab.machine.states import MachineState
from vmlab.manager.documents import (
    EventDocument,
    MachineDocument,
    OperationDocument,
    StepDocument,
)
from vmlab.manager.requests import MachinePolicy, Metadata
from vmlab.manager.web import readings
from vmlab.manager.web.boot import booting
from vmlab.manager.web.charts import Line, line_chart
from vmlab.manager.web.readings import Readings, charts_of

T0 = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
MACHINE = MachineDocument(
    id="0" * 32, name="web", state=MachineState.RUNNING, wanted="running", host="simulated",
    hypervisor="simulated", architecture="x86_64", vcpus=1, memory=1, spec={},
    policy=MachinePolicy(), metadata=Metadata(), version=1, created=T0, updated=T0,
)  # fmt: skip


def after(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def step(name: str, state: str, begun: float | None, ended: float | None) -> StepDocument:
    return StepDocument(
        name=name, state=state, text=f"does {name}",
        started=None if begun is None else after(begun),
        ended=None if ended is None else after(ended),
    )  # fmt: skip


def start(*steps: StepDocument, **fields: object) -> OperationDocument:
    told = {
        "id": "1" * 32, "kind": "machine.start", "state": "succeeded", "request": {},
        "created": T0, "started": T0, "ended": after(3), "steps": steps,
    }  # fmt: skip
    return OperationDocument.model_validate(told | fields)


def state(number: int, at: float, to: str, reason: str = "") -> EventDocument:
    return EventDocument(
        id=number, at=after(at), kind="machine.state", data={"state": to, "reason": reason}
    )


def test_a_start_is_drawn_with_its_steps_and_states() -> None:
    steps = (
        step("claim", "done", 0, 1),
        step("boot", "done", 1, 3),
        step("x", "planned", None, None),
    )
    events = [state(9, 2.5, "running"), state(8, 0.5, "starting"), state(7, -5, "stopped")]
    boot = booting(MACHINE, [start(*steps)], events)
    assert boot is not None
    assert boot.words == "It took 3.00 s on 2026-05-04 12:00:00 UTC."
    assert [(row.at, row.what, row.took) for row in boot.rows] == [
        (0, "claim", 1),
        (0.5, "starting", None),
        (1, "boot", 2),
        (2.5, "running", None),
    ]
    drawing = ElementTree.fromstring(boot.drawing)
    assert [text.text for text in drawing.iterfind(".//g/text")] == [
        "claim",
        "boot",
        "starting",
        "running",
    ]


def test_a_start_that_is_under_way_or_failed_says_so() -> None:
    under_way = start(step("boot", "running", 1, None), state="running", ended=None)
    boot = booting(MACHINE, [under_way], [])
    assert boot is not None
    assert boot.words == "web is being started since 2026-05-04 12:00:00 UTC."
    assert 'class="phase pending"' in boot.drawing
    failed = start(step("boot", "failed", 1, 2), state="failed")
    boot = booting(MACHINE, [failed], [state(1, 2, "failed", "no kernel")])
    assert boot is not None
    assert boot.words == "The start of 2026-05-04 12:00:00 UTC failed after 3.00 s."
    assert 'class="phase fail"' in boot.drawing
    assert boot.rows[-1].text == "no kernel"


def test_the_last_start_is_what_counts_and_only_a_start_does() -> None:
    stop = start(kind="machine.stop")
    rest = start(kind="machine.create")
    dry = start(dry_run=True)
    queued = start(state="queued", started=None, ended=None)
    assert booting(MACHINE, [stop, rest, dry], []) is None
    assert booting(MACHINE, [queued], []) is None
    made = start(kind="machine.create", request={"start": True}, ended=after(7))
    boot = booting(MACHINE, [stop, made, start()], [])
    assert boot is not None
    assert "7.00 s" in boot.words


def reading(at: float, cpu: float, resident: int | None = 1 << 20, disk: int = 0, nic: int = 0):
    return MachineMetrics(
        time=at,
        uptime_seconds=at,
        cpu=CpuMetrics(seconds=cpu),
        memory=MemoryMetrics(total_bytes=1 << 26, resident_bytes=resident),
        disks=(DiskMetrics(name="d", read_bytes=disk, written_bytes=0, reads=0, writes=0),),
        nics=(
            NicMetrics(
                name="n", received_bytes=nic, sent_bytes=0, received_packets=0, sent_packets=0
            ),
        ),
    )


def test_counters_are_shown_as_rates() -> None:
    charts = {
        chart.name: chart
        for chart in charts_of(
            [reading(10, 1), reading(12, 2, disk=4096), reading(14, 4, nic=2048)]
        )
    }
    assert charts["processor, % of one vCPU"].last == "100"
    assert charts["memory held"].last == "1.0 MiB"
    assert charts["disks read, per second"].last == "0 B", "it went back: no rate is negative"
    assert charts["network received, per second"].last == "1.0 KiB"
    label = ElementTree.fromstring(charts["processor, % of one vCPU"].drawing).get("aria-label")
    assert label == "processor, % of one vCPU: now 100, from 50 to 100 in 2 s"


def test_one_reading_makes_no_rate_and_what_is_not_measured_no_chart() -> None:
    charts = charts_of([reading(1, 1, resident=None)])
    assert [chart.name for chart in charts] == [
        "processor, % of one vCPU",
        "disks read, per second",
        "disks written, per second",
        "network received, per second",
        "network sent, per second",
    ]
    assert charts[0].last == "needs two readings"
    assert "no readings yet" in charts[0].drawing


def test_a_line_goes_through_its_values_from_zero_up() -> None:
    svg = ElementTree.fromstring(line_chart('<"', Line([0, 1, 2], [0, 10, 5]), str))
    assert svg.get("aria-label") == '<": now 5, from 0 to 10 in 2 s'
    line = svg.find("polyline")
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[1][1] < points[2][1] < points[0][1], "10 is on top, 0 at the bottom"
    assert points[2][1] == pytest.approx((points[0][1] + points[1][1]) / 2)
    flat = line_chart("none", Line([3], [0]), str)
    assert not re.search("nan|inf", flat)


def test_readings_are_kept_for_who_looks_and_begin_anew_with_the_machine() -> None:
    kept_of = Readings()
    assert len(kept_of.add("a", reading(1, 1))) == 1
    assert len(kept_of.add("a", reading(1.1, 1))) == 1, "somebody else looked just now"
    assert len(kept_of.add("a", reading(3, 2))) == 2
    assert len(kept_of.add("a", reading(2, 0))) == 1, "it was started again"
    for number in range(64):
        kept_of.add(f"m{number}", reading(1, 1))
    assert len(kept_of.add("a", reading(9, 1))) == 1, "forgotten: nobody looked"
    for second in range(400):
        kept = kept_of.add("b", reading(second, second))
    assert len(kept) == 180


def test_a_hypervisor_that_does_not_answer_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "_ASK_SECONDS", 0.001)

    async def machine(key: str) -> Any:
        async def metrics(*, timeout: float) -> None:
            await asyncio.Event().wait()

        return SimpleNamespace(metrics=metrics)

    async def machine_id(key: str) -> str:
        return key

    service = SimpleNamespace(machine=machine, machine_id=machine_id)
    state = SimpleNamespace(service=service)
    visit: Any = SimpleNamespace(
        path=lambda name: "web",
        request=SimpleNamespace(app=SimpleNamespace(state=state)),
        part=lambda name, **told: told,
    )
    pages: Any = SimpleNamespace(get=lambda path, handler: handler)
    (charts,) = readings.routes(pages)
    told = asyncio.run(charts(visit))
    assert "does not answer" in told["error"].message
    assert told["charts"] == []
