"""The HTML report as a person has it in a browser: Chromium, headless, without a network."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from vmlab.report import Attempt, Metric, Outcome, Output, Run, Suite, Test, html

from .conftest import HOSTILE, PANIC, PATIENCE_MS, Reader

pytestmark = pytest.mark.timeout(1200)
expect.set_options(timeout=PATIENCE_MS)

Open = Callable[[Path], Reader]


def test_the_summary_says_what_ran_and_how_to_run_it_again(open_page: Open, report: Path) -> None:
    page = open_page(report).page
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_contain_text("error vmlab test")
    sums = page.get_by_role("table", name="How many tests ended how")
    head = [cell.inner_text() for cell in sums.get_by_role("columnheader").all()]
    last = [cell.inner_text() for cell in sums.get_by_role("row").last.locator("th, td").all()]
    counted = dict(zip(head, last, strict=True))
    assert {name: counted[name] for name in head[1:-1]} == {
        "tests": "8",
        "error": "1",
        "fail": "1",
        "pending": "1",
        "pass": "3",
        "xfail": "1",
        "skip": "1",
    }
    assert page.locator("#seed").inner_text() == "42"
    assert page.locator("#command").inner_text() == """vmlab test 'it'"'"'s' --vm-seed 42"""
    assert page.get_by_role("row", name="hostname").is_visible()


def test_filters_show_the_tests_that_were_asked_for(open_page: Open, report: Path) -> None:
    reader = open_page(report)
    page = reader.page
    assert len(reader.shown()) == 8
    for outcome in ("pass", "skip", "xfail", "pending", "error"):
        page.get_by_role("checkbox", name=f"{outcome} (").uncheck()
    expect(page.locator("#shown")).to_have_text("1 of 8 tests shown")
    assert reader.shown() == ["test_panics[qemu]"]
    assert not page.get_by_role("heading", name="boot pass", exact=True).is_visible()
    for outcome in ("pass", "skip"):
        page.get_by_role("checkbox", name=f"{outcome} (").check()
    page.get_by_label("Hypervisor", exact=True).select_option("embedded")
    assert sorted(reader.shown()) == [
        "test_boots[embedded]",
        "test_flaky[embedded]",
        "test_gpu[embedded]",
    ]


def test_search_finds_names_reasons_and_what_the_console_said(
    open_page: Open, report: Path
) -> None:
    reader = open_page(report)
    search = reader.page.get_by_role("searchbox", name="Search")
    for words, found in [
        ("no gpu", ["test_gpu[embedded]"]),
        ("BOOTS qemu", ["test_boots[qemu]"]),
        ("hello from a guest", ["test_boots[qemu]", "test_boots[embedded]"]),
        ("fatal exception", ["test_panics[qemu]"]),
        ("nothing says this", []),
    ]:
        search.fill(words)
        assert reader.shown() == found, words
        expect(reader.page.get_by_role("status").nth(1)).to_have_text(
            f"{len(found)} of 8 tests shown"
        )
    search.fill("")
    assert len(reader.shown()) == 8


def test_the_console_shows_its_cause(open_page: Open, report: Path) -> None:
    page = open_page(report).page
    test = page.locator("li.test", has_text="test_panics")
    console = test.get_by_role("region", name="console-web.log of test_panics")
    cause = console.locator("mark")
    assert cause.all_inner_texts() == [PANIC]
    inside = """mark => {
        const box = mark.getBoundingClientRect(), pre = mark.parentElement.getBoundingClientRect();
        return box.top >= pre.top && box.bottom <= pre.bottom
            && box.top >= 0 && box.bottom <= innerHeight;
    }"""
    assert not cause.evaluate(inside), "three hundred lines of noise stand before it"
    test.get_by_role("link", name="go to the cause").click()
    expect(cause).to_be_focused()
    page.wait_for_function(f"mark => ({inside})(mark)", arg=cause.element_handle())
    background = "mark => getComputedStyle(mark).backgroundColor"
    assert cause.evaluate(background) != console.evaluate(background)


def test_the_timeline_and_the_charts_are_drawn(open_page: Open, report: Path) -> None:
    page = open_page(report).page
    test = page.locator("li.test", has_text="test_panics")
    drawn = test.get_by_role("img", name="Timeline from 0.00 s")
    assert drawn.locator("g.fatal text").text_content() == "panic"
    assert drawn.locator("g.fault text").text_content() == "disk-slow"
    assert drawn.locator("text.name").all_text_contents() == ["phases", "web"]
    boot, panic = (drawn.locator("g", has_text=word).locator("rect") for word in ("boot", "panic"))
    assert boot.bounding_box()["width"] > 10 * panic.bounding_box()["width"]
    assert panic.bounding_box()["x"] > boot.bounding_box()["x"] + boot.bounding_box()["width"]
    events = test.get_by_role("table", name="Timeline of web")
    assert events.get_by_role("row").count() == 3, "the same as words"
    chart = page.get_by_role("img", name="boot_s (s): 3 samples, median 2, from 1.5 to 2.5").first
    assert chart.is_visible()
    points = chart.locator("circle")
    heights = [point.bounding_box()["y"] for point in points.all()]
    assert heights[1] < heights[2] < heights[0], "1.5, 2.5, 2.0: the greatest is on top"
    assert points.first.locator("title").text_content() == "boot::test_boots[qemu]: 1.5"


def test_a_picture_is_in_the_page(open_page: Open, report: Path) -> None:
    page = open_page(report).page
    image = page.get_by_role("img", name="screen.png of test_panics")
    assert image.get_attribute("src").startswith("data:image/png;base64,")
    assert image.evaluate("image => image.complete && image.naturalWidth") == 1


def test_nothing_is_asked_of_any_network_and_nothing_of_a_guest_s_runs(
    open_page: Open, report: Path
) -> None:
    reader = open_page(report)
    page = reader.page
    page.get_by_role("button", name="Open all shown").click()
    assert page.locator("li.test > details[open]").count() == 8
    assert HOSTILE in page.locator("body").inner_text(), "it is shown as it was printed"
    assert r"\x1b[2J" in page.locator("body").inner_text()
    assert r"\u202e" in page.locator("body").inner_text()
    assert page.title().startswith("error: vmlab test")
    assert page.locator("img").count() == 1
    assert page.locator("script").count() == 1
    assert [url for url in reader.requests if not url.startswith("data:")] == [report.as_uri()]
    assert reader.complaints == []


def test_the_page_forbids_scripts_and_requests_that_are_not_its_own(
    open_page: Open, report: Path
) -> None:
    reader = open_page(report)
    page = reader.page
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "document.title = 'owned'";
            document.body.append(script);
            const image = document.createElement("img");
            image.src = "http://192.0.2.1/x.png";
            document.body.append(image);
        }"""
    )
    page.wait_for_function("() => document.images[document.images.length - 1].complete")
    # The browser tells of both when it comes to it.
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while sum("Content Security Policy" in each for each in reader.complaints) < 2:
        assert time.monotonic() < deadline, reader.complaints
        page.wait_for_timeout(50)
    assert page.title() != "owned"
    assert sum("Content Security Policy" in complaint for complaint in reader.complaints) == 2


