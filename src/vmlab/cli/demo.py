"""`vmlab demo`: boots Debian and runs a command in it, with the time of each step and a report.

With ``--simulated`` it is a day in a simulated data centre instead, which needs nothing installed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.run import HypervisorOption, drawn_progress, timeline_text

if TYPE_CHECKING:
    from vmlab.lab.demonstration import Shown
    from vmlab.lab.timeline import Step
    from vmlab.report import Recorder, Run

__all__ = ["demo"]

_COMMAND = "uname -a"


def demo(
    *,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", help="Image to boot; a tiny Debian if left out; repeatable."),
    ] = None,
    hypervisor: HypervisorOption = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            help="Tests to run afterwards; ./examples/quickstart if it is there, else none."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Where the JSON report goes, with .xml (JUnit) and .txt beside it; "
            "the user's state directory if left out."
        ),
    ] = None,
    as_json: output.JsonFlag = False,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="A day in a simulated data centre instead.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Simulated: source of all that happens.")
    ] = None,
    machines: Annotated[
        int | None,
        typer.Option(min=1, max=240, help="Simulated: machines on all hosts; 60 if left out."),
    ] = None,
    hosts: Annotated[
        int | None,
        typer.Option(min=2, max=16, help="Simulated: hosts that they run on; 3 if left out."),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(min=0.1, max=720, help="Simulated: hours of virtual time; 24 if left out."),
    ] = None,
) -> int:
    """Boot Debian and run a command in it, twice, with the time of each step and a report.

    The first time, an image is made of Debian's signed packages; the second time it is there.
    Nothing is left running. The examples run afterwards, if there are any.
    """
    days: dict[str, object] = {
        "--seed": seed,
        "--machines": machines,
        "--hosts": hosts,
        "--hours": hours,
    }
    boots: dict[str, object] = {"--image": image, "--examples": examples}
    _refuse(boots if simulated else days, simulated)
    if simulated:
        from vmlab.cli.demo_simulated import simulated_day

        return simulated_day(
            seed=seed,
            machines=machines or 60,
            hosts=hosts or 3,
            hours=hours or 24,
            report=report,
            as_json=as_json,
        )
    from vmlab.lab.session import Interrupted

    try:
        return _real(image or [], hypervisor, examples, report, as_json)
    except Interrupted as interrupted:
        return 128 + interrupted.number


def _refuse(options: Mapping[str, object], simulated: bool) -> None:
    from vmlab.machine.errors import InvalidSpec, SpecProblem

    expected = "leave it out: nothing boots in --simulated" if simulated else "needs --simulated"
    wrong = [
        SpecProblem(name, value if isinstance(value, int | float) else None, expected)
        for name, value in options.items()
        if value is not None
    ]
    if wrong:
        raise InvalidSpec(
            wrong, what="command line", hint="`vmlab demo --help` shows what it takes"
        )


def _real(
    images: list[str],
    hypervisor: str | None,
    examples: Path | None,
    report: Path | None,
    as_json: bool,
) -> ExitCode:
    from vmlab.lab.boot import Wish
    from vmlab.lab.demonstration import as_rows, find_examples
    from vmlab.lab.preference import preference
    from vmlab.report import Recorder

    suite = find_examples(examples)
    names = images or [preference(Wish(), hypervisor).tiny_image]
    shown: list[Shown] = []
    with tempfile.TemporaryDirectory(prefix="vmlab-demo-") as folder:
        scratch = Path(folder)
        command = ["vmlab", "demo", *(word for name in names for word in ("--image", name))]
        recorder = Recorder.create(scratch / "run", tool="vmlab demo", command=command)
        try:
            for name in names:
                for label in ("the first time", "with the image in the store"):
                    shown.append(_show(name, label, hypervisor, recorder, as_json))
            reports = report.with_suffix("") if report is not None else None
            well = suite is None or _examples(
                suite, scratch, recorder, as_json, hypervisor=hypervisor, reports=reports
            )
        finally:
            run = recorder.close()
            assert run is not None, "the owner of a run closes it once"
            path = _written(run, report)
            if not as_json:
                print(f"\nreport: {path}, {path.with_suffix('.xml')}, {path.with_suffix('.txt')}")
    if as_json:
        output.print_json({
            "runs": as_rows(shown),
            "examples": None if suite is None else {"path": str(suite), "passed": well},
            "report": str(path),
        })  # fmt: skip
    return ExitCode.OK if well and run.outcome.ok else ExitCode.FAILED


def _show(
    name: str, label: str, hypervisor: str | None, recorder: Recorder, as_json: bool
) -> Shown:
    """One boot; with the time of each step as it ends, unless JSON is wanted."""
    from vmlab.lab.demonstration import boot_and_run

    def tell(step: Step, size: int) -> None:
        if not as_json:
            amount = f" ({size / 1e6:.1f} MB)" if size else ""
            print(f"{step.seconds:8.3f} s    {step.name}{amount}", flush=True)

    if not as_json:
        print(f"\n$ vmlab run --image {name} -- {_COMMAND}     # {label}", flush=True)
    with drawn_progress() as progress:
        shown = boot_and_run(
            name,
            _COMMAND,
            hypervisor=hypervisor,
            recorder=recorder,
            label=f"{name} boots and runs a command, {label}",
            progress=progress,
            tell=tell,
        )
    if not as_json:
        print(timeline_text(shown.steps))
        print(shown.output, end="", flush=True)
        print(
            f"({shown.image.architecture.value}, {shown.hypervisor} with {shown.accelerator}; "
            "the machine is gone again)",
            flush=True,
        )
    return shown


def _examples(
    suite: Path,
    scratch: Path,
    recorder: Recorder,
    as_json: bool,
    *,
    hypervisor: str | None,
    reports: Path | None,
) -> bool:
    from vmlab.lab.demonstration import run_examples

    if not as_json:
        print(f"\n$ pytest {suite}", flush=True)
    return run_examples(
        suite, scratch, recorder, quiet=as_json, hypervisor=hypervisor, reports=reports
    )


def _written(run: Run, report: Path | None) -> Path:
    """Write the report in three formats; returns the path of the first."""
    from vmlab.report import write

    if report is None:
        from platformdirs import user_state_path

        report = user_state_path("vmlab") / "demo.json"
    for path in (report, report.with_suffix(".xml"), report.with_suffix(".txt")):
        write(run, path, "json" if path == report else None)
    return report
