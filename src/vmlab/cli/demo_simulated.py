"""`vmlab demo --simulated`: a day in a simulated data centre, in seconds, with a report."""

from __future__ import annotations

import contextlib
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from vmlab.hypervisors.simulated.datacentre import Day
    from vmlab.report import Run

_COLUMNS = (
    output.Column("name", "HOST"),
    output.Column("machines", "MACHINES", justify="right"),
    output.Column("operations", "OPERATIONS", justify="right"),
    output.Column("failures", "FAILED", justify="right"),
    output.Column("crashes", "CRASHES", justify="right"),
    output.Column("arrivals", "ARRIVED", justify="right"),
    output.Column("departures", "LEFT", justify="right"),
)


def simulated_day(
    *, seed: int | None, machines: int, hosts: int, hours: float, report: Path | None, as_json: bool
) -> ExitCode:
    """Live through a day in a simulated data centre, and report.

    Hosts crash, operations fail and hang, machines are killed, moved, saved and brought back; each
    one is checked all the while for whether its disk holds what it wrote.

    Args:
        seed: Source of all that happens; drawn if None.
        machines: Machines on all hosts.
        hosts: Hosts that they run on.
        hours: Hours of virtual time.
        report: Where the JSON report goes; the user's state directory if None.
        as_json: Print the results as JSON.
    """
    from vmlab.hypervisors.simulated.datacentre import DataCentre

    seed = secrets.randbits(32) if seed is None else seed
    began = time.monotonic()
    with _progress(f"{hours:g} hours") as on_progress:
        centre = DataCentre(hosts=hosts, machines=machines, seed=seed, on_progress=on_progress)
        day = centre.run(hours * 3600)
    took = time.monotonic() - began
    path = _path(report, seed)
    run = _recorded(day, path)
    if as_json:
        output.print_json(_summary(day) | {"hosts": day.hosts, "report": str(path)})
    else:
        output.print_table(
            _COLUMNS,
            [{column.key: getattr(host, column.key) for column in _COLUMNS} for host in day.hosts],
            as_json=False,
        )
        _print_summary(day, took)
        print(f"report: {path}")
        print(f"again:  vmlab demo --simulated --seed {seed} --machines {machines} --hosts {hosts}")
    return ExitCode.OK if run.outcome.ok else ExitCode.FAILED


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[float], None] | None]:
    """A bar on the terminal, if there is one."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress

    with Progress(console=output.console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _summary(day: Day) -> dict[str, Any]:
    visits = sum(machine.visits for machine in day.machines)
    return {
        "seed": day.seed,
        "hours": day.seconds / 3600,
        "machines": len(day.machines),
        "running_at_end": sum(machine.runs_at_end for machine in day.machines),
        "availability": sum(machine.answered for machine in day.machines) / max(1, visits),
        "mended": sum(machine.mended for machine in day.machines),
        "mixed_up": sum(machine.mixed_up for machine in day.machines),
        "migrations": sum(machine.done["migrate"] for machine in day.machines),
        "snapshots": sum(machine.done["snapshot"] for machine in day.machines),
        "restores": sum(machine.done["restore"] for machine in day.machines),
        "events": day.events,
    }


def _print_summary(day: Day, took: float) -> None:
    facts = _summary(day)
    print(
        f"\n{facts['machines']} machines lived {facts['hours']:g} hours in {took:.1f} s: "
        f"{facts['migrations']} migrations, {facts['snapshots']} snapshots, "
        f"{facts['restores']} restores, {facts['events']:,} events"
    )
    print(
        f"{facts['availability']:.1%} available, {facts['mended']} times mended, "
        f"{facts['running_at_end']} run at the end, "
        f"{facts['mixed_up'] or 'none'} had a wrong byte on its disk"
    )


def _path(report: Path | None, seed: int) -> Path:
    if report is not None:
        return report
    from platformdirs import user_state_path

    return user_state_path("vmlab") / f"demo-{seed}.json"


def _recorded(day: Day, path: Path) -> Run:
    """The day as a report: each machine is a test."""
    from vmlab.report import Recorder, write

    with tempfile.TemporaryDirectory(prefix="vmlab-demo-") as folder:
        command = ["vmlab", "demo", "--simulated", "--seed", str(day.seed)]
        command += ["--machines", str(len(day.machines))]
        recorder = Recorder.create(
            Path(folder) / "run", tool="vmlab demo", seed=day.seed, command=command
        )
        for machine in day.machines:
            attempt = recorder.start("data centre", machine.name, hypervisor="simulated")
            attempt.check("its disk holds what it wrote", machine.mixed_up == 0)
            attempt.check("it runs at the end of the day", machine.runs_at_end)
            attempt.metric("availability", machine.availability, unit="1")
            attempt.metric("mended", machine.mended, unit="1")
            attempt.finish()
        run = recorder.close()
        assert run is not None, "the owner of a run closes it once"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(run, path, "json")
    return run
