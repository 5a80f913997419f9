"""``vmlab schema``: the JSON Schemas (draft 2020-12) of the files that vmlab reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vmlab.cli import output
from vmlab.machine.errors import VmlabError

__all__ = ["Document", "schema", "schema_of"]


class Document(StrEnum):
    """A kind of file."""

    MACHINE = "machine"
    FAULTS = "faults"
    PROFILE = "profile"
    CAPABILITIES = "capabilities"
    REPORT = "report"
    RECIPE = "recipe"
    PLAN = "plan"


def _machine() -> dict[str, Any]:
    from vmlab.machine.spec import MachineSpec

    return MachineSpec.model_json_schema()


def _faults() -> dict[str, Any]:
    from vmlab.machine.faults import FaultSchedule

    return FaultSchedule.model_json_schema()


def _profile() -> dict[str, Any]:
    from vmlab.hypervisors.simulated.profile import SimulationProfile

    return SimulationProfile.model_json_schema()


def _capabilities() -> dict[str, Any]:
    from vmlab.machine.capabilities import Capabilities

    return Capabilities.model_json_schema()


def _report() -> dict[str, Any]:
    from vmlab.report import schema as report_schema

    return report_schema()


def _recipe() -> dict[str, Any]:
    from vmlab.images.recipe import Recipe

    return Recipe.model_json_schema()


def _plan() -> dict[str, Any]:
    from vmlab.lab.plans import Plan

    return Plan.model_json_schema()


_MAKERS: dict[Document, Callable[[], dict[str, Any]]] = {
    Document.MACHINE: _machine,
    Document.FAULTS: _faults,
    Document.PROFILE: _profile,
    Document.CAPABILITIES: _capabilities,
    Document.REPORT: _report,
    Document.RECIPE: _recipe,
    Document.PLAN: _plan,
}


def schema_of(document: Document) -> dict[str, Any]:
    """The JSON Schema of that kind of file, with `$schema`, `$id` and `title`."""
    made = _MAKERS[document]()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:vmlab:{document.value}:1",
        # A schema that comes with an id of its own keeps it.
        **made,
    }


def schema(
    document: Annotated[
        Document, typer.Argument(help="Which kind of file.", show_default=True)
    ] = Document.MACHINE,
    to: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write it there, not to stdout."),
    ] = None,
) -> None:
    """Print the JSON Schema of a file that vmlab reads or writes.

    Editors complete and check a file by it; so does any validator of JSON Schema.
    """
    text = output.to_json(schema_of(document))
    if to is None:
        print(text)
        return
    try:
        to.write_text(text + "\n", "utf-8")
    except OSError as error:
        raise VmlabError(
            f"cannot write {to}: {error.strerror or error}",
            hint="--output names a file in a directory that exists and that you may write to",
        ) from error
