"""``vmlab disk``: disks that outlive machines and go from one to another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vmlab.cli import output
from vmlab.cli.manager.changing import DryRunFlag, How, WaitFlag, change, request
from vmlab.cli.manager.completing import completed
from vmlab.cli.manager.connecting import ask
from vmlab.cli.manager.options import ago
from vmlab.cli.output import Column, JsonFlag

if TYPE_CHECKING:
    from vmlab.manager.client import AsyncClient
    from vmlab.manager.documents import DiskDocument

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Disks of the manager's: make, attach, detach, grow and remove them.",
)

DiskArgument = Annotated[
    str, typer.Argument(help="Name or id of a disk.", autocompletion=completed("disks"))
]
_MachineArgument = Annotated[
    str, typer.Argument(help="Name or id of a machine.", autocompletion=completed("machines"))
]

_COLUMNS = (
    Column("name", "disk", no_wrap=True),
    Column("size_text", "size", justify="right"),
    Column("format", "format"),
    Column("state", "state"),
    Column("machine", "machine"),
    Column("device", "as"),
    Column("age", "age", justify="right"),
)


@app.command("list")
def list_(
    *,
    machine: Annotated[str | None, typer.Option("--machine", help="Only this one's.")] = None,
    state: Annotated[str | None, typer.Option("--state", help="Only in this state.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List disks."""

    async def asking(client: AsyncClient) -> tuple[DiskDocument, ...]:
        return await client.disks.list(machine=machine, state=state)

    rows = [_row(disk) for disk in ask(asking)]
    output.print_table(
        _COLUMNS,
        [_plain(row) for row in rows] if as_json else rows,
        as_json=as_json,
        empty="no disks; `vmlab disk create data 1G` makes one",
    )


def _row(disk: DiskDocument) -> dict[str, Any]:
    from vmlab.machine.sizes import rounded_size

    return {
        **disk.model_dump(mode="json"),
        "size_text": rounded_size(disk.size),
        "age": ago(disk.created),
    }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in {"size_text", "age"}}


@app.command()
def show(disk: DiskArgument, *, as_json: JsonFlag = False) -> None:
    """Show a disk."""

    async def asking(client: AsyncClient) -> DiskDocument:
        return await client.disks.show(disk)

    row = _row(ask(asking))
    if as_json:
        output.print_json(_plain(row))
    else:
        output.print_table(_COLUMNS, [row], as_json=False)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Its name.")],
    size: Annotated[
        str | None, typer.Argument(help='Its size, such as "1G"; that of --source if left out.')
    ] = None,
    *,
    source: Annotated[
        str | None,
        typer.Option("--source", help="Disk to copy.", autocompletion=completed("disks")),
    ] = None,
    format_: Annotated[
        Literal["raw", "qcow2"] | None, typer.Option("--format", help="raw if left out.")
    ] = None,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Make a disk, empty or a copy of another one; prints its name."""
    wanted = request("CreateDisk", name=name, size=size, source=source, format=format_)

    def told(operation: object) -> str:
        output.note(f"next: `vmlab disk attach {name} MACHINE`")
        return name

    return change([wanted], How(wait, dry_run, as_json), told)


@app.command()
def attach(
    disk: DiskArgument,
    machine: _MachineArgument,
    *,
    bus: Annotated[
        Literal["virtio", "scsi"] | None, typer.Option("--bus", help="Found if left out.")
    ] = None,
    readonly: Annotated[bool, typer.Option("--read-only", help="It may only read it.")] = False,
    mount_point: Annotated[
        str | None,
        typer.Option("--mount-point", help="Where its guest is expected to have it."),
    ] = None,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Give a disk to a machine, running or not."""
    wanted = request(
        "AttachDisk",
        disk=disk,
        machine=machine,
        bus=bus,
        readonly=readonly or None,
        mount_point=mount_point,
    )
    return change([wanted], How(wait, dry_run, as_json), lambda each: f"{machine} has {disk}")


@app.command()
def detach(
    disk: DiskArgument,
    *,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Take a disk from its machine."""
    wanted = request("DetachDisk", disk=disk)
    return change([wanted], How(wait, dry_run, as_json), lambda each: f"{disk} is nobody's")


@app.command()
def resize(
    disk: DiskArgument,
    size: Annotated[str, typer.Argument(help='Its new size, such as "2G".')],
    *,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Grow a disk."""
    wanted = request("ResizeDisk", disk=disk, size=size)
    return change([wanted], How(wait, dry_run, as_json), lambda each: f"{disk} has {size}")


@app.command()
def delete(
    disks: Annotated[
        list[str], typer.Argument(help="Names or ids.", autocompletion=completed("disks"))
    ],
    *,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Remove disks with what is on them; refused while a running machine has them."""
    return change(
        [request("DeleteDisk", disk=disk) for disk in disks],
        How(wait, dry_run, as_json),
        lambda operation: f"{operation.target_name or operation.target} is gone",
    )
