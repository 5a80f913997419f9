"""A browser, and a run whose guests print whatever could harm a page."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from tests.needs import need

from vmlab.report import Direction, Recorder, Severity, html, read_run

# Generous: a browser on a busy machine is slow, and no test is about how fast it is.
PATIENCE_MS = 300_000

HOSTILE = "</pre></script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
PANIC = "[    2.0] Kernel panic - not syncing: Fatal exception"


@pytest.fixture
def browser() -> Iterator[Browser]:
    """Debian's Chromium, headless, for one test.

    Playwright's synchronous interface leaves an event loop running in this thread while it lives,
    which no other test of this process could do with.
    """
    chromium = need("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, timeout=PATIENCE_MS)
        yield browser
        browser.close()


class Reader:
    """A page as a person has it open, and everything that it asked for or complained about."""

    def __init__(self, page: Page, path: Path) -> None:
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.set_default_timeout(PATIENCE_MS)
        page.goto(path.as_uri())

    def shown(self) -> list[str]:
        """The titles of the tests that can be seen."""
        titles = self.page.locator("li.test .title")
        return [t.inner_text() for t in titles.all() if t.is_visible()]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[object]:
    """Opens a report as `Reader`; its context ends with the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    yield lambda path: Reader(context.new_page(), path)
    context.close()


def picture() -> bytes:
    """A PNG of one red pixel (PNG 1.2, chapters 3 and 4)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\x00\xff\x00\x00")
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def record(directory: Path) -> None:
    """Record a run of eight tests on two hypervisors, none of them kind to its reader."""
    recorder = Recorder.create(
        directory, tool="vmlab test", seed=42, command=["vmlab", "test", "it's", "--vm-seed", "42"]
    )
    recorder.plan("net", ["test_never_begun"], hypervisor="qemu")
    for hypervisor in ("qemu", "embedded"):
        with recorder.start("boot", "test_boots", hypervisor=hypervisor) as attempt:
            attempt.machine("vm", hypervisor=hypervisor, image="tiny", spec={"memory": HOSTILE})
            attempt.mark("vm", "boot", "from a template", at_s=0, duration_s=1.5)
            for boot_s in (1.5, 2.5, 2.0):
                attempt.metric("boot_s", boot_s, "s", direction=Direction.LOWER)
            attempt.output("console", "hello from a guest\r\n")
    with recorder.start("net", "test_panics", hypervisor="qemu") as attempt:
        attempt.machine("web", hypervisor="qemu", accelerator="tcg", image="tiny")
        attempt.mark("web", "boot", at_s=0, duration_s=1.5)
        attempt.mark("web", "panic", HOSTILE, at_s=2)
        attempt.phase("build", "fail", duration_s=1, started_s=1, message=HOSTILE)
        attempt.fault("slow-disk", "disk-slow", "web", parameters={"why": HOSTILE}, at_s=1)
        attempt.check("state", False, HOSTILE, expected="up", actual="gone")
        attempt.message(
            f"web: kernel panic {HOSTILE}", severity=Severity.ERROR, details=PANIC, source="console"
        )
        lines = [f"[    1.{n}] noise {n}" for n in range(300)]
        attempt.attach("console-web.log", "\r\n".join([*lines, HOSTILE, PANIC, "[ 2.1] the end"]))
        attempt.attach("screen.png", picture())
        attempt.output("stdout", f"\x1b[2J{HOSTILE}\u202e\n")
    with recorder.start("net", f"test_{HOSTILE}", hypervisor="qemu") as attempt:
        attempt.finish("error", reason="the machine died")
    recorder.skip("net", "test_gpu", "no GPU here", hypervisor="embedded")
    with recorder.start("net", "test_known", hypervisor="qemu") as attempt:
        attempt.finish("xfail", reason="issue 7")
    for outcome in ("fail", "pass"):
        recorder.start("net", "test_flaky", hypervisor="embedded").finish(
            outcome, reason="a race" if outcome == "fail" else None
        )
    recorder.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of that run, beside its artifacts."""
    directory = tmp_path_factory.mktemp("run")
    record(directory)
    path = directory / "report.html"
    path.write_bytes(html.render(read_run(directory), directory=directory))
    return path
