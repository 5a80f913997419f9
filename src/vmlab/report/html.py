"""The report as one self-contained HTML page: it asks for nothing from any network.

Style and script are in the page and named in its Content-Security-Policy by their hashes, so that
nothing else runs in it, whatever a guest printed: all text is escaped by the template engine, and
control characters are written out. Without scripts the whole page can be read; the script adds
filter and search. What a test is, is said in words and by the structure, colours only repeat it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmlab.machine.sizes import rounded_size
from vmlab.report.cause import Line, console_lines, quoted
from vmlab.report.comparison import middle_of
from vmlab.report.drawing import Sample, chart, number, timeline
from vmlab.report.escape import escape_controls
from vmlab.report.model import Artifact, Attempt, Outcome, Run, describe

if TYPE_CHECKING:
    import jinja2

__all__ = ["render"]

IMAGE_LIMIT: Final = 2 << 20
"""Bytes of the largest picture that is put into the page; others are linked."""

TEXT_LIMIT: Final = 256 << 10
"""Bytes of a text file that are put into the page: its end, where the cause usually is."""

FEWEST_SAMPLES: Final = 3
"""A chart has at least so many; fewer are rows of a table."""

_PICTURES: Final = ("image/png", "image/jpeg", "image/gif", "image/webp")


@dataclass(frozen=True)
class _Console:
    """Something that a machine or a test printed."""

    title: str
    lines: list[Line]
    omitted: str = ""
    written: bool = False  # into the report by the test, and not a file beside it

    @property
    def prominent(self) -> bool:
        """Whether it is open to begin with."""
        return self.written or self.cause is not None

    @property
    def cause(self) -> int | None:
        """Which of the pieces tells the cause first; None where none does."""
        return next((n for n, piece in enumerate(self.pieces) if piece.cause), None)

    @cached_property
    def pieces(self) -> list[Line]:
        """The lines, those between two causes as one text: a page has many thousands."""
        pieces: list[Line] = []
        for cause, group in groupby(self.lines, key=lambda line: line.cause):
            lines = list(group)
            pieces += lines if cause else [Line("\n".join(line.text for line in lines))]
        return pieces


@dataclass(frozen=True)
class _Chart:
    name: str
    hypervisor: str
    svg: Any  # Markup; None where there are too few samples to see anything in a drawing
    samples: int
    low: str
    middle: str
    high: str


def render(run: Run, directory: Path | None = None, links: str = "") -> bytes:
    """`run` as an HTML page in UTF-8.

    Args:
        run: What to show.
        directory: The run's directory: small pictures and the consoles of tests that are not ok
            are taken from there into the page. Without it the page links to them.
        links: What stands before the paths of the run's files, as "../run/".
    """
    style, script = _asset("page.css"), _asset("page.js")
    text = _template().render(
        run=run,
        links=links,
        style=_markup(style),
        script=_markup(script),
        style_hash=_integrity(style),
        script_hash=_integrity(script),
        outcomes=list(Outcome),
        hypervisors=sorted({t.hypervisor for t in run.tests() if t.hypervisor is not None}),
        charts=list(_charts(run)),
        consoles=lambda attempt: sorted(
            _consoles(attempt, directory), key=lambda console: console.cause is None
        ),
        picture=lambda artifact: _picture(artifact, directory),
    )
    return text.encode()


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def _asset(name: str) -> str:
    return files("vmlab.report").joinpath("page", name).read_text("utf-8").strip()


def _integrity(text: str) -> str:
    """The hash by which a Content-Security-Policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        # Every text of every expression: nothing in a template can forget it.
        finalize=lambda value: escape_controls(value) if type(value) is str else value,
    )
    environment.filters.update(
        seconds=lambda value: "–" if value is None else f"{value:.2f} s",
        number=number,
        size=rounded_size,
        moment=lambda moment: moment.isoformat(" ", "seconds").replace("+00:00", " UTC"),
        describe=describe,
        data=lambda value: json.dumps(value, indent=1, ensure_ascii=False),
    )
    environment.globals["timeline"] = lambda attempt: _markup(timeline(attempt))
    return environment.from_string(_asset("page.html.jinja"))


# ------------------------------------------------------------------------------------- evidence


def _found(artifact: Artifact, directory: Path | None) -> Path | None:
    """The artifact's file, where it is in the run's directory and as large as it was."""
    if directory is None:
        return None
    path = directory / artifact.path
    try:
        whole = not path.is_symlink() and path.is_file() and path.stat().st_size == artifact.size
    except OSError:
        return None
    return path if whole else None


def _picture(artifact: Artifact, directory: Path | None) -> str | None:
    """A picture as a data URL, if it is one, is there and is small enough."""
    if artifact.media_type not in _PICTURES or artifact.size > IMAGE_LIMIT:
        return None
    path = _found(artifact, directory)
    if path is None:
        return None
    data = base64.b64encode(path.read_bytes()).decode()
    return f"data:{artifact.media_type};base64,{data}"


def _consoles(attempt: Attempt, directory: Path | None) -> Iterator[_Console]:
    """What was printed during an attempt, with the cause of its end marked."""
    quotes = frozenset() if attempt.outcome.ok else quoted(attempt)
    for output in attempt.output:
        left_out = f"{output.omitted} characters left out" if output.omitted else ""
        lines = _lines(attempt, output.text, quotes)
        yield _Console(output.stream, lines, left_out, written=True)
    if attempt.outcome.ok:
        return
    for artifact in attempt.artifacts:
        if artifact.media_type.startswith("text/plain") and (path := _found(artifact, directory)):
            with path.open("rb") as file:
                file.seek(max(0, artifact.size - TEXT_LIMIT))
                text = file.read().decode("utf-8", "backslashreplace")
            skipped = max(0, artifact.size - TEXT_LIMIT)
            left_out = f"the first {rounded_size(skipped)} left out" if skipped else ""
            yield _Console(artifact.name, _lines(attempt, text, quotes), left_out)


def _lines(attempt: Attempt, text: str, quotes: frozenset[str]) -> list[Line]:
    if attempt.outcome.ok:  # a test that means a panic has no cause of death
        return [Line(line.text) for line in console_lines(text)]
    return console_lines(text, quotes)


# --------------------------------------------------------------------------------------- charts


def _charts(run: Run) -> Iterator[_Chart]:
    """One chart for each metric on each hypervisor; how long tests took comes last."""
    samples: dict[tuple[str, str], list[Sample]] = {}
    for test in run.tests():
        for metric in test.metrics:
            name = f"{metric.name} ({metric.unit})" if metric.unit else metric.name
            key = (name, test.hypervisor or "")
            samples.setdefault(key, []).append(Sample(test.id, metric.value))
    took = [Sample(test.id, test.duration_s) for test in run.tests() if test.duration_s is not None]
    if took:
        samples["duration of a test (s)", ""] = took
    for (name, hypervisor), found in samples.items():
        values = [sample.value for sample in found]
        yield _Chart(
            name=name,
            hypervisor=hypervisor,
            svg=_markup(chart(name, found)) if len(found) >= FEWEST_SAMPLES else None,
            samples=len(values),
            low=number(min(values)),
            middle=number(middle_of(values)),
            high=number(max(values)),
        )
