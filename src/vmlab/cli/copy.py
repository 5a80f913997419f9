"""``vmlab copy``: files and trees into and out of a machine that was kept, or the manager's."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer

from vmlab.cli.manager.choice import KeeperOption, keepers
from vmlab.cli.run import HolderOption, attached

if TYPE_CHECKING:
    from vmlab.lab.session import Interrupts, Session

__all__ = ["copy"]


def copy(
    source: Annotated[str, typer.Argument(help="PATH here, or NAME:/PATH in a machine.")],
    target: Annotated[str, typer.Argument(help="NAME:/PATH in a machine, or PATH here.")],
    *,
    store: KeeperOption = None,
    hypervisor: HolderOption = None,
) -> int:
    """Copy a file or a directory between here and a machine; modes and links are kept."""
    from vmlab.machine.errors import InvalidSpec, SpecProblem

    inside = [_in_machine(source), _in_machine(target)]
    if (inside[0] is None) == (inside[1] is None):
        raise InvalidSpec(
            [SpecProblem("copy", f"{source} {target}", "one of the two as NAME:/PATH")],
            what="command line",
            hint="`vmlab copy results vm-1:/root/results`, or the other way round",
        )

    place = Path(target)
    if inside[0] is not None and (target.endswith("/") or place.is_dir()):
        place /= PurePosixPath(inside[0][1]).name

    name = (inside[0] or inside[1] or ("", ""))[0]
    into = out = None
    if inside[1] is not None:
        path = inside[1][1]
        into = Path(source), path + Path(source).name if path.endswith("/") else path
    elif inside[0] is not None:
        out = inside[0][1], place
    if keepers([name], store, hypervisor)[name] == "manager":
        from vmlab.cli.manager.inside import copied

        return copied(name, into=into, out=out)

    async def body(session: Session, interrupts: Interrupts) -> int:
        if into is not None:
            await session.guest.copy_in(*into)
        if out is not None:
            await session.guest.copy_out(*out)
        return 0

    return attached(name, body, hypervisor=hypervisor)


def _in_machine(text: str) -> tuple[str, str] | None:
    """Machine and path of "NAME:/PATH"; None for a path here."""
    name, colon, path = text.partition(":")
    return (name, path) if colon and path.startswith("/") and "/" not in name else None