def test_the_keyboard_is_enough(open_page: Open, report: Path) -> None:
    page = open_page(report).page
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the tests")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#tests")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("test_gpu")
    expect(page.locator("#shown")).to_have_text("1 of 8 tests shown")
    gpu = page.locator("li.test", has_text="test_gpu")
    for _ in range(30):
        page.keyboard.press("Tab")
        if gpu.locator("summary").evaluate("summary => summary === document.activeElement"):
            break
    expect(gpu.locator("summary").first).to_be_focused()
    page.keyboard.press("Enter")
    expect(gpu.get_by_text("no GPU here").last).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_that_keeps_people_out(
    open_page: Open, report: Path, scheme: str
) -> None:
    """axe-core's rules for WCAG 2.1 A and AA, contrast of colours included."""
    page = open_page(report).page
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]  # a Literal
    page.get_by_role("button", name="Open all shown").click()
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
    found = Axe().run(page, options={"runOnly": {"type": "tag", "values": tags}})
    assert found.violations_count == 0, found.generate_report()
    assert len(found.response["passes"]) > 10, "it looked"


def test_without_scripts_everything_can_be_read(browser: object, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)  # type: ignore[attr-defined]
    try:
        reader = Reader(context.new_page(), report)
        assert not reader.page.get_by_role("searchbox").is_visible()
        summary = reader.page.locator("li.test", has_text="test_panics").locator("summary").first
        summary.click()
        assert reader.page.locator("mark").is_visible()
    finally:
        context.close()


def test_a_link_to_a_test_opens_it(open_page: Open, report: Path) -> None:
    reader = open_page(report)
    number = reader.page.locator("li.test", has_text="test_gpu").get_attribute("id")
    reader.page.goto(f"{report.as_uri()}#{number}")
    reader.page.reload()
    expect(reader.page.locator(f"#{number} > details")).to_have_attribute("open", "")


def test_a_report_of_two_thousand_tests_opens(open_page: Open, tmp_path: Path) -> None:
    console = "".join(f"[{n:8.3f}] line {n} of a console\r\n" for n in range(40))
    tests = [
        Test(
            suite="many",
            name=f"test_{n}",
            hypervisor=("qemu", "embedded")[n % 2],
            attempts=[
                Attempt(
                    outcome=Outcome.FAIL if n % 100 == 99 else Outcome.PASS,
                    duration_s=n / 1000,
                    metrics=[Metric(name="boot_s", value=1 + n % 7, unit="s")],
                    output=[Output(stream="console", text=console)],
                )
            ],
        )
        for n in range(2000)
    ]
    suite = Suite(name="many", tests=tests)
    run = Run(
        id="r", tool="t", version="1", started=datetime(2026, 1, 1, tzinfo=UTC), suites=[suite]
    )
    path = tmp_path / "many.html"
    path.write_bytes(html.render(run))
    reader = open_page(path)
    page = reader.page
    assert page.locator("li.test").count() == 2000
    page.get_by_role("searchbox").fill("test_1999")
    expect(page.locator("#shown")).to_have_text("1 of 2000 tests shown")
    assert page.locator("li.test:not([hidden])").inner_text().startswith("fail")
    page.get_by_role("searchbox").fill("")
    page.get_by_role("checkbox", name="pass (1980)").uncheck()
    expect(page.locator("#shown")).to_have_text("20 of 2000 tests shown")
    chart = page.get_by_role("img", name="boot_s (s): 1000 samples").first
    assert chart.locator("circle").count() == 1000
    assert reader.complaints == []
