"""The formats that a report can be written in, chosen by name or by the file's suffix.

JSON, JUnit XML, CTRF, HTML, text and a short document of sums are built in. Other packages add
formats through the entry-point group `vmlab.report_writers`: the entry point's name is the
format's, its object a `Writer`. They are loaded only where a built-in format does not fit, and a
broken one harms nobody else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final

from vmlab.machine.errors import VmlabError
from vmlab.report import ctrf, html, json_report, junit, results, text
from vmlab.report.durable import write_atomically
from vmlab.report.model import Run

__all__ = ["GROUP", "Writer", "find_writer", "write", "writers"]

GROUP: Final = "vmlab.report_writers"


@dataclass(frozen=True)
class Writer:
    """A format. `suffixes` are in lower case with their dot; a longer one wins (".ctrf.json").

    `render_beside` is for a format that can show the run's files: it is given the run's directory
    too, and how that is reached from where the document will be ("" or "../run/").
    """

    name: str
    description: str
    suffixes: tuple[str, ...]
    render: Callable[[Run], bytes]
    render_beside: Callable[[Run, Path, str], bytes] | None = None

    def document(self, run: Run, path: Path | None = None, directory: Path | None = None) -> bytes:
        """The document of `run` that will be at `path` (None: nobody knows).

        Args:
            run: What to write.
            path: Where to; its directory is taken for the run's, where that is not given.
            directory: The run's directory, with its artifacts.
        """
        if directory is None and path is not None:
            directory = path.parent
        if self.render_beside is None or directory is None:
            return self.render(run)
        to = ""
        if path is not None and path.parent.resolve() != directory.resolve():
            to = Path(os.path.relpath(directory.resolve(), path.parent.resolve())).as_posix() + "/"
        return self.render_beside(run, directory, to)


_BUILT_IN: Final = {
    writer.name: writer
    for writer in (
        Writer("json", "the document of record, vmlab.report/1", (".json",), json_report.render),
        Writer("junit", "JUnit XML for CI systems", (".xml",), junit.render),
        Writer("ctrf", "Common Test Report Format", (".ctrf.json",), ctrf.render),
        Writer(
            "html", "one page to read in a browser", (".html", ".htm"), html.render, html.render
        ),
        Writer("results", "sums per suite for dashboards", (".results.json",), results.render),
        Writer("text", "a summary for people", (".txt", ".log"), text.render),
    )
}


def _load(entry_point: EntryPoint) -> Writer:
    try:
        writer = entry_point.load()
    except Exception as error:  # a plugin's module may raise anything at all
        raise VmlabError(
            f"report format {entry_point.name!r} cannot be loaded from {entry_point.value}: "
            f"{type(error).__name__}: {error}",
            hint="repair or uninstall the package that adds it",
        ) from error
    if not isinstance(writer, Writer):
        raise VmlabError(
            f"report format {entry_point.name!r}: {entry_point.value} is a "
            f"{type(writer).__name__}, not a vmlab.report.Writer",
            hint="repair or uninstall the package that adds it",
        )
    return writer


def _others() -> dict[str, EntryPoint]:
    """The formats that other packages add; the names of the built-in ones are taken."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in _BUILT_IN}


def writers() -> dict[str, Writer]:
    """Every format that works here, by name, the built-in ones first."""
    found = dict(_BUILT_IN)
    for name, point in _others().items():
        try:
            found[name] = _load(point)
        except VmlabError:
            continue  # asked for by name, it says what is wrong with it
    return found


def find_writer(path: Path, format: str | None = None) -> Writer:
    """The writer of `format`, or the one that the name of `path` asks for by its suffix.

    Raises:
        VmlabError: There is none (the formats known are named), or it cannot be loaded.
    """
    if format is not None:
        if format in _BUILT_IN:
            return _BUILT_IN[format]
        if (point := _others().get(format)) is not None:
            return _load(point)
        names = ", ".join([*_BUILT_IN, *sorted(_others())])
        raise VmlabError(f"{format!r} is not a report format", hint=f"known are: {names}")
    known = writers()
    name = path.name.lower()
    fits = [
        (len(suffix), writer)
        for writer in known.values()
        for suffix in writer.suffixes
        if name.endswith(suffix)
    ]
    if fits:
        return max(fits, key=lambda fit: fit[0])[1]
    formats = "; ".join(f"{w.name} ({', '.join(w.suffixes)})" for w in known.values())
    raise VmlabError(
        f"no report format goes with the name {path.name!r}",
        hint=f"use a suffix that says it, or name the format: {formats}",
    )


def write(
    run: Run, path: Path | str, format: str | None = None, *, directory: Path | None = None
) -> Writer:
    """Write `run` to `path`, replacing it whole; directories are made.

    Args:
        run: What to write.
        path: Where to.
        format: A name that `writers` knows; by the suffix of `path` if None.
        directory: The run's directory, for formats that show its files; that of `path` if None.

    Returns:
        The writer that was used.

    Raises:
        VmlabError: There is no such format, or the file cannot be written.
    """
    path = Path(path)
    writer = find_writer(path, format)
    write_atomically(path, writer.document(run, path, directory))
    return writer
