"""``vmlab delete``: ends machines that were kept."""

from __future__ import annotations

from typing import Annotated

import typer

from vmlab.cli.run import HolderOption

__all__ = ["delete"]


def delete(
    names: Annotated[list[str], typer.Argument(help="Machines that `vmlab run --keep` left.")],
    *,
    hypervisor: HolderOption = None,
) -> int:
    """Kill and delete machines with their disks and snapshots."""
    from vmlab.hypervisors.base import Machine
    from vmlab.lab.session import Interrupted, with_kept

    async def end(machine: Machine) -> int:
        await machine.delete(force=True)
        return 0

    try:
        for name in names:
            with_kept(name, end, hypervisor=hypervisor)
    except Interrupted as interrupted:
        return 128 + interrupted.number
    return 0
