"""Whose a machine is: one that `vmlab run --keep` left, or one of the manager's.

A name can be both, since neither store knows of the other; then somebody has to say which is meant.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Literal

import typer

from vmlab.cli import output
from vmlab.cli.manager.connecting import ask, extra
from vmlab.machine.errors import MachineNotFound, ResourceNotFound, VmlabError

__all__ = ["Keeper", "KeeperOption", "keepers", "kept_names"]

Keeper = Literal["kept", "manager"]
KeeperOption = Annotated[
    Keeper | None,
    typer.Option(
        "--store",
        help="Whose machine: one that `vmlab run --keep` left, or the manager's; found if left "
        "out.",
    ),
]


def keepers(
    names: Sequence[str], given: Keeper | None = None, hypervisor: str | None = None
) -> dict[str, Keeper]:
    """In which store each machine is.

    Args:
        names: Of machines, or their ids.
        given: What somebody said.
        hypervisor: Of a kept machine, if somebody said so: it is a kept one then.

    Raises:
        MachineNotFound: neither has one of that name.
        VmlabError: both have one.
    """
    if given is None and hypervisor is not None:
        given = "kept"
    if given is not None:
        return dict.fromkeys(names, given)
    kept = {name for name in names if _is_kept(name)}
    try:
        managed = _managed(names)
    except VmlabError as error:
        if kept != set(names):
            raise
        output.note(f"{error}; whether it has a machine of that name too is not known")
        managed = set()
    return {name: _keeper(name, name in kept, name in managed) for name in names}


def _keeper(name: str, kept: bool, managed: bool) -> Keeper:
    if kept and managed:
        raise VmlabError(
            f"there are two machines {name!r}: one that `vmlab run --keep` left, and one of the "
            "manager's",
            hint="`--store kept` or `--store manager` says which is meant",
        )
    if kept:
        return "kept"
    if managed:
        return "manager"
    raise MachineNotFound(
        f"there is no machine {name!r}",
        hint="`vmlab list` shows the manager's; `vmlab run --keep` leaves one, and says its name",
        machine=name,
    )


def _is_kept(name: str) -> bool:
    from vmlab.hypervisors.ownership import Store
    from vmlab.lab.preference import holder

    try:
        holder(name, Store.open().owner, None)
    except MachineNotFound:
        return False
    return True


def kept_names() -> list[str]:
    """The machines that `vmlab run --keep` left, by name."""
    from vmlab.hypervisors import registry
    from vmlab.hypervisors.ownership import Store
    from vmlab.hypervisors.records import MachineRecords

    owner = Store.open().owner
    found = set()
    for hypervisor in registry.names():
        records = MachineRecords(owner, hypervisor)
        for id_ in records.ids():
            with suppress(VmlabError):
                # Gone meanwhile, or damaged, which its own hypervisor tells.
                found.add(str(records.load(id_)["spec"]["name"]))
    return sorted(found)


def _managed(names: Sequence[str]) -> set[str]:
    """Which of the names the manager has; none where no manager has ever been."""
    if not _has_manager():
        return set()
    with extra():
        from vmlab.manager.client import AsyncClient

    async def asking(client: AsyncClient) -> set[str]:
        found = set()
        for name in names:
            try:
                await client.machines.show(name)
            except ResourceNotFound:
                continue
            found.add(name)
        return found

    return ask(asking)


def _has_manager() -> bool:
    if os.environ.get("VMLAB_URL"):
        return True
    if importlib.util.find_spec("httpx") is None:
        return False
    from vmlab.hypervisors.ownership import Home

    directory = Home.path() / "manager"
    return bool(os.environ.get("VMLAB_DATABASE_URL")) or (directory / "manager.sqlite3").exists()
