"""``vmlab console``: the serial console of a machine that was kept, or of the manager's."""

from __future__ import annotations

from typing import Annotated

import typer

from vmlab.cli.manager.choice import KeeperOption, keepers
from vmlab.cli.manager.completing import completed
from vmlab.cli.run import HolderOption

__all__ = ["console"]


def console(
    name: Annotated[
        str,
        typer.Argument(
            help="A machine that `vmlab run --keep` left, or one of the manager's.",
            autocompletion=completed("machines"),
        ),
    ],
    *,
    log: Annotated[
        bool, typer.Option("--log", help="Print what it has printed so far, and end.")
    ] = False,
    store: KeeperOption = None,
    hypervisor: HolderOption = None,
) -> int:
    """Attach to a machine's serial console: what it printed so far, then live; Ctrl-] leaves it.

    Of what one of the manager's machines printed, the last 512 KiB are shown; `--log` has all.
    """
    if keepers([name], store, hypervisor)[name] == "manager":
        from vmlab.cli.manager.inside import shown

        return shown(name, log)
    from vmlab.lab.session import Interrupted, with_kept
    from vmlab.lab.terminal import show_console

    try:
        return with_kept(name, lambda machine: show_console(machine, log), hypervisor=hypervisor)
    except Interrupted as interrupted:
        return 128 + interrupted.number
