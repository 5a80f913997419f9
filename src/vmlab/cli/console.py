"""``vmlab console``: the serial console of a machine that was kept."""

from __future__ import annotations

from typing import Annotated

import typer

from vmlab.cli.run import HolderOption

__all__ = ["console"]


def console(
    name: Annotated[str, typer.Argument(help="A machine that `vmlab run --keep` left.")],
    *,
    log: Annotated[
        bool, typer.Option("--log", help="Print what it has printed so far, and end.")
    ] = False,
    hypervisor: HolderOption = None,
) -> int:
    """Attach to a machine's serial console: what it printed so far, then live; Ctrl-] leaves it."""
    from vmlab.lab.session import Interrupted, with_kept
    from vmlab.lab.terminal import show_console

    try:
        return with_kept(name, lambda machine: show_console(machine, log), hypervisor=hypervisor)
    except Interrupted as interrupted:
        return 128 + interrupted.number
