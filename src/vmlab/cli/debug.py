"""``vmlab debug``: the machine of a failed test, as it was when that failed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmlab.cli import output

if TYPE_CHECKING:
    from vmlab.lab.session import Interrupts, Session

__all__ = ["debug"]


def debug(
    result: Annotated[Path, typer.Argument(help="A run's directory, or its report.json.")],
    test: Annotated[
        str | None, typer.Argument(help="Name of the test, or a part of it, if several failed.")
    ] = None,
    *,
    machine: Annotated[
        str | None, typer.Option("--machine", help="Which machine, if the test had several.")
    ] = None,
    command: Annotated[
        str | None,
        typer.Option("--command", "-c", help="Run this in the guest instead of a shell."),
    ] = None,
    console: Annotated[
        bool, typer.Option("--console", help="Attach to the serial console; Ctrl-] leaves it.")
    ] = False,
    gdb: Annotated[
        bool, typer.Option("--gdb", help="Let gdb look into it; it stands still until that says.")
    ] = False,
) -> int:
    """Open the machine of a failed test as it was: a shell, its console, or gdb.

    It is brought back from the memory snapshot among the test's evidence, and goes when you leave;
    the evidence stays as it is.
    """
    from vmlab.cli.given import wrong
    from vmlab.lab.errand import Errand
    from vmlab.lab.postmortem import find_remains, with_console, with_debugger, with_remains
    from vmlab.lab.session import Interrupted
    from vmlab.lab.terminal import show_console

    if sum((command is not None, console, gdb)) > 1:
        raise wrong("--command, --console, --gdb", None, "one of them at most", command="debug")
    remains = find_remains(result, test, machine)
    output.note(f"{remains.machine} of {remains.test}, as it was when that ended")

    async def wait_for_gdb(line: str) -> int:
        output.note(f"it stands still and waits for gdb; Ctrl-C here ends it:\n  {line}")
        await asyncio.Event().wait()
        return 0

    words = ("/bin/sh", "-l") if command is None else ("/bin/sh", "-c", command)
    errand = Errand(words=words)

    async def body(session: Session, interrupts: Interrupts) -> int:
        return await errand.run(session, interrupts)

    try:
        if console:
            return with_console(remains, show_console)
        if gdb:
            return with_debugger(remains, wait_for_gdb)
        return with_remains(remains, body)
    except Interrupted as interrupted:
        return 128 + interrupted.number
