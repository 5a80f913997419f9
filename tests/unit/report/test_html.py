"""The HTML page without a browser: what is in it, what is drawn, and which line was the cause."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

import pytest
from lxml import html as lxml_html

from vmlab.report import (
    Artifact,
    Attempt,
    FaultRecord,
    MachineRecord,
    Mark,
    Message,
    Metric,
    Outcome,
    Output,
    Phase,
    Recorder,
    Run,
    Severity,
    Suite,
    Test,
    html,
    read_run,
)
from vmlab.report.cause import console_lines, quoted
from vmlab.report.drawing import Sample, chart, number, timeline

PANIC = "Kernel panic - not syncing: Fatal exception"


def _page(run: Run, directory: Path | None = None) -> lxml_html.HtmlElement:
    return lxml_html.document_fromstring(html.render(run, directory=directory).decode())


def _error(text: str, details: str = "") -> Attempt:
    message = Message(text=text, severity=Severity.ERROR, details=details)
    return Attempt(outcome=Outcome.FAIL, messages=[message])


def test_every_test_and_its_outcome_is_there(run: Run) -> None:
    shown = [
        (item.get("data-outcome"), item.find_class("title")[0].text_content())
        for item in _page(run).find_class("test")
    ]
    assert shown == [(test.outcome.value, test.title) for test in run.tests()]


def test_an_empty_run_has_a_page(run: Run) -> None:
    page = _page(Run(id="r", tool="<t>", version="1", started=run.started))
    assert "<t> 1" in page.find(".//h1").text_content()
    assert page.get_element_by_id("shown").text_content() == "0 tests"
    assert page.find_class("charts") == []


def test_it_refers_to_nothing_outside(run: Run, run_with_machines: Run) -> None:
    for each in (run, run_with_machines):
        page = _page(each)
        for attribute in ("src", "href", "srcset", "data", "action", "poster"):
            for value in page.xpath(f"//@{attribute}"):
                assert value.startswith(("#", "artifacts/", "data:")), value
        assert page.xpath("//link | //iframe | //object | //embed | //base") == []
        assert (
            "url(" not in page.find(".//style").text and "@import" not in page.find(".//style").text
        )


def test_only_the_pages_own_script_and_style_are_allowed(run: Run) -> None:
    import base64

    page = _page(run)
    (policy,) = page.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy and "http" not in policy
    for tag in ("style", "script"):
        (element,) = page.xpath(f"//{tag}")
        digest = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_files_are_taken_into_the_page_from_the_runs_directory(tmp_path: Path) -> None:
    recorder = Recorder.create(tmp_path, tool="t")
    for name, outcome in (("bad", "fail"), ("good", "pass")):
        attempt = recorder.start("s", name)
        attempt.attach("console.log", f"boot\n{PANIC}\n{name}\n")
        attempt.attach("screen.png", b"\x89PNG")
        attempt.attach("long.log", "x" * (html.TEXT_LIMIT + 2048) + "\nlast words")
        attempt.finish(outcome)
    recorder.close()
    run = read_run(tmp_path)
    page = _page(run, tmp_path)
    bad, good = page.find_class("test")
    consoles = bad.find_class("console")
    assert [mark.text_content() for mark in consoles[0].iter("mark")] == [PANIC]
    assert consoles[1].text_content().strip().endswith("last words")
    assert "the first 2.0 KiB left out" in bad.text_content()
    assert good.find_class("console") == [], "a link is enough"
    assert bad.xpath(".//img/@src") == ["data:image/png;base64,iVBORw=="]
    assert len(bad.xpath(".//li/a/@href")) == 3
    assert _page(run).xpath("//img") == [], "without the directory it is a link"


@pytest.mark.parametrize("damage", ["gone", "longer", "a link"])
def test_a_file_that_is_not_what_was_recorded_is_left_out(tmp_path: Path, damage: str) -> None:
    recorder = Recorder.create(tmp_path, tool="t")
    attempt = recorder.start("s", "t")
    path = tmp_path / attempt.attach("screen.png", b"\x89PNG").path
    attempt.finish("fail")
    recorder.close()
    path.unlink()
    if damage == "longer":
        path.write_bytes(b"\x89PNG and more")
    elif damage == "a link":
        (tmp_path / "other").write_bytes(b"1234")
        path.symlink_to(tmp_path / "other")
    assert _page(read_run(tmp_path), tmp_path).xpath("//img") == []


def test_a_picture_that_is_too_large_and_one_of_another_kind_are_linked(tmp_path: Path) -> None:
    facts = {"path": "artifacts/x", "sha256": "0" * 64}
    large = Artifact(name="x", media_type="image/png", size=html.IMAGE_LIMIT + 1, **facts)
    drawn = Artifact(name="x", media_type="image/svg+xml", size=1, **facts)
    attempt = Attempt(outcome=Outcome.FAIL, artifacts=[large, drawn])
    suite = Suite(name="s", tests=[Test(suite="s", name="t", attempts=[attempt])])
    run = Run(
        id="r", tool="t", version="1", started=datetime(2026, 1, 1, tzinfo=UTC), suites=[suite]
    )
    page = _page(run, tmp_path)
    assert page.xpath("//img") == []
    assert "2.0 MiB" in page.text_content()


def test_omitted_output_is_said(run: Run) -> None:
    output = Output(stream="stdout", text="a", omitted=12)
    attempt = Attempt(outcome=Outcome.PASS, output=[output])
    suite = Suite(name="s", tests=[Test(suite="s", name="t", attempts=[attempt])])
    page = _page(run.model_copy(update={"suites": (suite,)}))
    assert "12 characters left out" in page.text_content()


# ---------------------------------------------------------------------------------------- cause


@pytest.mark.parametrize(
    ("attempt", "console", "causes"),
    [
        (_error("x", f"[ 1.0] {PANIC}"), ["fine", f"[ 1.0]   {PANIC}", "BUG: later"], [1]),
        (_error("x", "unrelated words here"), ["fine", "BUG: kernel NULL pointer", "no"], [1]),
        (_error("vm: exit with status 256 of it"), ["exit with status 256", "ok"], [0]),
        (_error("done"), ["done", "all done"], []),
        (_error(""), ["", "INFO: task sh:12 blocked for more than 120 seconds.", ""], [1]),
        (_error("x"), ["Out of memory: Killed process 5 (eater)", "[2.0] Oops: 0002 [#1]"], [0, 1]),
    ],
)
def test_the_cause_is_what_a_message_quotes_or_else_what_linux_complains_of(
    attempt: Attempt, console: list[str], causes: list[int]
) -> None:
    lines = console_lines("\r\n".join(console) + "\r\n", quoted(attempt))
    assert [line.text for line in lines] == console
    assert [n for n, line in enumerate(lines) if line.cause] == causes


def test_controls_of_a_console_are_written_out() -> None:
    assert [line.text for line in console_lines("a\x1b[2J\r\n\rb")] == ["a\\x1b[2J", "\\x0db"]


def test_a_test_that_passed_has_no_cause(run: Run) -> None:
    output = Output(stream="console", text=f"{PANIC}\n")
    attempt = Attempt(outcome=Outcome.PASS, output=[output])
    suite = Suite(name="s", tests=[Test(suite="s", name="t", attempts=[attempt])])
    assert _page(run.model_copy(update={"suites": (suite,)})).xpath("//mark") == []


# ------------------------------------------------------------------------------------- drawings


def _svg(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def _machine(*marks: Mark) -> Attempt:
    machine = MachineRecord(name="vm", hypervisor="qemu", timeline=marks)
    return Attempt(outcome=Outcome.PASS, duration_s=10, machines=[machine])


def test_nothing_is_drawn_of_nothing() -> None:
    assert timeline(Attempt(outcome=Outcome.PASS, duration_s=3)) == ""
    assert timeline(_machine()) == ""


def test_a_moment_is_a_line_and_what_takes_time_is_as_wide_as_it_took() -> None:
    svg = _svg(
        timeline(_machine(Mark(at_s=5, kind="tick"), Mark(at_s=0, kind="boot", duration_s=5)))
    )
    boot, tick = svg.findall("g")
    assert boot.find("title").text == "0.00 s: boot, 5.00 s"
    assert float(tick.find("rect").get("width")) == 3
    assert float(boot.find("rect").get("width")) == pytest.approx((960 - 120 - 8) / 2)
    assert svg.get("aria-label") == "Timeline from 0.00 s to 10.00 s; machines: vm"


def test_labels_do_not_cover_each_other() -> None:
    marks = [Mark(at_s=n / 50, kind=f"event number {n}") for n in range(40)]
    svg = _svg(timeline(_machine(*marks, Mark(at_s=9.99, kind="the very end of everything"))))
    places = [
        (float(text.get("x")), float(text.get("y")), text.get("text-anchor"))
        for text in svg.findall("g/text")
    ]
    assert len(places) == 41
    assert places[-1][2] == "end", "at the right edge it stands before its mark"
    assert len({y for _, y, _ in places[:12]}) == 12, "near each other: one below the other"
    assert len({y for _, y, _ in places}) == 12, "no more lanes than can be read"


def test_phases_and_faults_are_drawn_for_what_they_are() -> None:
    attempt = Attempt(
        outcome=Outcome.FAIL,
        duration_s=4,
        phases=[
            Phase(name="build", outcome="fail", started_s=0, duration_s=2),
            Phase(name="a name that is much longer than its label", outcome="pending", started_s=3),
            Phase(name="tidy", outcome="skip", started_s=4),
        ],
        faults=[
            FaultRecord(id="a", kind="pause", machine="a machine with a long name", at_s=1),
            FaultRecord(id="b", kind="kill", machine="n", at_s=1, refused="no <b>"),
            FaultRecord(id="c", kind="lag", machine="n", at_s=1, cleared_s=2),
        ],
    )
    svg = _svg(timeline(attempt))
    assert [group.get("class") for group in svg.findall("g")] == [
        "phase fail",
        "phase pending",
        "phase skip",
        "fault",
        "refused",
        "fault",
    ]
    assert [text.text for text in svg.findall("text[@class='name']")] == [
        "phases",
        "a machine with a…",
        "n",
    ]
    titles = [group.find("title").text for group in svg.findall("g")]
    assert titles[4] == "1.00 s: fault b (kill) refused: no <b>"
    assert titles[5].endswith("cleared at 2.00 s")
    assert float(svg.findall("g")[1].find("rect").get("width")) > 100, "to the attempt's end"


def test_an_attempt_without_any_time_is_drawn() -> None:
    machine = MachineRecord(name="vm", hypervisor="q", timeline=[Mark(at_s=0, kind="off")])
    svg = _svg(timeline(Attempt(outcome=Outcome.PENDING, machines=[machine])))
    assert svg.get("aria-label") == "Timeline from 0.00 s to 1.00 s; machines: vm"


def test_a_chart_says_what_it_shows() -> None:
    svg = _svg(chart("boot (s)", [Sample("t1", 1.5), Sample("t2", 3), Sample("t3", 2)]))
    assert svg.get("aria-label") == "boot (s): 3 samples, median 2, from 1.5 to 3"
    assert [c.find("title").text for c in svg.findall("circle")] == ["t1: 1.5", "t2: 3", "t3: 2"]
    heights = [float(c.get("cy")) for c in svg.findall("circle")]
    assert heights[1] < heights[2] < heights[0]


@pytest.mark.parametrize("values", [[5.0], [2.0, 2.0], [-1.7e308, 1.7e308], [0.0, 5e-324]])
def test_any_figures_can_be_drawn(values: list[float]) -> None:
    svg = _svg(chart("m", [Sample("t", value) for value in values]))
    heights = [float(circle.get("cy")) for circle in svg.findall("circle")]
    assert all(0 <= height <= 150 for height in heights)
    assert len(heights) == len(values)


@pytest.mark.parametrize(
    ("value", "shown"), [(3.0, "3"), (1.23456789, "1.2346"), (1e20, "1e+20"), (-0.5, "-0.5")]
)
def test_figures_are_short(value: float, shown: str) -> None:
    assert number(value) == shown


def _of(run: Run, attempt: Attempt) -> lxml_html.HtmlElement:
    suite = Suite(name="s", tests=[Test(suite="s", name="t", attempts=[attempt])])
    return _page(run.model_copy(update={"suites": (suite,)}))


def test_what_tells_the_cause_comes_first_and_is_open(run: Run, tmp_path: Path) -> None:
    recorder = Recorder.create(tmp_path, tool="t")
    attempt = recorder.start("s", "t")
    for name, text in (("notes.txt", "nothing here"), ("console.log", PANIC)):
        attempt.attach(name, text)
    attempt.finish("fail", reason="it died")
    recorder.close()
    page = _page(read_run(tmp_path), tmp_path)
    shown = [
        (each.find("summary").text_content(), each.get("open") is not None)
        for each in page.xpath("//pre[@class='console']/parent::details")
    ]
    assert shown == [("console.log", True), ("notes.txt", False)]


def test_few_samples_are_figures_and_more_are_a_chart(run: Run) -> None:
    def measured(count: int) -> Attempt:
        metrics = [Metric(name="boot", value=n, unit="s") for n in range(count)]
        return Attempt(outcome=Outcome.PASS, metrics=metrics)

    few, more = _of(run, measured(2)), _of(run, measured(3))
    table = few.xpath("//section[@id='metrics']//tbody/tr")
    assert [cell.text_content() for cell in table[0]] == ["boot (s)", "", "0", "1"]
    assert few.xpath("//figure") == []
    assert len(more.xpath("//figure//*[local-name()='circle']")) == 3
    assert more.xpath("//section[@id='metrics']//table") == []


def test_of_a_long_text_in_a_table_the_first_line_is_shown(run: Run) -> None:
    phase = Phase(name="build", outcome="fail", started_s=0, message="first <b>\nsecond\nthird")
    page = _of(run, Attempt(outcome=Outcome.FAIL, phases=[phase]))
    (cell,) = page.xpath("//td[details]")
    assert cell.find("details/summary").text == "first <b>"
    assert cell.find("details/span").text == "second\nthird"
