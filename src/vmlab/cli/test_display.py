"""Shows a run of `vmlab test` on stderr: a live picture on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from vmlab.cli import output
from vmlab.cli.test_story import News, Story
from vmlab.report import escape_controls

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.progress import TaskID

_ENDINGS: Final = {
    "pass": "green",
    "fail": "bold red",
    "error": "bold red",
    "skip": "yellow",
    "xfail": "yellow",
}
_DETAILS: Final = {"machine", "mark", "phase", "fault"}
_MOST_SHOWN: Final = 12


class Display(Protocol):
    """Who shows a run."""

    def news(self, news: News) -> None:
        """Something has happened."""

    def printed(self, text: str) -> None:
        """pytest has said something on stderr."""

    def turn(self, story: Story) -> None:
        """Time has passed."""


class PlainLines:
    """A line for everything, with the seconds since the beginning; for pipes and logs."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def news(self, news: News) -> None:
        """One line."""
        word = news.kind.upper() if news.kind in _ENDINGS else news.kind
        text = " ".join(filter(None, (news.test, news.text)))
        if news.kind in _DETAILS:
            text = f"{news.text} [{news.test}]"
        self.printed(f"{time.monotonic() - self._began:7.1f} s  {word:<9} {text}\n")

    def printed(self, text: str) -> None:
        """The text, where nobody can command a terminal by it."""
        sys.stderr.write(escape_controls(text))
        sys.stderr.flush()

    def turn(self, story: Story) -> None:
        """Nothing is drawn again."""


class LivePicture:
    """What runs now, drawn again and again; what has ended goes by above it."""

    def __init__(self, console: Console, live: Live) -> None:
        from vmlab.cli.amounts import work_bars

        self._console = console
        self._live = live
        self._began = time.monotonic()
        self._bars = work_bars(console)
        self._tasks: dict[str, TaskID] = {}

    def news(self, news: News) -> None:
        """What has ended, and faults, are lines; the rest is in the picture."""
        from rich.text import Text

        if news.kind not in _ENDINGS and news.kind not in {"fault", "note"}:
            return
        style = _ENDINGS.get(news.kind, "magenta")
        line = Text.assemble((f"{news.kind.upper():<6}", style), news.test)
        line.append(f"{'  ' if news.test else ''}{news.text}", style="dim")
        self._console.print(line)

    def printed(self, text: str) -> None:
        """Above the picture."""
        from rich.text import Text

        self._console.print(Text(escape_controls(text).rstrip("\n")))

    def turn(self, story: Story) -> None:
        """Draw it."""
        self._live.update(self._picture(story), refresh=True)

    def _picture(self, story: Story) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 1))
        words = [f"{story.done}/{story.planned or '?'} tests"]
        words += [f"{story.outcomes[kind]} {kind}" for kind in _ENDINGS if story.outcomes[kind]]
        words += [_count(story.machines, "machine"), _count(story.boots, "boot")]
        words.append(f"{time.monotonic() - self._began:.0f} s")
        bar = ProgressBar(total=max(story.planned, 1), completed=story.done, width=24)
        head.add_row(bar, Text(", ".join(words)))
        rows = Table.grid(padding=(0, 2))
        running = sorted(story.running.values(), key=lambda test: test.since)
        for test in running[:_MOST_SHOWN]:
            doing = f"phase {test.phase}" if test.phase else ""
            machines = "; ".join(
                f"{one.name} ({one.hypervisor}) {one.doing}" for one in test.machines.values()
            )
            rows.add_row(
                Text(f"{time.monotonic() - test.since:6.1f} s", style="dim"),
                Text(test.id, overflow="ellipsis", no_wrap=True),
                Text(doing, style="cyan"),
                Text(machines, style="dim"),
            )
        more = len(running) - _MOST_SHOWN
        self._draw_work(story)
        work = [self._bars.get_renderable()] if story.work else []
        return Group(head, rows, *([Text(f"and {more} more")] if more > 0 else []), *work)

    def _draw_work(self, story: Story) -> None:
        for step in self._tasks.keys() - story.work.keys():
            self._bars.remove_task(self._tasks.pop(step))
        for step, work in story.work.items():
            if step not in self._tasks:
                name = escape_controls(step)
                self._tasks[step] = self._bars.add_task(name, total=work.total, unit=work.unit)
            self._bars.update(self._tasks[step], total=work.total, completed=work.done)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


@contextmanager
def shown() -> Iterator[Display]:
    """A display that fits stderr, for as long as the block lasts."""
    if not sys.stderr.isatty():
        yield PlainLines()
        return
    from rich.live import Live

    console = output.console(stderr=True)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield LivePicture(console, live)
