"""What machines use, read while somebody looks: kept for some minutes, and drawn as charts.

Programs read `/metrics`; this is for a page, which asks again every few seconds. Counters are shown
as rates between two readings.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from markupsafe import Markup
from starlette.responses import Response
from starlette.routing import BaseRoute

from vmlab.machine.errors import OperationFailed, VmlabError
from vmlab.machine.metrics import MachineMetrics
from vmlab.machine.sizes import rounded_size
from vmlab.manager.web.charts import Line, line_chart
from vmlab.manager.web.visit import Pages, Visit
from vmlab.report.drawing import number

if TYPE_CHECKING:
    from vmlab.manager.api.service import Service

__all__ = ["Readings", "routes"]

_KEPT: Final = 180
_MACHINES: Final = 64
"""Machines whose readings are kept: those that were looked at last."""
_ASK_SECONDS: Final = 10.0
_APART_SECONDS: Final = 0.5
"""Two people who look at the same machine do not make two readings."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One figure over time."""

    name: str
    last: str
    drawing: Markup


class Readings:
    """The last readings of the machines that somebody looks at."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[MachineMetrics]] = OrderedDict()

    def add(self, machine: str, reading: MachineMetrics) -> list[MachineMetrics]:
        """Keep a reading; returns those since the machine was started, the oldest first."""
        kept = self._of.setdefault(machine, deque(maxlen=_KEPT))
        self._of.move_to_end(machine)
        while len(self._of) > _MACHINES:
            self._of.popitem(last=False)
        if kept and reading.uptime_seconds < kept[-1].uptime_seconds:
            kept.clear()
        if not kept or reading.time - kept[-1].time >= _APART_SECONDS:
            kept.append(reading)
        return list(kept)


def routes(pages: Pages) -> list[BaseRoute]:
    """The route of the charts."""
    readings = Readings()

    async def charts(visit: Visit) -> Response:
        service: Service = visit.request.app.state.service
        key = await service.machine_id(visit.path("machine"))
        try:
            machine = await service.machine(key)
            async with asyncio.timeout(2 * _ASK_SECONDS):
                found = await machine.metrics(timeout=_ASK_SECONDS)
        except VmlabError as error:
            # It may just have stopped; the next look tells.
            return visit.part("metrics", error=error, charts=[], uptime=0.0)
        except TimeoutError:
            silent = OperationFailed("its hypervisor does not answer", hint="it is asked again")
            return visit.part("metrics", error=silent, charts=[], uptime=0.0)
        return visit.part(
            "metrics",
            error=None,
            charts=charts_of(readings.add(key, found)),
            uptime=found.uptime_seconds,
        )

    return [pages.get("/machines/{machine}/metrics", charts)]


def charts_of(readings: list[MachineMetrics]) -> list[Chart]:
    """The charts of some readings of one machine, the oldest first; at least one reading."""
    newest = readings[-1]
    begun = readings[0].time
    times = [reading.time - begun for reading in readings]
    rates = times[1:]

    def rate(values: list[float]) -> list[float]:
        spans = [later - earlier for earlier, later in pairwise(times)]
        return [
            max(0.0, after - before) / span
            for (before, after), span in zip(pairwise(values), spans, strict=True)
        ]

    def drawn(name: str, times: list[float], values: list[float], *, bytes_: bool) -> Chart:
        def words(value: float) -> str:
            return rounded_size(value) if bytes_ else number(round(value, 2))

        line = Line(times, values)
        last = words(values[-1]) if values else "needs two readings"
        return Chart(name, last, Markup(line_chart(name, line, words)))

    processor = [100 * used for used in rate([reading.cpu.seconds for reading in readings])]
    charts = [drawn("processor, % of one vCPU", rates, processor, bytes_=False)]
    resident = [(t, r.memory.resident_bytes) for t, r in zip(times, readings, strict=True)]
    held = [(t, float(amount)) for t, amount in resident if amount is not None]
    if held:
        charts.append(drawn("memory held", [t for t, _ in held], [v for _, v in held], bytes_=True))
    if newest.disks:
        for name, field in (
            ("disks read, per second", "read_bytes"),
            ("disks written, per second", "written_bytes"),
        ):
            sums = [float(sum(getattr(d, field) for d in r.disks)) for r in readings]
            charts.append(drawn(name, rates, rate(sums), bytes_=True))
    if newest.nics:
        for name, field in (
            ("network received, per second", "received_bytes"),
            ("network sent, per second", "sent_bytes"),
        ):
            sums = [float(sum(getattr(n, field) for n in r.nics)) for r in readings]
            charts.append(drawn(name, rates, rate(sums), bytes_=True))
    return charts
