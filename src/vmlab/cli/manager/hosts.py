"""``vmlab host`` and ``vmlab emergency-stop``: where machines run, and the end of all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmlab.cli import output
from vmlab.cli.manager import options
from vmlab.cli.manager.changing import DryRunFlag, How, change, request
from vmlab.cli.manager.completing import completed
from vmlab.cli.manager.connecting import ask
from vmlab.cli.output import Column, JsonFlag

if TYPE_CHECKING:
    from vmlab.manager.client import AsyncClient
    from vmlab.manager.documents import HostDocument, OperationDocument

__all__ = ["app", "emergency_stop"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Hypervisor hosts of the manager's: what of them is taken, whether they work.",
)

_COLUMNS = (
    Column("name", "host", no_wrap=True),
    Column("hypervisor", "hypervisor"),
    Column("available", "works"),
    Column("breaker", "breaker"),
    Column("live", "live", justify="right"),
    Column("machines", "machines", justify="right"),
    Column("vcpus", "vCPUs", justify="right"),
    Column("memory_text", "memory", justify="right"),
    Column("reason", "remark"),
)


def _row(host: HostDocument) -> dict[str, Any]:
    from vmlab.machine.sizes import rounded_size

    return {**host.model_dump(mode="json"), "memory_text": rounded_size(host.memory)}


@app.command("list")
def list_(*, as_json: JsonFlag = False) -> None:
    """List hosts, with what their live machines take."""

    async def asking(client: AsyncClient) -> tuple[HostDocument, ...]:
        return await client.hosts.list()

    hosts = ask(asking)
    rows = [each.model_dump(mode="json") if as_json else _row(each) for each in hosts]
    output.print_table(_COLUMNS, rows, as_json=as_json, empty="no hypervisor works here")


@app.command()
def show(
    host: Annotated[str, typer.Argument(help="Name of a host.", autocompletion=completed("hosts"))],
    *,
    as_json: JsonFlag = False,
) -> None:
    """Show a host and its limits."""

    async def asking(client: AsyncClient) -> HostDocument:
        return await client.hosts.show(host)

    found = ask(asking)
    if as_json:
        output.print_json(found)
        return
    output.print_table(_COLUMNS, [_row(found)], as_json=False)
    for key, value in {**found.options, **found.limits}.items():
        if value is not None:
            print(f"{key}: {value}")


def emergency_stop(
    *,
    host: Annotated[
        str | None,
        typer.Option("--host", "-H", help="On this host.", autocompletion=completed("hosts")),
    ] = None,
    label: Annotated[
        str | None, typer.Option("--label", "-l", help='With this label: "key", "key=value".')
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Kill live machines at once, without asking their guests, and say what was done."""
    if every == (host is not None or label is not None):
        raise options.wrong(
            "emergency-stop",
            None if not every else "--all",
            "which machines: --host, --label, or --all",
            command="emergency-stop",
        )

    def told(operation: OperationDocument) -> str:
        lines = [f"{key}: {_words(value)}" for key, value in (operation.result or {}).items()]
        return "\n".join(lines) or "no machine was live"

    wanted = request("EmergencyStop", host=host, label=label)
    return change([wanted], How(True, dry_run, as_json), told)


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    return str(value)
