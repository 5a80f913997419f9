"""``vmlab delete``: ends machines that were kept, removes those of the manager's."""

from __future__ import annotations

from typing import Annotated

import typer

from vmlab.cli.manager.changing import DryRunFlag, How, WaitFlag, change, request
from vmlab.cli.manager.choice import KeeperOption, keepers
from vmlab.cli.manager.completing import completed
from vmlab.cli.output import JsonFlag
from vmlab.cli.run import HolderOption

__all__ = ["delete"]


def delete(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Machines that `vmlab run --keep` left, or the manager's.",
            autocompletion=completed("machines"),
        ),
    ],
    *,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Kill what runs first; kept ones always are.")
    ] = False,
    store: KeeperOption = None,
    hypervisor: HolderOption = None,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Delete machines with their snapshots and the disks that are their own.

    Disks of `vmlab disk` are detached and stay. One of the manager's that runs is refused without
    --force.
    """
    places = keepers(names, store, hypervisor)
    managed = [name for name in names if places[name] == "manager"]
    kept = [name for name in names if places[name] == "kept"]
    status = 0
    if kept:
        status = _end_kept(kept, hypervisor, dry_run)
    if managed and status == 0:
        wanted = [request("DeleteMachine", machine=name, force=force or None) for name in managed]
        status = change(
            wanted,
            How(wait, dry_run, as_json),
            lambda operation: f"{operation.target_name or operation.target} is gone",
        )
    return status


def _end_kept(names: list[str], hypervisor: str | None, dry_run: bool) -> int:
    """Kill and delete machines that were kept."""
    from vmlab.hypervisors.base import Machine
    from vmlab.lab.session import Interrupted, with_kept

    async def end(machine: Machine) -> int:
        if dry_run:
            print(f"{machine.name} would be killed and deleted")
        else:
            await machine.delete(force=True)
        return 0

    try:
        for name in names:
            with_kept(name, end, hypervisor=hypervisor)
    except Interrupted as interrupted:
        return 128 + interrupted.number
    return 0
