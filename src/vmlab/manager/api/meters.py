"""What Prometheus reads at `/metrics`: requests as they were answered, and the store as it is.

Names follow the Prometheus conventions (base units, `_total` for counters). The store is counted by
the database when it is asked, so that no number here can drift from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from vmlab.machine.states import LIVE
from vmlab.manager.store.queries import crowds
from vmlab.manager.store.tables import (
    AddressRow,
    DiskRow,
    EventRow,
    FindingRow,
    HostRow,
    NetworkRow,
    OperationRow,
)

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["Counts", "Meters", "count"]

_BREAKER = {"closed": 0, "half-open": 1, "open": 2}


@dataclass(slots=True)
class Counts:
    """How many of everything the store has."""

    machines: dict[tuple[str, str], int] = field(default_factory=dict)
    vcpus: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    disks: dict[str, int] = field(default_factory=dict)
    disk_bytes: int = 0
    addresses: dict[str, int] = field(default_factory=dict)
    operations: dict[tuple[str, str], int] = field(default_factory=dict)
    findings: dict[tuple[str, str], int] = field(default_factory=dict)
    breakers: dict[str, str] = field(default_factory=dict)
    available: dict[str, bool] = field(default_factory=dict)
    latest_event: int = 0


def count(session: Session) -> Counts:
    """Count everything, in one transaction."""
    counts = Counts()
    for crowd in crowds(session):
        counts.machines[crowd.host, crowd.state.value] = crowd.machines
        if crowd.state in LIVE:
            counts.vcpus[crowd.host] = counts.vcpus.get(crowd.host, 0) + crowd.vcpus
            counts.memory[crowd.host] = counts.memory.get(crowd.host, 0) + crowd.memory
    for state, number, size in session.execute(
        select(DiskRow.state, func.count(), func.sum(DiskRow.size)).group_by(DiskRow.state)
    ):
        counts.disks[state] = number
        counts.disk_bytes += int(size)
    for name, number in session.execute(
        select(NetworkRow.name, func.count(AddressRow.id))
        .outerjoin(AddressRow, AddressRow.network_id == NetworkRow.id)
        .group_by(NetworkRow.name)
    ):
        counts.addresses[name] = number
    for kind, state, number in session.execute(
        select(OperationRow.kind, OperationRow.state, func.count()).group_by(
            OperationRow.kind, OperationRow.state
        )
    ):
        counts.operations[kind, state] = number
    for code, severity, number in session.execute(
        select(FindingRow.code, FindingRow.severity, func.count())
        .where(FindingRow.resolved.is_(None))
        .group_by(FindingRow.code, FindingRow.severity)
    ):
        counts.findings[code, severity] = number
    for name, breaker, available in session.execute(
        select(HostRow.name, HostRow.breaker, HostRow.available)
    ):
        counts.breakers[name] = breaker
        counts.available[name] = available
    counts.latest_event = session.scalar(select(func.max(EventRow.id))) or 0
    return counts


class _Counted(Collector):
    """Counts as Prometheus has them."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        """One metric of each kind."""
        counts = self._counts

        def gauge(
            name: str,
            text: str,
            labels: tuple[str, ...],
            values: Iterable[tuple[tuple[str, ...], float]],
        ) -> Metric:
            metric = GaugeMetricFamily(f"vmlab_{name}", text, labels=labels)
            for where, value in values:
                metric.add_metric(where, value)
            return metric

        def by_one(found: dict[str, int]) -> Iterator[tuple[tuple[str, ...], float]]:
            return (((key,), value) for key, value in sorted(found.items()))

        yield gauge(
            "machines", "Machines of the store.", ("host", "state"), sorted(counts.machines.items())
        )
        yield gauge("live_vcpus", "vCPUs of live machines.", ("host",), by_one(counts.vcpus))
        yield gauge(
            "live_memory_bytes", "Memory of live machines.", ("host",), by_one(counts.memory)
        )
        yield gauge("disks", "Disks of the store.", ("state",), by_one(counts.disks))
        yield gauge("disks_bytes", "Sizes of all disks.", (), [((), counts.disk_bytes)])
        yield gauge(
            "addresses_used", "Addresses that are taken.", ("network",), by_one(counts.addresses)
        )
        yield gauge(
            "operations",
            "Operations that the store has.",
            ("kind", "state"),
            sorted(counts.operations.items()),
        )
        yield gauge(
            "findings_open",
            "Findings that are not resolved.",
            ("code", "severity"),
            sorted(counts.findings.items()),
        )
        yield gauge(
            "host_breaker",
            "Circuit breaker of a host: 0 closed, 1 half-open, 2 open.",
            ("host",),
            (((name,), _BREAKER.get(state, 2)) for name, state in sorted(counts.breakers.items())),
        )
        yield gauge(
            "host_available",
            "Whether a host can be used.",
            ("host",),
            (((name,), float(works)) for name, works in sorted(counts.available.items())),
        )
        yield gauge("event_latest", "Number of the latest event.", (), [((), counts.latest_event)])


class Meters:
    """Counts requests; one for each service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vmlab_http_requests",
            "Requests that were answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "vmlab_http_request_seconds",
            "Time to the end of an answer; without event streams.",
            ("method", "route"),
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=self.registry,
        )
        self.streams = Gauge(
            "vmlab_streams",
            "Event streams, consoles and commands that are open.",
            registry=self.registry,
        )

    def text(self, counts: Counts) -> bytes:
        """All of it, in Prometheus's text format 0.0.4."""
        counted = CollectorRegistry()
        counted.register(_Counted(counts))
        return generate_latest(self.registry) + generate_latest(counted)
