"""Running plans in a real shell: order, failures, timeouts, output, artifacts, results, metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.unit.lab.plans.inhabited import Host, this_host
from tests.unit.machine.strategies import inline

from vmlab.guests.guest import Guest
from vmlab.lab.incident import IncidentKind
from vmlab.lab.plans import Plan, PlanResult, printing, retrieval, run_plan, runner
from vmlab.machine.errors import ChannelClosed, DeadlineExceeded, VmlabError
from vmlab.report import Attempt, Outcome, Recorder, read_run

PASS, FAIL, ERROR, SKIP = Outcome.PASS, Outcome.FAIL, Outcome.ERROR, Outcome.SKIP


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with this_host(tmp_path_factory.mktemp("agent")) as host:
        yield host


@dataclass
class Ran:
    result: PlanResult
    attempt: Attempt
    report: Path

    def outcomes(self) -> dict[str, Outcome]:
        return {phase.name: phase.outcome for phase in self.result.phases}

    def output(self, stream: str) -> str:
        return "".join(output.text for output in self.attempt.output if output.stream == stream)

    def artifact(self, name: str) -> bytes:
        (found,) = [one for one in self.attempt.artifacts if one.name == name]
        return (self.report / found.path).read_bytes()

    def messages(self) -> str:
        return "\n".join(message.text for message in self.attempt.messages)


Run = Callable[..., Ran]


@pytest.fixture
def ran(host: Host, tmp_path: Path) -> Run:
    def run(*phases: dict[str, Any], **rest: Any) -> Ran:
        fields = {**rest, "phases": [{"name": f"p{n}", **one} for n, one in enumerate(phases)]}
        plan = Plan.parse("\n".join(f"{key} = {inline(value)}" for key, value in fields.items()))
        with Recorder.create(tmp_path / "report", tool="test") as recorder:
            attempt = recorder.start("suite", "plan")
            result = run_plan(host, plan, attempt, artifacts=tmp_path / "artifacts")
            attempt.finish(result.outcome, reason=result.message or None)
        (test,) = read_run(tmp_path / "report").tests()
        return Ran(result, test.attempts[0], tmp_path / "report")

    return run


def test_phases_run_in_order_and_are_in_the_report(ran: Run) -> None:
    done = ran(
        {"name": "last", "run": "echo three", "needs": ["mid"]},
        {"name": "first", "run": "echo one; echo oops >&2", "needs": []},
        {"name": "mid", "run": "echo two", "needs": ["first"]},
    )
    assert done.result.outcome is PASS
    assert done.result.message == ""
    assert [phase.name for phase in done.result.phases] == ["first", "mid", "last"]
    assert [(phase.name, phase.outcome) for phase in done.attempt.phases] == [
        ("first", PASS),
        ("mid", PASS),
        ("last", PASS),
    ]
    assert all(phase.duration_s is not None for phase in done.attempt.phases)
    assert done.output("stdout") == ("==> first <==\none\n==> mid <==\ntwo\n==> last <==\nthree\n")
    assert done.output("stderr") == "==> first <==\noops\n"


def test_a_phase_that_fails_skips_those_that_need_it_and_no_others(ran: Run) -> None:
    done = ran(
        {"name": "build", "run": "echo what; echo why >&2; exit 7"},
        {"name": "test", "run": "true"},
        {"name": "more", "run": "true", "needs": ["test"]},
        {"name": "other", "run": "true", "needs": []},
    )
    assert done.outcomes() == {"build": FAIL, "test": SKIP, "more": SKIP, "other": PASS}
    assert done.result.outcome is FAIL
    assert done.result.message == "phase 'build': exit status 7: why"
    assert [phase.message for phase in done.result.phases] == [
        "exit status 7: why",
        "it needs 'build'",
        "it needs 'test'",
        "",
    ]
    assert done.attempt.phases[1].outcome is SKIP
    assert done.result.phases[0].status == 7


def test_a_failure_that_is_let_pass_stops_nothing_and_is_told(ran: Run) -> None:
    done = ran({"run": "exit 3", "continue-on-error": True}, {"run": "true"})
    assert done.outcomes() == {"p0": FAIL, "p1": PASS}
    assert done.result.outcome is PASS
    assert "phase 'p0' ended with fail, which is let pass: exit status 3" in done.messages()


def test_the_first_command_that_fails_ends_a_phase(ran: Run) -> None:
    done = ran({"run": "echo before\nfalse\necho after"})
    assert done.outcomes() == {"p0": FAIL}
    assert "after" not in done.output("stdout")


def test_a_signal_is_told_by_its_number(ran: Run) -> None:
    assert ran({"run": "kill -9 $$"}).result.phases[0].message == "signal 9"


def test_a_phase_has_the_plan_s_variables_and_its_own_and_its_directory(
    ran: Run, tmp_path: Path
) -> None:
    done = ran(
        {"run": 'echo "$A|$B|$PWD"', "environment": {"B": 'it\'s "b"'}, "directory": str(tmp_path)},
        environment={"A": "a", "B": "x"},
    )
    assert f'a|it\'s "b"|{tmp_path}\n' in done.output("stdout")


def test_a_phase_that_takes_too_long_fails_and_the_guest_is_still_there(ran: Run) -> None:
    done = ran(
        {"run": "sleep 1000", "timeout": 0.5},
        {"name": "after", "run": "echo here", "needs": []},
    )
    assert done.outcomes() == {"p0": FAIL, "after": PASS}
    assert done.result.message == "phase 'p0': it did not end within 0.5 s"


# ------------------------------------------------------------------------------------- metrics


def test_numbers_that_lines_have_are_metrics(ran: Run) -> None:
    done = ran(
        {
            "run": "echo 'bw=12.5 lat=3'; echo 'bw=13 lat=x'; printf 'bw=1e1 lat=4' >&2",
            "metrics": [
                {"pattern": r"bw=(?P<bw>\S+) lat=(?P<lat>\S+)", "unit": "MB/s"},
                {"name": "both", "pattern": r"bw=(?:1)(\d)", "direction": "higher"},
            ],
        }
    )
    found = [(metric.name, metric.value, metric.unit) for metric in done.attempt.metrics]
    assert sorted(found) == [
        ("both", 2, ""),
        ("both", 3, ""),
        ("bw", 10, "MB/s"),
        ("bw", 12.5, "MB/s"),
        ("bw", 13, "MB/s"),
        ("lat", 3, "MB/s"),
        ("lat", 4, "MB/s"),
    ]
    assert done.attempt.metrics[1].direction in {"none", "higher"}
    assert "the metric lat = 'x' is no number" in done.messages()


def test_a_line_that_comes_in_pieces_is_one_line(ran: Run) -> None:
    done = ran(
        {
            "run": "printf 'speed='; sleep 0.2; printf '4'; sleep 0.2; echo 2",
            "metrics": [{"name": "speed", "pattern": r"speed=(\d+)"}],
        }
    )
    assert [metric.value for metric in done.attempt.metrics] == [42]


# ------------------------------------------------------------------------- artifacts and output


def test_artifacts_are_the_files_that_patterns_match_in_directories_too(
    ran: Run, tmp_path: Path
) -> None:
    place = tmp_path / "out"
    done = ran(
        {
            "run": f"mkdir -p {place}/sub/deep; cd {place}; echo a >'a b.log'; echo c >c.log; "
            "echo n >no.txt; printf 'x\\0y' >sub/deep/bytes; ln -s /etc/passwd sub/link; "
            "mkfifo sub/fifo",
            "artifacts": [f"{place}/*.log", f"{place}/sub"],
        }
    )
    assert [path for path, _ in done.result.artifacts] == [
        f"{place}/a b.log",
        f"{place}/c.log",
        f"{place}/sub/deep/bytes",
    ]
    assert done.artifact(f"{place}/a b.log") == b"a\n"
    assert done.artifact(f"{place}/sub/deep/bytes") == b"x\0y"
    assert done.result.artifacts[2][1].read_bytes() == b"x\0y"
    assert done.messages() == ""


def test_artifacts_are_taken_of_a_phase_that_failed_and_what_is_not_there_is_told(
    ran: Run, tmp_path: Path
) -> None:
    done = ran(
        {
            "run": f"echo why >{tmp_path}/core.log; false",
            "artifacts": [f"{tmp_path}/core.log", f"{tmp_path}/nothing*"],
        },
        {"run": "true", "needs": [], "artifacts": [f"{tmp_path}/nothing*"]},
    )
    assert done.artifact(f"{tmp_path}/core.log") == b"why\n"
    assert done.outcomes() == {"p0": FAIL, "p1": PASS}
    assert f"phase 'p1', artifacts: no file matches {tmp_path}/nothing*" in done.messages()


def test_there_is_an_end_to_what_is_kept_of_a_guest(
    ran: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "MOST_BYTES", 1000)
    monkeypatch.setattr(retrieval, "MOST_FILES", 3)
    done = ran(
        {
            "run": f"cd {tmp_path}; for n in 1 2 3 4 5; do head -c 700 /dev/zero >$n.bin; done",
            "artifacts": [f"{tmp_path}/*.bin"],
        }
    )
    sizes = [file.stat().st_size for _, file in done.result.artifacts]
    assert sizes == [700, 300]
    assert "5 files match, of which 3 are taken" in done.messages()
    assert "2.bin is cut" in done.messages()


def test_long_output_is_shown_by_its_ends_and_kept_whole(
    ran: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(printing, "SHOWN", 100)
    done = ran({"run": "echo first; head -c 100000 /dev/zero | tr '\\0' x; echo; echo last"})
    shown = done.output("stdout")
    assert shown.startswith("==> p0 <==\nfirst\n")
    assert shown.endswith("xxx\nlast\n")
    assert len(shown) < 400
    assert len(done.artifact("p0.stdout.log")) == 100_012


def test_no_guest_fills_the_disk_by_printing(ran: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(printing, "SHOWN", 100)
    monkeypatch.setattr(printing, "MOST_KEPT", 50_000)
    done = ran({"run": "head -c 200000 /dev/zero"})
    assert len(done.artifact("p0.stdout.log")) == 50_000
    assert done.outcomes() == {"p0": PASS}


# -------------------------------------------------------------------------------------- results


def test_results_that_a_phase_leaves_are_tests(ran: Run, tmp_path: Path) -> None:
    cases = "<testcase name='a'/><testcase name='b'><failure/></testcase>"
    tap = "1..1\\nok 1 - t\\n"
    done = ran(
        {
            "run": f"echo \"<testsuite name='s'>{cases}</testsuite>\" >{tmp_path}/r.xml\n"
            f"printf '{tap}' >{tmp_path}/r.tap",
            "results": [f"{tmp_path}/r.*"],
        }
    )
    assert [(path, test.name, test.outcome) for path, test in done.result.tests] == [
        (f"{tmp_path}/r.tap", "t", PASS),
        (f"{tmp_path}/r.xml", "s / a", PASS),
        (f"{tmp_path}/r.xml", "s / b", FAIL),
    ]
    # They count as what they are, and not once more as the phase's.
    assert done.outcomes() == {"p0": PASS}
    assert done.artifact(f"{tmp_path}/r.tap") == b"1..1\nok 1 - t\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "no file of results matches"),
        ("hello", "it is neither JUnit XML nor TAP"),
        ("<!DOCTYPE x []><testsuite/>", "it has a document type"),
        ("<testsuite/>", "it has no tests"),
    ],
)
def test_results_that_are_none_fail_their_phase(
    ran: Run, tmp_path: Path, content: str | None, why: str
) -> None:
    if content is not None:
        (tmp_path / "r.xml").write_text(content)
    done = ran({"run": "true", "results": [f"{tmp_path}/r.xml"]}, {"run": "true"})
    assert done.outcomes() == {"p0": FAIL, "p1": SKIP}
    assert why in done.result.message


# ---------------------------------------------------------------------------- guests that are lost


@pytest.fixture
def lose(host: Host, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """From the next script that says LOSE on, the guest is gone; `greeted` brings it back."""

    def use(error: Exception) -> None:
        execute = Guest.execute
        gone = False

        async def lost(self: Guest, command: Any, **rest: Any) -> Any:
            nonlocal gone
            if "LOSE" in command:
                gone = True
            if gone:
                raise error
            return await execute(self, command, **rest)

        async def greeted(**_: Any) -> None:
            nonlocal gone
            host.greetings += 1
            gone = False

        monkeypatch.setattr(Guest, "execute", lost)
        monkeypatch.setattr(host, "greeted", greeted)

    return use


def test_when_the_guest_dies_its_phase_is_an_error_and_the_rest_is_skipped(
    ran: Run, lose: Callable[[Exception], None]
) -> None:
    lose(ChannelClosed("the guest died"))
    done = ran({"run": "LOSE", "artifacts": ["/x"]}, {"run": "true"}, {"run": "true", "needs": []})
    assert done.outcomes() == {"p0": ERROR, "p1": SKIP, "p2": SKIP}
    assert done.result.outcome is ERROR
    assert done.result.message == "phase 'p0': ChannelClosed: the guest died"
    assert done.result.phases[2].message == "the guest was lost in phase 'p0'"


def test_a_deadline_that_is_not_the_phase_s_is_a_guest_that_is_lost(
    ran: Run, lose: Callable[[Exception], None]
) -> None:
    lose(DeadlineExceeded("opening a port", seconds=10))
    assert ran({"run": "LOSE"}).outcomes() == {"p0": ERROR}


def test_a_guest_that_answers_no_more_after_a_timeout_is_lost(
    ran: Run, lose: Callable[[Exception], None]
) -> None:
    lose(DeadlineExceeded("the script", seconds=600))
    done = ran({"run": "LOSE"}, {"run": "true", "needs": []})
    assert done.outcomes() == {"p0": FAIL, "p1": SKIP}
    assert done.result.message == "phase 'p0': it did not end within 600 s"
    assert "the guest does not answer after phase 'p0'" in done.result.phases[1].message


def test_a_guest_that_is_lost_on_purpose_is_waited_for(
    ran: Run, host: Host, lose: Callable[[Exception], None]
) -> None:
    lose(ChannelClosed("power cut"))
    before = host.greetings
    done = ran({"run": "LOSE", "continue-on-error": True}, {"name": "verify", "run": "echo back"})
    assert done.outcomes() == {"p0": ERROR, "verify": PASS}
    assert done.result.outcome is PASS
    assert host.greetings == before + 1
    assert "and came back" in done.result.phases[0].message


def test_the_end_of_a_machine_is_expected_of_a_phase_that_may_fail_and_of_no_other(
    ran: Run, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: list[set[IncidentKind]] = []

    class Watching:
        @contextmanager
        def expect(self, *kinds: str) -> Iterator[None]:
            expected.append(set(map(IncidentKind, kinds)))
            yield
            expected.append(set())

    monkeypatch.setattr(host, "watchdog", Watching())
    ran({"run": "true"}, {"run": "true", "continue-on-error": True}, {"run": "true"})
    assert expected == [
        {IncidentKind.PANIC, IncidentKind.UNEXPECTED_EXIT, IncidentKind.UNEXPECTED_REBOOT},
        set(),
    ]


def test_a_machine_that_is_off_for_a_moment_is_tried_again(
    ran: Run, host: Host, lose: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(ChannelClosed("power cut"))
    back = host.greeted
    refused = iter([True, True, False])

    async def greeted(**given: Any) -> None:
        if next(refused):
            raise ChannelClosed("connection refused")
        await back(**given)

    monkeypatch.setattr(host, "greeted", greeted)
    done = ran({"run": "LOSE", "continue-on-error": True}, {"run": "true"})
    assert done.outcomes() == {"p0": ERROR, "p1": PASS}
    assert next(refused, None) is None


def test_one_that_does_not_come_back_is_not_let_pass(
    ran: Run, host: Host, lose: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(ChannelClosed("power cut"))

    async def greeted(**_: Any) -> None:
        raise VmlabError("no answer")

    monkeypatch.setattr(host, "greeted", greeted)
    monkeypatch.setattr(runner, "_POWER_TIMEOUT", 0.5)
    done = ran({"run": "LOSE", "continue-on-error": True}, {"run": "true"})
    assert done.outcomes() == {"p0": ERROR, "p1": SKIP}
    assert done.result.outcome is ERROR
    assert "did not come back: no answer" in done.result.message


def test_what_was_printed_before_an_interruption_is_in_the_report(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.parse('phases = [{name = "a", run = "echo so far; sleep 1000"}]')
    printed = asyncio.Event()
    take = printing.Printed.take

    def taken(self: printing.Printed, stream: str, data: bytes) -> None:
        take(self, stream, data)
        printed.set()

    async def ended_by_a_key(coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        await printed.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run = host.run

    def interrupted(coroutine: Any, timeout: float | None = None) -> Any:
        run(ended_by_a_key(coroutine), timeout)
        raise KeyboardInterrupt

    monkeypatch.setattr(printing.Printed, "take", taken)
    monkeypatch.setattr(host, "run", interrupted)
    with Recorder.create(tmp_path / "report", tool="test") as recorder:
        attempt = recorder.start("suite", "plan")
        with pytest.raises(KeyboardInterrupt):
            run_plan(host, plan, attempt, artifacts=tmp_path / "artifacts")
        (test,) = recorder.snapshot().tests()
    (phase,) = test.attempts[0].phases
    assert phase.outcome is Outcome.PENDING
    assert "so far" in test.attempts[0].output[0].text


def test_a_machine_that_has_not_booted_runs_no_plan(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.parse('phases = [{name = "a", run = "true"}]')
    monkeypatch.setattr(host, "guest", None)
    with pytest.raises(VmlabError, match="cannot run a plan in a machine that is off"):
        run_plan(host, plan, None, artifacts=tmp_path)
