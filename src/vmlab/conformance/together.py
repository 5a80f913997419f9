"""Several hypervisors at once: machines of one name do not meet, and all answer alike.

Each runs the same script on an event loop and in a thread of its own, in step with the others;
what the script was told is its transcript. Transcripts have to be equal, or differ only where
capabilities do.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmlab.conformance.bench import Bench
from vmlab.conformance.results import CheckResult, Finding
from vmlab.conformance.runner import Subject, workplace
from vmlab.hypervisors.base import Machine
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import InvalidState, VmlabError
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import Disk, MachineSpec, Nic
from vmlab.report import Outcome

TOGETHER: Final = "together.alike"
CLAUSE: Final = (
    "hypervisors that are used at once do not disturb each other, and the same calls give the "
    "same states and the same errors on each"
)
NAME: Final = "shared-name"
"""The name that the machine has on every hypervisor."""
PATIENCE: Final = 600.0
"""Seconds of real time that one waits for the others."""

C = Capability


@dataclass
class Transcript:
    """What one hypervisor answered: step -> answer; a step that its capabilities forbid is None."""

    hypervisor: str
    answers: dict[str, str | None] = field(default_factory=dict)
    trouble: str = ""


Step = tuple[str, tuple[Capability, ...], Callable[[Bench, Machine], Awaitable[object]]]

_STEPS: Final[tuple[Step, ...]] = (
    ("stop at rest", (), lambda b, m: m.stop()),
    ("pause at rest", (C.PAUSE,), lambda b, m: m.pause()),
    ("fork at rest", (C.FORK,), lambda b, m: m.fork("other")),
    ("metrics at rest", (), lambda b, m: m.metrics()),
    ("memory snapshot at rest", (C.MEMORY_SNAPSHOT,), lambda b, m: m.snapshot("m", memory=True)),
    ("plug a disk of a taken name", (), lambda b, m: m.plug_disk(Disk(name="one", size=MIB))),
    ("unplug an unknown NIC", (), lambda b, m: m.unplug_nic("none")),
    ("restore an unknown snapshot", (C.RESTORE,), lambda b, m: m.restore("none")),
    ("a second machine of the name", (), lambda b, m: b.hypervisor.create(_spec(b))),
    ("an unknown machine", (), lambda b, m: b.hypervisor.get("nobody")),
    ("start", (), lambda b, m: m.start()),
    ("start again", (), lambda b, m: m.start()),
    ("delete while it runs", (), lambda b, m: m.delete()),
    ("resume while it runs", (C.RESUME,), lambda b, m: m.resume()),
    ("an unknown channel", (C.GUEST_CHANNELS,), lambda b, m: m.channel("none")),
    ("pause", (C.PAUSE,), lambda b, m: m.pause()),
    ("restart while paused", (C.PAUSE,), lambda b, m: m.restart()),
    ("resume", (C.PAUSE, C.RESUME), lambda b, m: m.resume()),
    ("restart", (), lambda b, m: m.restart()),
    ("shrink a disk", (C.RESIZE_DISK,), lambda b, m: m.resize_disk("one", MIB)),
    ("migrate to itself", (C.LIVE_MIGRATION,), lambda b, m: m.migrate(b.hypervisor)),
    ("kill", (), lambda b, m: m.kill()),
    ("kill again", (), lambda b, m: m.kill()),
    ("delete", (), lambda b, m: m.delete()),
    ("delete again", (), lambda b, m: m.delete()),
    ("start when deleted", (), lambda b, m: m.start()),
)


def _spec(bench: Bench) -> MachineSpec:
    return bench.profile.spec.with_changes(
        name=NAME,
        disks=[*bench.profile.spec.disks, Disk(name="one", size=16 * MIB)],
        nics=[*bench.profile.spec.nics, Nic(name="two", network="none")],
    )


async def _perform(bench: Bench, transcript: Transcript, step: threading.Barrier) -> None:
    bench.capabilities = await bench.hypervisor.capabilities()
    bench.profile = bench.profile.fitting(bench.capabilities)
    machine = await bench.hypervisor.create(_spec(bench))
    bench.keep(machine)
    for name, needs, call in _STEPS:
        # A thread of each hypervisor waits here for those of the others.
        await asyncio.get_running_loop().run_in_executor(None, step.wait, PATIENCE)
        if not bench.has(*needs):
            transcript.answers[name] = None
            continue
        transcript.answers[name] = f"{await _told(call(bench, machine))}, {machine.state.value}"
    listed = [each.name for each in await bench.hypervisor.list()]
    transcript.answers["machines in the end"] = str(listed)


async def _told(call: Awaitable[object]) -> str:
    """What a call answers, in a word: "done", or the error with the states that it names."""
    try:
        await call
    except InvalidState as error:
        return f"InvalidState({error.operation}: {', '.join(error.expected)}; {error.actual})"
    except VmlabError as error:
        return type(error).__name__
    return "done"


def run_together(subjects: Sequence[Subject]) -> CheckResult:
    """Run the script on all of them at once and compare the transcripts."""
    result = CheckResult(TOGETHER, " and ".join(subject.name for subject in subjects))
    step = threading.Barrier(len(subjects))
    with workplace(subjects[0].place) as base, ThreadPoolExecutor(len(subjects)) as pool:
        running = [
            pool.submit(_one, subject, base / str(number), step)
            for number, subject in enumerate(subjects)
        ]
        transcripts = [one.result() for one in running]
    for transcript in transcripts:
        if transcript.trouble:
            name = transcript.hypervisor
            result.findings.append(
                Finding(TOGETHER, f"the script on {name}", "its end", transcript.trouble)
            )
    first = transcripts[0]
    for other in transcripts[1:]:
        result.findings += _compare(first, other)
    result.outcome = Outcome.FAIL if result.findings else Outcome.PASS
    if result.findings:
        finding = result.findings[0]
        result.reason = f"{finding.message}: expected {finding.expected}, got {finding.actual}"
    return result


def _compare(first: Transcript, other: Transcript) -> list[Finding]:
    return [
        Finding(
            TOGETHER,
            f"{step!r} on {other.hypervisor} and on {first.hypervisor}",
            answer,
            other.answers[step],
        )
        for step, answer in first.answers.items()
        if answer is not None
        and other.answers.get(step) is not None
        and other.answers[step] != answer
    ]


def _one(subject: Subject, directory: Path, step: threading.Barrier) -> Transcript:
    transcript = Transcript(subject.name)
    bench = Bench("together", subject.profile, subject.open, directory, subject.seed)
    hypervisor = bench.another()
    try:
        with asyncio.Runner(loop_factory=hypervisor.loop_factory()) as runner:
            runner.run(_whole(bench, transcript, step))
    except Exception as error:
        # Whatever a back end raises: the others must not wait for this one any longer.
        step.abort()
        transcript.trouble = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    return transcript


async def _whole(bench: Bench, transcript: Transcript, step: threading.Barrier) -> None:
    try:
        await _perform(bench, transcript, step)
    finally:
        await bench.hypervisor.close()
