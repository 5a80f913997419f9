"""``vmlab backup`` and ``vmlab restore-backup``: the manager's store in a file, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmlab.cli import output
from vmlab.cli.manager.connecting import extra
from vmlab.machine.errors import OperationFailed
from vmlab.machine.sizes import rounded_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmlab.manager.settings import Settings
    from vmlab.manager.store.backup import Backup, DiskFile

__all__ = ["backup", "restore_backup"]

_TOLD = ("machines", "disks", "networks", "templates", "snapshots", "operations", "events")
"""Tables that a person is told the rows of."""


def backup(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Where to write it.", show_default=False)
    ],
    *,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Write over a file that is there.")
    ] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Save all that the manager knows: machines, disks, networks, operations, events, tokens.

    It is as of one moment, whatever is changed meanwhile; a manager that runs goes on. The files of
    disks and the machines' own are listed, not saved: that is for what saves files. FILE is
    yours alone to read: it holds what guests are told and the hashes of tokens.
    """
    with extra():
        from vmlab.manager.store.backup import save

        saved = save(_settings(), file, replace=force)
    if as_json:
        output.print_json(_as_row(saved))
        return
    print(f"{file}: {_counted(saved)}, {rounded_size(file.stat().st_size)}")
    if saved.disks:
        print("the files of its disks are not in it; --json lists them")


def restore_backup(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="What `vmlab backup` wrote.", show_default=False)
    ],
    *,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Take the place of a store that is there; it is saved."),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only read the file and say what is in it.")
    ] = False,
    as_json: output.JsonFlag = False,
) -> None:
    """Make the manager's store of a backup: all of it, or nothing.

    No manager may run meanwhile. The store is then as if its manager had been killed when the
    backup was made: the next one takes up the operations that were under way, and its observer
    finds what has changed in the world since.

    On PostgreSQL --replace drops vmlab's tables and makes them anew, in one transaction: their
    owner can, once nobody reads them and where nothing else refers to them; a manager of another
    home with the same database is not noticed. Permissions that others had are to be granted again.
    """
    with extra():
        from vmlab.manager.store.backup import read, restore

        if check:
            found = read(file)
            if as_json:
                output.print_json(_as_row(found))
            else:
                print(f"{file}: whole, of {found.created:%Y-%m-%d %H:%M:%S} UTC")
                print(_counted(found))
            return
        restored = restore(_settings(), file, replace=replace)
    if as_json:
        row = _as_row(restored.backup)
        row["replaced"] = restored.replaced
        row["missing"] = _disks(restored.missing)
        output.print_json(row)
        return
    print(f"restored {_counted(restored.backup)}")
    if restored.replaced is not None:
        print(f"what was there before is in {restored.replaced}")
    for disk in restored.missing:
        output.note(f"disk {disk.disk}: its file {disk.path} is not there")


def _settings() -> Settings:
    """The settings of this home, whose store it is about.

    Raises:
        OperationFailed: VMLAB_URL says that another manager is meant.
    """
    from vmlab.manager.client.address import find
    from vmlab.manager.settings import Settings

    address = find()
    if address.home is None:
        raise OperationFailed(
            f"VMLAB_URL says {address}: a store is saved and restored where it is",
            hint="run this on the manager's host, with VMLAB_URL unset and its VMLAB_HOME",
        )
    return Settings.from_environment()


def _counted(saved: Backup) -> str:
    told = [(table, saved.rows.get(table, 0)) for table in _TOLD]
    return ", ".join(
        f"{number} {table.removesuffix('s') if number == 1 else table}" for table, number in told
    )


def _as_row(saved: Backup) -> dict[str, Any]:
    return {
        "file": saved.path,
        "created": saved.created,
        "vmlab": saved.vmlab,
        "database": saved.database,
        "schema": saved.schema,
        "rows": dict(saved.rows),
        "disks": _disks(saved.disks),
    }


def _disks(files: Sequence[DiskFile]) -> list[dict[str, Any]]:
    return [
        {"disk": each.disk, "path": each.path, "size": each.size, "allocated": each.allocated}
        for each in files
    ]
