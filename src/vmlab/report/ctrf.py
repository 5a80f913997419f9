"""The report in the Common Test Report Format (CTRF), specification 0.0 (https://ctrf.io).

Valid against its published JSON Schema (`ctrf-schema-0.0.json`). CTRF has five statuses, so:

    pass            "passed"
    error, fail     "failed"
    skip            "skipped"
    pending         "pending"
    xfail           "other"

`rawStatus` tells which it was. Earlier attempts are `retryAttempts`; phases and checks are `steps`;
machines, faults and metrics are in `extra`, as they stand in vmlab's own JSON. Times are whole
milliseconds, as the schema wants them.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

from vmlab.report.model import Attempt, Outcome, Run, Severity, Test, describe

__all__ = ["render"]

SPECIFICATION: Final = "0.0.0"

_STATUS: Final = {
    Outcome.PASS: "passed",
    Outcome.FAIL: "failed",
    Outcome.ERROR: "failed",
    Outcome.SKIP: "skipped",
    Outcome.PENDING: "pending",
    Outcome.XFAIL: "other",
}
# Ids are UUIDs made of names (RFC 4122, 4.3), so that a report written twice is the same report.
_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_URL, "urn:vmlab:report:1")


def render(run: Run) -> bytes:
    """`run` as a CTRF document: indented JSON in UTF-8."""
    return json.dumps(_document(run), indent=1, ensure_ascii=False).encode() + b"\n"


def _milliseconds(seconds: float | None) -> int:
    return round(1000 * (seconds or 0.0))


def _epoch(moment: datetime) -> int:
    return round(1000 * moment.timestamp())


def _identity(*names: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, "\0".join(names)))


def _document(run: Run) -> dict[str, Any]:
    totals = run.totals
    finished = run.finished or _last_known(run)
    summary = {
        "tests": totals.tests,
        "passed": totals.passed,
        "failed": totals.failed + totals.errors,
        "skipped": totals.skipped,
        "pending": totals.pending,
        "other": totals.xfailed,
        "flaky": sum(1 for test in run.tests() if test.flaky),
        "suites": len(run.suites),
        "start": _epoch(run.started),
        "stop": _epoch(finished),
        "duration": _milliseconds(run.duration_s),
        "extra": {"outcome": run.outcome.value, "finished": run.finished is not None},
    }
    environment = {"osPlatform": "system", "osRelease": "kernel", "testEnvironment": "hostname"}
    facts = {
        field: str(run.environment[name])
        for field, name in environment.items()
        if run.environment.get(name) is not None
    }
    extra: dict[str, Any] = {"environment": run.environment, "labels": run.labels}
    if run.seed is not None:
        extra["seed"] = str(run.seed)  # may be more than a JSON reader's number holds
    if run.command:
        extra["command"] = run.command_line
    return {
        "reportFormat": "CTRF",
        "specVersion": SPECIFICATION,
        "reportId": _identity(run.id),
        "runId": run.id,
        "timestamp": finished.isoformat(),
        "generatedBy": "vmlab",
        "results": {
            "tool": {"name": run.tool, "version": run.version},
            "summary": summary,
            "tests": [_test(run, test) for test in run.tests()],
            "environment": {**facts, "extra": extra},
            "extra": {"messages": [message.model_dump(mode="json") for message in run.messages]},
        },
    }


def _last_known(run: Run) -> datetime:
    """When a run that did not end was last heard of, as far as the host's clock knew."""
    heard = [
        moment
        for test in run.tests()
        for attempt in test.attempts
        for moment in (attempt.started, attempt.finished)
        if moment is not None
    ]
    return max([run.started, *heard])


def _test(run: Run, test: Test) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": _identity(run.id, test.suite, test.name, test.hypervisor or ""),
        "testId": test.id,
        "name": test.title,
        "status": _STATUS[test.outcome],
        "duration": _milliseconds(test.duration_s),
        "suite": [test.suite],
        "rawStatus": test.outcome.value,
        "retries": max(0, len(test.attempts) - 1),
        "flaky": test.flaky,
    }
    if test.reason:
        found["message"] = test.reason
    if test.labels:
        found["labels"] = dict(test.labels)
    if test.hypervisor is not None:
        found["tags"] = [test.hypervisor]
        found["parameters"] = {"hypervisor": test.hypervisor}
    last = test.last
    if last is not None:
        found |= _told(last)
        if last.worker:
            found["threadId"] = last.worker
        if steps := list(_steps(last)):
            found["steps"] = steps
        if extra := _extra(last):
            found["extra"] = extra
    if len(test.attempts) > 1:
        found["retryAttempts"] = [
            {
                "attempt": number,
                "status": _STATUS[attempt.outcome],
                "duration": _milliseconds(attempt.duration_s),
                **({"message": attempt.reason} if attempt.reason else {}),
                **_told(attempt),
                "extra": {"rawStatus": attempt.outcome.value, **_extra(attempt)},
            }
            for number, attempt in enumerate(test.attempts, 1)
        ]
    return found


def _told(attempt: Attempt) -> dict[str, Any]:
    """What a test and one of its attempts have in common, where it is known."""
    told: dict[str, Any] = {}
    if attempt.started is not None:
        told["start"] = _epoch(attempt.started)
    if attempt.finished is not None:
        told["stop"] = _epoch(attempt.finished)
    details = [
        message.details
        for message in attempt.messages
        if message.severity is Severity.ERROR and message.details
    ]
    if details:
        told["trace"] = "\n".join(details)
    for field, is_error in (("stdout", False), ("stderr", True)):
        streams = [o for o in attempt.output if (o.stream == "stderr") is is_error]
        if streams:
            told[field] = [line for output in streams for line in output.text.splitlines()]
    if attempt.artifacts:
        told["attachments"] = [
            {
                "name": artifact.name,
                "contentType": artifact.media_type,
                "path": artifact.path,
                "extra": {"sha256": artifact.sha256, "size": artifact.size},
            }
            for artifact in attempt.artifacts
        ]
    return told


def _steps(attempt: Attempt) -> Iterator[dict[str, Any]]:
    for phase in attempt.phases:
        extra = phase.model_dump(mode="json", exclude={"name"})
        yield {"name": phase.name, "status": _STATUS[phase.outcome], "extra": extra}
    for check in attempt.checks:
        yield {
            "name": check.name,
            "status": _STATUS[check.outcome],
            "extra": {"outcome": check.outcome.value, "message": describe(check)},
        }


def _extra(attempt: Attempt) -> dict[str, Any]:
    dumped = attempt.model_dump(mode="json", include={"machines", "faults", "metrics"})
    return {name: records for name, records in dumped.items() if records}
