"""What `vmlab demo` shows: an image built or fetched, booted, a command run in it; each step timed.

Also the project's examples, which any pytest runs. Everything ends up in one report.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from vmlab.images import Image, ImageStore, Progress
from vmlab.images.progress import ProgressEvent
from vmlab.lab import boot
from vmlab.lab.boot import Wish
from vmlab.lab.preference import preference
from vmlab.lab.session import Interrupts, Session, run_session, split_boot
from vmlab.lab.timeline import Step, Timeline
from vmlab.machine.errors import OperationFailed
from vmlab.report import Outcome, Recorder

if TYPE_CHECKING:
    from vmlab.guests.command import CommandResult

SUITE = "demo"


@dataclass(frozen=True, slots=True)
class Shown:
    """One boot of one image, and what the command in it printed.

    Attributes:
        image: What was booted.
        command: What ran in it.
        status: Its exit status.
        output: Its standard output and standard error.
        making: What had to be fetched and built first, with bytes where it has any.
        steps: Where the time went.
        accelerator: What ran the guest's instructions.
        hypervisor: What ran the machine.
    """

    image: Image
    command: str
    status: int
    output: str
    making: tuple[tuple[Step, int], ...]
    steps: Timeline
    accelerator: str
    hypervisor: str


@dataclass
class _Clock:
    """Times the steps of an image's making, and passes them on."""

    onward: Progress
    tell: Callable[[Step, int], None]
    steps: list[tuple[Step, int]] = field(default_factory=list)
    _begun: dict[str, float] = field(default_factory=dict)

    def __call__(self, event: ProgressEvent) -> None:
        now = time.monotonic()
        begun = self._begun.setdefault(event.step, now)
        self.onward(event)
        if event.finished:
            made = Step(event.step, now - begun), event.total or event.done
            del self._begun[event.step]
            self.steps.append(made)
            self.tell(*made)


def boot_and_run(
    name: str,
    command: str,
    *,
    hypervisor: str | None,
    recorder: Recorder,
    label: str,
    progress: Progress,
    tell: Callable[[Step, int], None],
) -> Shown:
    """Boot an image, run a command in it, clear everything away, and put it into the report.

    Args:
        name: The image's.
        command: Text for the guest's shell.
        hypervisor: What runs the machine; None is what runs such an image best.
        recorder: Takes it as one test.
        label: The test's name in the report.
        progress: Told of what is fetched and built.
        tell: Told of each step of that when it is over, with its bytes.

    Raises:
        VmlabError: it cannot be had, does not boot, or has no status 0; it is in the report.
    """
    clock = _Clock(progress, tell)
    steps = Timeline()
    wish = Wish(image=name)
    boot.check(wish)
    chosen = preference(wish, hypervisor)
    with recorder.start(SUITE, label, hypervisor=chosen.hypervisor) as attempt:
        with steps.step("image"):
            image = boot.find_image(wish, ImageStore(), progress=clock)
        chosen = chosen.for_image(image, hypervisor)
        accelerator = ""

        async def body(session: Session, interrupts: Interrupts) -> CommandResult:
            nonlocal accelerator
            accelerator = (await session.machine.info()).accelerator
            await split_boot(session)
            with session.timeline.step("command"):
                return await session.guest.execute(command)

        result = run_session(
            boot.booted_by(wish, image), body, hypervisor=chosen.hypervisor, timeline=steps
        )
        for step in steps.steps:
            attempt.metric(step.name, step.seconds, unit="s")
        for made, size in clock.steps:
            attempt.message(f"{made.name}: {made.seconds:.3f} s, {size} bytes")
        attempt.output("stdout", result.stdout_bytes)
        attempt.output("stderr", result.stderr_bytes)
        if not attempt.check("exit status", result.ok, expected=0, actual=result.status):
            raise OperationFailed(
                f"{command!r} exited with status {result.status}: {result.stderr}",
                hint=f"`vmlab run --image {name} -- {command}` shows it again",
                hypervisor=chosen.hypervisor,
            )
    return Shown(
        image, command, result.status, result.stdout + result.stderr, tuple(clock.steps), steps,
        accelerator, chosen.hypervisor,
    )  # fmt: skip


_RAN = {0, 1, 2}
"""pytest's exit status where it has results: all passed, some failed, some were not collected."""


def find_examples(given: Path | None) -> Path | None:
    """The examples to run: those that were named, or the quickstart of the directory we are in.

    Raises:
        OperationFailed: those that were named are not there.
    """
    if given is not None and not given.exists():
        raise OperationFailed(
            f"there are no examples in {given}", hint="leave --examples out, or name a directory"
        )
    here = Path("examples/quickstart")
    return given or (here if any(here.rglob("test_*.py")) else None)


def run_examples(
    directory: Path,
    scratch: Path,
    recorder: Recorder,
    *,
    quiet: bool,
    hypervisor: str | None = None,
    reports: Path | None = None,
) -> bool:
    """Run a directory of examples with pytest; each becomes a test of the report.

    Args:
        directory: What pytest collects.
        scratch: A directory for files that nobody needs afterwards.
        recorder: Takes the results.
        quiet: Print pytest's own words on stderr instead of stdout.
        hypervisor: What runs their machines; None is what runs each best.
        reports: Where the run's own report goes, with all that befell their machines; None is
            the user's state directory.

    Returns:
        Whether all of them are well.

    Raises:
        OperationFailed: pytest is not there, or did not get as far as running them.
    """
    results = scratch / "examples.xml"
    words = [sys.executable, "-m", "pytest", str(directory), f"--junitxml={results}"]
    words += ["-p", "no:cacheprovider", "-q"]
    words += [f"--vm-hypervisor={hypervisor}"] if hypervisor is not None else []
    words += [f"--vm-report={reports.absolute()}"] if reports is not None else []
    done = subprocess.run(words, check=False, stdout=sys.stderr if quiet else None)
    if done.returncode not in _RAN or not results.is_file():
        raise OperationFailed(
            f"pytest did not run the examples in {directory}: status {done.returncode}",
            hint="it says why above; where it is not installed: pip install 'vmlab[test]'",
        )
    for case in ElementTree.parse(results).iter("testcase"):
        _record(case, recorder)
    return done.returncode == 0


_OUTCOMES = {"failure": Outcome.FAIL, "error": Outcome.ERROR, "skipped": Outcome.SKIP}


def _record(case: ElementTree.Element, recorder: Recorder) -> None:
    """One test case of a JUnit file into the report."""
    name = f"{case.get('classname', '')}::{case.get('name', '')}"
    attempt = recorder.start("examples", name)
    attempt.metric("duration", float(case.get("time", "0")), unit="s")
    for kind, outcome in _OUTCOMES.items():
        found = case.find(kind)
        if found is not None:
            attempt.finish(outcome, reason=found.get("message"), details=found.text or "")
            return
    attempt.finish(Outcome.PASS)


def as_rows(shown: Sequence[Shown]) -> list[dict[str, object]]:
    """The same as JSON-ready data."""
    return [
        {
            "image": one.image.name,
            "architecture": one.image.architecture.value,
            "hypervisor": one.hypervisor,
            "accelerator": one.accelerator,
            "command": one.command,
            "status": one.status,
            "output": one.output,
            "made": [
                {"step": made.name, "seconds": made.seconds, "bytes": size}
                for made, size in one.making
            ],
            "steps": [{"step": step.name, "seconds": step.seconds} for step in one.steps.steps],
            "seconds": one.steps.seconds,
        }
        for one in shown
    ]
