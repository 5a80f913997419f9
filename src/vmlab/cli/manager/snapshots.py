"""``vmlab snapshot``, ``restore``, ``clone`` and ``migrate``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from vmlab.cli import output
from vmlab.cli.manager import options
from vmlab.cli.manager.changing import DryRunFlag, How, WaitFlag, change, request
from vmlab.cli.manager.completing import completed
from vmlab.cli.manager.connecting import ask
from vmlab.cli.manager.options import MachineArgument
from vmlab.cli.output import Column, JsonFlag

if TYPE_CHECKING:
    from vmlab.manager.client import AsyncClient
    from vmlab.manager.documents import OperationDocument, SnapshotDocument

__all__ = ["Made", "clone", "migrate", "restore", "snapshot"]

_COLUMNS = (
    Column("machine", "machine", no_wrap=True),
    Column("name", "snapshot", no_wrap=True),
    Column("memory", "memory"),
    Column("size", "bytes", justify="right"),
    Column("scheduled", "scheduled"),
    Column("created", "taken"),
    Column("expires", "expires"),
)


def snapshot(
    machine: MachineArgument,
    name: Annotated[
        str | None, typer.Argument(help="Name of the snapshot; the time if left out.")
    ] = None,
    *,
    memory: Annotated[
        bool | None,
        typer.Option("--memory/--no-memory", help="Save memory too; if it can be, by itself."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", help='When it may be removed, such as "7d" from now.')
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the machine's snapshots.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the one of that name.")] = False,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Save a machine's disks, and its memory if it runs; list snapshots, or remove one.

    `vmlab restore` brings one back.
    """
    if listed:
        _list(machine, as_json)
        return 0
    how = How(wait, dry_run, as_json)
    if delete:
        if name is None:
            raise options.wrong("--delete", machine, "the snapshot's name", command="snapshot")
        gone = request("DeleteSnapshot", machine=machine, name=name)
        return change([gone], how, lambda operation: f"snapshot {name} is gone")
    chosen = name or f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    wanted = request(
        "SnapshotMachine",
        machine=machine,
        name=chosen,
        memory=memory,
        expires=options.moment("--expires", expires, command="snapshot"),
    )

    def told(operation: OperationDocument) -> str:
        output.note(f"`vmlab restore {machine} {chosen}` brings it back")
        return chosen

    return change([wanted], how, told)


def _list(machine: str, as_json: bool) -> None:
    async def asking(client: AsyncClient) -> tuple[SnapshotDocument, ...]:
        return await client.machines.snapshots((await client.machines.show(machine)).id)

    rows = [each.model_dump() for each in ask(asking)]
    output.print_table(_COLUMNS, rows, as_json=as_json, empty=f"{machine} has no snapshots")


def restore(
    machine: MachineArgument,
    snapshot: Annotated[str, typer.Argument(help="Name of the snapshot.")],
    *,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Bring a snapshot of a machine back."""
    wanted = request("RestoreMachine", machine=machine, snapshot=snapshot)
    return change(
        [wanted],
        How(wait, dry_run, as_json),
        lambda operation: f"{operation.target_name or machine} is as it was in {snapshot}",
    )


class Made:
    """The name of a machine that an operation has made."""

    name = ""

    async def looked_up(self, client: AsyncClient, operation: OperationDocument) -> None:
        """Find it out, by the id that the operation's result has."""
        machine = (operation.result or {}).get("machine")
        if machine is not None:
            self.name = (await client.machines.show(str(machine))).name

    def told(self, operation: OperationDocument) -> str:
        """The name, and what to do next."""
        output.note(f"next: `vmlab show {self.name}`, `vmlab start {self.name}`")
        return self.name


def clone(
    machine: MachineArgument,
    name: Annotated[
        str | None, typer.Argument(help="Name of the new one; an own one if left out.")
    ] = None,
    *,
    snapshot: Annotated[
        str | None, typer.Option("--snapshot", help="From this snapshot; else as it is now.")
    ] = None,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Make a second machine of one, from a snapshot or as it is now; prints its name."""
    wanted = request("CloneMachine", machine=machine, name=name, snapshot=snapshot)

    made = Made()
    return change([wanted], How(wait, dry_run, as_json), made.told, after=made.looked_up)


def migrate(
    machine: MachineArgument,
    host: Annotated[
        str, typer.Argument(help="Host to move it to.", autocompletion=completed("hosts"))
    ],
    *,
    live: Annotated[
        bool | None, typer.Option("--live/--cold", help="While it runs; if it runs, by itself.")
    ] = None,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Move a machine to another host of the same hypervisor."""
    wanted = request("MigrateMachine", machine=machine, host=host, live=live)
    return change(
        [wanted],
        How(wait, dry_run, as_json),
        lambda operation: f"{operation.target_name or machine} is on {host}",
    )
