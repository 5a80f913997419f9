"""``vmlab exec``, and what `shell`, `console` and `copy` do with machines of the manager's."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmlab.cli.manager.choice import KeeperOption, keepers
from vmlab.cli.manager.connecting import ask
from vmlab.cli.manager.options import MachineArgument
from vmlab.cli.run import HolderOption, attached

if TYPE_CHECKING:
    from vmlab.lab.session import Interrupts
    from vmlab.manager.client import AsyncClient
    from vmlab.manager.client.streams import RemoteCommand

__all__ = ["copied", "execute", "performed", "shown"]


def execute(
    name: MachineArgument,
    command: Annotated[
        list[str], typer.Argument(help="Program and arguments; one word with spaces is shell text.")
    ],
    *,
    store: KeeperOption = None,
    hypervisor: HolderOption = None,
) -> int:
    """Run a command in a machine's guest as if it ran here.

    Exit status, stdin, stdout, stderr and Ctrl-C pass through; on a terminal the command gets a
    terminal. Put `--` before the command: `vmlab exec web -- uname -a`.
    """
    if keepers([name], store, hypervisor)[name] == "manager":
        return performed(name, command)
    from vmlab.lab.errand import Errand

    return attached(name, Errand(words=tuple(command)).run, hypervisor=hypervisor)


def performed(name: str, words: Sequence[str]) -> int:
    """Run a command of words in a machine of the manager's; returns its exit status."""

    async def body(client: AsyncClient, interrupts: Interrupts) -> int:
        from vmlab.lab.terminal import on_terminal

        if on_terminal():
            return await _on_terminal(client, name, _argv(words))
        return await _here(client, interrupts, name, _argv(words))

    return _inside(body)


def shown(name: str, only_log: bool) -> int:
    """Show the console of a machine of the manager's, and type on it until Ctrl-]."""

    async def body(client: AsyncClient, interrupts: Interrupts) -> int:
        from vmlab.lab.passthrough import to_file
        from vmlab.lab.terminal import converse

        if only_log:
            await to_file(1)(await client.machines.log(name))
            return 0
        async with client.machines.console(name, history=sys.maxsize) as console:
            return await converse(console)

    return _inside(body)


def copied(
    name: str, *, into: tuple[Path, str] | None = None, out: tuple[str, Path] | None = None
) -> int:
    """Copy a file or tree into (from here, to there) or out of a machine of the manager's."""

    async def body(client: AsyncClient, interrupts: Interrupts) -> int:
        if into is not None:
            await client.machines.copy_in(name, *into)
        if out is not None:
            await client.machines.copy_out(name, *out)
        return 0

    return _inside(body)


def _argv(words: Sequence[str]) -> list[str]:
    """What is run for words: themselves, or a shell for one that is text for a shell."""
    from vmlab.lab.passthrough import shell_text

    text = shell_text(words)
    return ["/bin/sh", "-c", text] if list(words) == [text] else list(words)


def _inside(body: Callable[[AsyncClient, Interrupts], Coroutine[Any, Any, int]]) -> int:
    """Call `body` with a client; signals end it, or go where it says."""
    from vmlab.lab.session import Interrupts

    interrupts = Interrupts()

    async def asking(client: AsyncClient) -> int:
        task = asyncio.current_task()
        assert task is not None
        interrupts.install(task)
        return await body(client, interrupts)

    try:
        return ask(asking)
    except asyncio.CancelledError:
        if interrupts.number is None:
            raise
        return 128 + interrupts.number


async def _here(client: AsyncClient, interrupts: Interrupts, name: str, argv: Sequence[str]) -> int:
    """On this process's streams; SIGINT goes to the command, a third one ends the session."""
    from vmlab.lab.passthrough import Outlet, end_unread, from_file, has_input, refuse_unwritten
    from vmlab.manager.client.streams import perform

    pressed = 0
    outlets = Outlet(1), Outlet(2)
    async with client.machines.command(name, argv) as command:

        async def pass_on(number: int) -> None:
            nonlocal pressed
            pressed += 1
            if pressed >= 3:
                interrupts.to = None
                interrupts.end(number)
            else:
                await command.signal(number)

        interrupts.to = pass_on
        ending = asyncio.ensure_future(end_unread(command.signal, outlets))
        try:
            exit_ = await perform(
                command,
                from_file(0) if has_input(0) else None,
                stdout=outlets[0].take,
                stderr=outlets[1].take,
            )
        finally:
            interrupts.to = None
            ending.cancel()
            await asyncio.wait({ending})
    refuse_unwritten(outlets)
    return exit_.status


async def _on_terminal(client: AsyncClient, name: str, argv: Sequence[str]) -> int:
    """With this process's terminal, whose size is followed."""
    from vmlab.lab.passthrough import from_file, to_file
    from vmlab.lab.terminal import ENVIRONMENT, raw, resizing_window

    size = os.get_terminal_size(1)
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    changed = asyncio.Event()
    async with client.machines.command(
        name, argv, env=environment, terminal=(size.lines, size.columns)
    ) as command:
        with raw(0), resizing_window(changed.set):
            parts = {
                asyncio.ensure_future(command.feed(from_file(0))),
                asyncio.ensure_future(_follow_size(command, changed)),
            }
            try:
                exit_ = await command.wait(stdout=to_file(1), stderr=to_file(2))
            finally:
                for part in parts:
                    part.cancel()
                await asyncio.wait(parts)
    return exit_.status


async def _follow_size(command: RemoteCommand, changed: asyncio.Event) -> None:
    while True:
        await changed.wait()
        changed.clear()
        with suppress(OSError):
            size = os.get_terminal_size(1)
            await command.resize(size.lines, size.columns)
