"""``vmlab hypervisors``: which there are, what each can do on this host, and why not the rest."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmlab.cli import output

if TYPE_CHECKING:
    from vmlab.hypervisors.base import Probe
    from vmlab.machine.capabilities import Capabilities

__all__ = ["hypervisors"]

_SECONDS = 30.0
"""What a hypervisor has to tell what it can do."""

_COLUMNS = (
    output.Column("hypervisor", "hypervisor", no_wrap=True),
    output.Column("available", "works"),
    output.Column("version", "version"),
    output.Column("architectures", "guests"),
    output.Column("accelerators", "accelerators"),
    output.Column("remark", "remark"),
)


def hypervisors(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these; all if none.")
    ] = None,
    as_json: output.JsonFlag = False,
) -> None:
    """List the hypervisors, what each can do here, and why not the rest."""
    from vmlab.hypervisors.registry import probe_all

    rows = [_row(probe) for probe in probe_all(only=names or None)]
    output.print_table(_COLUMNS, rows, as_json=as_json, empty="no hypervisor is installed")
    if not as_json:
        _print_capabilities([row for row in rows if row["capabilities"] is not None])
        _print_items(rows)


def _row(probe: Probe) -> dict[str, Any]:
    """All that is known of a hypervisor."""
    row: dict[str, Any] = {
        "hypervisor": probe.hypervisor,
        "available": probe.available,
        "version": probe.version,
        "reason": probe.reason,
        "hint": probe.hint,
        "items": [item.model_dump() for item in probe.items],
        "summary": "",
        "capabilities": None,
        "architectures": [],
        "accelerators": [],
    }
    row["remark"] = ": ".join(filter(None, (probe.reason, probe.hint)))
    if probe.available:
        try:
            row["summary"], found = _ask(probe.hypervisor)
        except Exception as error:
            # Anybody's package; the others are listed all the same.
            row["reason"] = f"it does not tell what it can do: {type(error).__name__}: {error}"
            row["remark"] = row["reason"]
        else:
            row["capabilities"] = found
            row["architectures"] = sorted(found.architectures)
            row["accelerators"] = list(found.accelerators)
            row["remark"] = row["summary"]
    return row


def _ask(name: str) -> tuple[str, Capabilities]:
    """What a hypervisor is, and can do; it is opened for a run that ends with the question."""
    from vmlab.hypervisors.ownership import Home, Run
    from vmlab.hypervisors.registry import provider

    chosen = provider(name)
    with (
        tempfile.TemporaryDirectory(prefix="vmlab-") as directory,
        Run.begin(Home.open(Path(directory))) as run,
    ):
        hypervisor = chosen.open(run.owner)

        async def capabilities() -> Capabilities:
            async with hypervisor, asyncio.timeout(_SECONDS):
                return await hypervisor.capabilities()

        with asyncio.Runner(loop_factory=hypervisor.loop_factory()) as runner:
            return chosen.summary, runner.run(capabilities())


def _print_capabilities(rows: list[dict[str, Any]]) -> None:
    """A table of capabilities, a column for each hypervisor, and why something does not work."""
    from vmlab.machine.capabilities import Capability

    if not rows:
        return
    names = [row["hypervisor"] for row in rows]
    columns = [output.Column("capability", "capability", no_wrap=True)]
    columns += [output.Column(name, name, no_wrap=True) for name in names]
    print()
    output.print_table(
        columns,
        [
            {
                "capability": capability.value,
                **{row["hypervisor"]: capability in row["capabilities"] for row in rows},
            }
            for capability in Capability
        ],
        as_json=False,
    )
    reasons = [
        f"{row['hypervisor']}: no {capability.value}: {reason}"
        for row in rows
        for capability, reason in row["capabilities"].unsupported.items()
    ]
    if reasons:
        print()
        print("\n".join(reasons))


def _print_items(rows: list[dict[str, Any]]) -> None:
    """What each hypervisor looked at and found wanting."""
    lines = []
    for row in rows:
        for item in row["items"]:
            if not item["works"]:
                hint = f" ({item['hint']})" if item["hint"] else ""
                lines.append(f"{row['hypervisor']}: {item['name']}: {item['detail']}{hint}")
    if lines:
        print()
        print("\n".join(lines))
