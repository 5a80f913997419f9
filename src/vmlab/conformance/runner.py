"""Runs one check on a hypervisor of its own, on a fresh event loop, and audits what is left.

Not a test framework: it knows nothing of pytest and prints nothing. `Subject` is a back end that
the suite is run on.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import statistics
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vmlab.conformance.audits import (
    AUDITS,
    audit_events,
    audit_states,
    audit_tasks,
    close,
    delete_all,
    still_listed,
)
from vmlab.conformance.bench import OWN, Bench, CheckFailed, Skipped
from vmlab.conformance.leaks import (
    Holdings,
    describe_process,
    files_under,
    marked_processes,
    marking,
)
from vmlab.conformance.probe import GuestCannotTell
from vmlab.conformance.profiles import ConformanceProfile
from vmlab.conformance.registry import Check, Means
from vmlab.conformance.results import CheckResult, Finding
from vmlab.hypervisors.base import Hypervisor, HypervisorProvider
from vmlab.hypervisors.ownership import Owner
from vmlab.machine.capabilities import Capabilities
from vmlab.machine.errors import VmlabError
from vmlab.machine.events import EventType
from vmlab.report import Outcome


@dataclass(frozen=True)
class Subject:
    """A back end under test: its provider, its profile, the options and the seed.

    `place` is where the checks have their directories; None is the system's temporary directory.
    """

    provider: HypervisorProvider
    profile: ConformanceProfile
    seed: int = 0
    place: Path | None = None

    @property
    def name(self) -> str:
        """The name of the hypervisor."""
        return self.provider.name

    def with_options(self, options: Mapping[str, str]) -> Subject:
        """The same back end opened with more options."""
        merged = {**self.profile.options, **options}
        return replace(self, profile=self.profile.with_changes(options=merged))

    def with_seed(self, seed: int) -> Subject:
        """The same back end with another seed."""
        return replace(self, seed=seed)

    def open(self, owner: Owner, options: Mapping[str, str]) -> Hypervisor:
        """A hypervisor for `owner`, seeded where it takes a seed."""
        seed = {self.profile.seed_option: str(self.seed)} if self.profile.seed_option else {}
        return self.provider.open(owner, {**seed, **options})


@contextmanager
def workplace(place: Path | None) -> Iterator[Path]:
    """A directory in `place` for one check and its temporary files; removed at the end."""
    # Short, since a unix socket's path may have 107 bytes and no more (unix(7)).
    base = Path(tempfile.mkdtemp(prefix="vmlab-c" if place is None else "c", dir=place))
    temporary = base / "t"
    temporary.mkdir()
    before, cached = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    try:
        yield base
    finally:
        tempfile.tempdir = cached
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
        shutil.rmtree(base, ignore_errors=True)


def run_check(check: Check, subject: Subject) -> CheckResult:
    """Run one check; what is wrong is in the result, nothing is raised for it.

    Raises:
        HypervisorUnavailable: the hypervisor cannot be opened here.
        InvalidSpec: an option is unknown or wrong.
    """
    result = CheckResult(check.id, subject.name)
    begun = time.perf_counter()
    mark = uuid.uuid4().hex
    before = Holdings.now()
    with workplace(subject.place) as base, marking(mark):
        bench = Bench(check.topic, subject.profile, subject.open, base, subject.seed)
        hypervisor = bench.another()
        with asyncio.Runner(loop_factory=hypervisor.loop_factory()) as runner:
            runner.run(_run(check, bench, result))
        del hypervisor
        _audit_leftovers(result, before, base, mark)
    result.expectations = bench.expectations
    result.notes = bench.notes
    result.used = bench.used
    result.undeclared_working = bench.undeclared_working
    _conclude(result)
    result.seconds = time.perf_counter() - begun
    return result


def declared(subject: Subject) -> Capabilities:
    """What the back end declares, asked of a hypervisor that is opened for that alone.

    Raises:
        HypervisorUnavailable: it cannot be opened here.
        InvalidSpec: an option is unknown or wrong.
    """

    async def ask(hypervisor: Hypervisor) -> Capabilities:
        async with hypervisor:
            return await hypervisor.capabilities()

    with workplace(subject.place) as base:
        owner = Owner("run", "conformance-capabilities", base)
        hypervisor = subject.open(owner, subject.profile.options)
        with asyncio.Runner(loop_factory=hypervisor.loop_factory()) as runner:
            return runner.run(ask(hypervisor))


def _conclude(result: CheckResult) -> None:
    """Let the findings of the audits count."""
    if result.findings and result.outcome is not Outcome.ERROR:
        result.outcome = Outcome.FAIL
    if result.findings:
        first = result.findings[0]
        told = f": expected {first.expected}, got {first.actual}" if first.expected else ""
        result.reason = f"[{first.id}] {first.message}{told}"


async def _run(check: Check, bench: Bench, result: CheckResult) -> None:
    try:
        bench.capabilities = await bench.hypervisor.capabilities()
        bench.profile = bench.profile.fitting(bench.capabilities)
        lacking = what_lacks(check, bench.capabilities, bench.profile)
        if lacking:
            raise Skipped(lacking)
        async with asyncio.timeout(bench.profile.patience):
            await check.function(bench)
        result.outcome = Outcome.PASS
    except Skipped as reason:
        result.outcome, result.reason = Outcome.SKIP, str(reason)
    except GuestCannotTell as reason:
        result.outcome, result.reason = Outcome.SKIP, f"the guest's probe cannot tell: {reason}"
    except CheckFailed as failure:
        result.outcome = Outcome.FAIL
        result.details = traceback.format_exc()
        result.findings.append(Finding(check.id, failure.what, failure.expected, failure.actual))
    except (VmlabError, TimeoutError) as error:
        result.outcome = Outcome.FAIL
        result.details = traceback.format_exc()
        told = f"{type(error).__name__}: {error}"
        result.findings.append(Finding(check.id, f"{check.clause}", "no error", told))
    except Exception as error:
        # A back end may raise anything; that it is no VmlabError is a finding too.
        result.outcome = Outcome.ERROR
        result.details = traceback.format_exc()
        result.findings.append(
            Finding(check.id, f"{check.clause}", "a VmlabError", f"{type(error).__name__}: {error}")
        )
    for task in bench.tasks:
        task.cancel()
    await asyncio.gather(*bench.tasks, return_exceptions=True)
    try:
        await _settle(bench, result)
    except Exception as error:
        result.outcome = Outcome.ERROR
        result.details += traceback.format_exc()
        result.findings.append(
            Finding("audit.close", "clearing up failed", "a VmlabError", f"{error!r}")
        )


async def _settle(bench: Bench, result: CheckResult) -> None:
    """Audit states, delete everything, audit events, close, audit the loop."""
    for hypervisor in bench.opened:
        mine = [machine for machine in bench.machines if machine.hypervisor is hypervisor]
        if hypervisor in bench.closed:
            continue
        reliable = bench.profile.reliable(bench.profile.options)
        if reliable:
            result.findings += await audit_states(mine)
        known = {machine.id: machine for machine in [*mine, *await hypervisor.list()]}
        result.findings += await delete_all([*known.values()], bench.profile.patience)
        result.findings += await still_listed(hypervisor)
        events = await hypervisor.events()
        if reliable and hypervisor not in bench.lossy:
            result.findings += audit_events(events, [*known.values()])
        for event in events:
            if event.type is EventType.OPERATION_FINISHED and event.operation is not None:
                name = event.operation.rpartition("-")[0]
                seconds = event.data.get("seconds")
                if isinstance(seconds, int | float):
                    result.timings.setdefault(name, []).append(float(seconds))
    for hypervisor in bench.opened:
        if hypervisor not in bench.closed:
            result.findings += await close(bench, hypervisor)
    result.findings += await audit_tasks()


def _audit_leftovers(result: CheckResult, before: Holdings, base: Path, mark: str) -> None:
    """What is left when the loop is closed."""
    after = Holdings.now()
    left = after.more_than(before)
    children = after.children - before.children
    escaped = [pid for pid in marked_processes(mark) if pid not in children]
    left["audit.processes"] += [describe_process(pid) for pid in escaped]
    _end([*children, *escaped])
    left["audit.files"] = [
        f"{folder.name}/{name}"
        for folder in sorted(base.iterdir())
        if folder.name != OWN
        for name in files_under(folder)
    ]
    for audit, things in left.items():
        if things:
            result.findings.append(Finding(audit, AUDITS[audit], "none", ", ".join(things)))


def what_lacks(check: Check, capabilities: Capabilities, profile: ConformanceProfile) -> str:
    """Why the check cannot be made of such a hypervisor; empty if it can."""
    for needed in check.needs:
        if needed not in capabilities:
            why = capabilities.unsupported.get(needed)
            return f"does not declare {needed.value}" + (f" ({why})" if why else "")
    given = {
        Means.GUEST: profile.probe is not None,
        Means.CORRUPT: profile.corrupt is not None,
        Means.CRASH: profile.crasher(capabilities.faults) is not None,
        Means.ECHO: profile.echo_channel is not None,
    }
    return next((means.value for means in check.means if not given[means]), "")


def medians(results: Sequence[CheckResult]) -> dict[str, float]:
    """Each operation's usual time in seconds on the hypervisor's clock, over all results."""
    collected: dict[str, list[float]] = {}
    for result in results:
        for name, measured in result.timings.items():
            collected.setdefault(name, []).extend(measured)
    return {name: statistics.median(values) for name, values in sorted(collected.items())}


def _end(pids: Iterable[int]) -> None:
    """End what a hypervisor left running, so that the next check does not find it."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
