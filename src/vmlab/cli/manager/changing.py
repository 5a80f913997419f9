"""Asking the manager for changes: what goes on is shown, Ctrl-C cancels, the end is told.

What takes longer than a second has its step and its progress drawn on a terminal. The first Ctrl-C
asks the manager to cancel what it was asked for, the second leaves that to itself.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.manager.connecting import ask, extra
from vmlab.machine.errors import VmlabError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from vmlab.manager.client import AsyncClient
    from vmlab.manager.documents import OperationDocument

__all__ = ["DryRunFlag", "How", "WaitFlag", "change", "doing", "request", "watched"]

DryRunFlag = Annotated[
    bool, typer.Option("--dry-run", help="Only say, step by step, what would be done.")
]
WaitFlag = Annotated[
    bool,
    typer.Option("--wait/--no-wait", help="Wait for the end of it, or tell its operation at once."),
]

_SHOWN_AFTER: Final = 1.0
"""Seconds after which somebody wants to see what goes on."""
_REDRAWN: Final = 0.2

Told = Callable[["OperationDocument"], str]


@dataclass(frozen=True, slots=True)
class How:
    """What the options that all changes have say."""

    wait: bool = True
    dry_run: bool = False
    as_json: bool = False


def request(name: str, /, **fields: object) -> BaseModel:
    """The request of that name; what is None or empty is left to its own default.

    Args:
        name: Of a model in `vmlab.manager.requests`.
        **fields: Its fields.

    Raises:
        InvalidSpec: a field is wrong.
        ExtraMissing: the manager's packages are not installed.
    """
    with extra():
        from vmlab.machine.documents import build
        from vmlab.manager import requests

        model: type[BaseModel] = getattr(requests, name)
        given = {
            field: value
            for field, value in fields.items()
            if value is not None and value not in ((), {}, [])
        }
        return build(model, given)


def change(
    requests: Sequence[BaseModel],
    how: How,
    told: Told,
    *,
    after: Callable[[AsyncClient, OperationDocument], Any] | None = None,
) -> int:
    """Have the manager make changes, side by side, and tell how they ended.

    Args:
        requests: What is asked for.
        how: The options of the command.
        told: What to say of one that was done.
        after: Awaited with each that was done.

    Returns:
        The command's exit status: that of the first that was not done.
    """
    changes = _Changes(requests, how, told, after)
    try:
        return ask(changes.made)
    except asyncio.CancelledError:
        return ExitCode.INTERRUPTED


@dataclass
class _Changes:
    """Changes on their way, and what became of each."""

    requests: Sequence[BaseModel]
    how: How
    told: Told
    after: Callable[[AsyncClient, OperationDocument], Any] | None
    operations: dict[int, OperationDocument] = field(default_factory=dict)
    errors: dict[int, VmlabError] = field(default_factory=dict)
    cancelling: bool = False

    async def made(self, client: AsyncClient) -> int:
        async with _interrupts(lambda: self._cancel(client), self._left) as pressed:
            with _drawn(self):
                await asyncio.gather(
                    *(self._one(client, number, each) for number, each in enumerate(self.requests))
                )
        return self.tell(len(self.requests), interrupted=bool(pressed))

    async def _one(self, client: AsyncClient, number: int, wanted: BaseModel) -> None:
        async def seen(operation: OperationDocument) -> None:
            self.operations[number] = operation

        try:
            taken = await client.submit(wanted, wait=False, dry_run=self.how.dry_run)
            await seen(taken)
            if self.cancelling:
                await self._cancel_one(client, taken)
            if self.how.wait or self.how.dry_run:
                await seen(await client.wait(taken.id, watch=seen, known=taken))
            if self.after is not None and self.operations[number].state == "succeeded":
                await self.after(client, self.operations[number])
        except VmlabError as error:
            self.errors[number] = error

    async def _cancel(self, client: AsyncClient) -> None:
        self.cancelling = True
        if not self.operations:
            output.note("to be cancelled as soon as the manager has taken it")
        for operation in list(self.operations.values()):
            await self._cancel_one(client, operation)

    async def _cancel_one(self, client: AsyncClient, operation: OperationDocument) -> None:
        if operation.ended is not None:
            return
        try:
            await client.operations.cancel(operation.id)
        except VmlabError as error:
            output.note(f"{_named(operation)} cannot be cancelled: {error}")
        else:
            output.note(
                f"asked the manager to cancel {_named(operation)}; "
                "Ctrl-C once more leaves it to itself"
            )

    def _left(self) -> None:
        for operation in self.operations.values():
            if operation.ended is None:
                output.note(
                    f"{_named(operation)} goes on: `vmlab operations wait {operation.id}` "
                    "waits for its end"
                )

    def tell(self, count: int, *, interrupted: bool = False) -> int:
        """Print what became of each of `count`; returns the exit status."""
        if self.how.as_json:
            documents = [self.operations[number] for number in sorted(self.operations)]
            if documents or count != 1:
                output.print_json(documents if count != 1 else documents[0])
        statuses = []
        for number in range(count):
            operation, error = self.operations.get(number), self.errors.get(number)
            if error is None and operation is not None:
                status, error = self._said(operation)
                statuses.append(status)
            if error is not None:
                if count == 1:
                    raise error
                output.print_error(str(error), hint=error.hint)
                statuses.append(error.exit_code)
        if interrupted and any(each.state == "cancelled" for each in self.operations.values()):
            return ExitCode.INTERRUPTED
        return next((status for status in statuses if status), ExitCode.OK)

    def _said(self, operation: OperationDocument) -> tuple[int, VmlabError | None]:
        """Say how one ended, or is; the exit status, and its error if that is to be told."""
        from vmlab.manager.client.replies import ended

        if operation.dry_run:
            if not self.how.as_json:
                _print_plan(operation)
            return ExitCode.OK, None
        if operation.state == "cancelled":
            undone = sum(step.state == "undone" for step in operation.steps)
            output.note(
                f"{_named(operation)} was cancelled"
                + (f"; {undone} of its steps were undone" if undone else "")
            )
            return ExitCode.CANNOT, None
        if operation.state == "failed":
            try:
                ended(operation)
            except VmlabError as error:
                return error.exit_code, error
        if not self.how.as_json:
            if operation.state == "succeeded":
                print(self.told(operation))
            else:
                print(operation.id)
                output.note(
                    f"{_named(operation)} is {operation.state}: `vmlab operations wait "
                    f"{operation.id}` waits for its end"
                )
        return ExitCode.OK, None


def _named(operation: OperationDocument) -> str:
    """ "start of web1" of `machine.start`."""
    noun, _, verb = operation.kind.partition(".")
    what = operation.target_name or operation.target or noun
    return f"{verb or noun} of {what}"


def _print_plan(operation: OperationDocument) -> None:
    print(f"{_named(operation)} would:")
    for number, step in enumerate(operation.steps, 1):
        print(f"{number:3}. {step.text or step.name}")
    if not operation.steps:
        print("  do nothing")


# ------------------------------------------------------------------------------ Ctrl-C


@asynccontextmanager
async def _interrupts(
    cancel: Callable[[], Any], left: Callable[[], None]
) -> AsyncIterator[list[int]]:
    """The first Ctrl-C calls `cancel`, the second `left` and ends the command; SIGTERM as well.

    What is entered grows by the number of each signal that came. That something was cancelled is
    said before it is said what became of it, whichever the manager answered first.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    pressed: list[int] = []
    cancelling: set[asyncio.Task[None]] = set()

    def arrived(number: int) -> None:
        pressed.append(number)
        if len(pressed) == 1 and number == signal.SIGINT:
            cancelling.add(asyncio.ensure_future(cancel()))
        elif task is not None:
            left()
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, arrived, number)
    try:
        yield pressed
        await asyncio.gather(*cancelling)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        for each in cancelling:
            each.cancel()


# ------------------------------------------------------------------------------ what goes on


@contextmanager
def _drawn(changes: _Changes) -> Iterator[None]:
    """Draw what goes on, on a terminal, from the second second on."""
    drawing = asyncio.ensure_future(_draw(changes.operations)) if sys.stderr.isatty() else None
    try:
        yield
    finally:
        if drawing is not None:
            drawing.cancel()


async def _draw(operations: dict[int, OperationDocument]) -> None:
    await asyncio.sleep(_SHOWN_AFTER)
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[doing]}", markup=False),
        TimeElapsedColumn(),
        console=output.console(stderr=True),
        transient=True,
    ) as bars:
        tasks: dict[int, Any] = {}
        while True:
            for number, operation in operations.items():
                if number not in tasks:
                    tasks[number] = bars.add_task(_named(operation), total=1.0, doing="")
                bars.update(tasks[number], completed=operation.progress, doing=doing(operation))
            await asyncio.sleep(_REDRAWN)


def doing(operation: OperationDocument) -> str:
    """What an operation does now, in words."""
    if operation.state != "running":
        return "being cancelled" if operation.cancelling else operation.state
    step = next((step for step in reversed(operation.steps) if step.state == "running"), None)
    words = operation.message or (step.text or step.name if step is not None else "")
    return f"being cancelled: {words}" if operation.cancelling else words


def watched(operations: Sequence[str], *, as_json: bool, timeout: float | None) -> int:
    """Wait for operations that are under way, and tell how they ended; returns the exit status."""
    changes = _Changes((), How(as_json=as_json), lambda each: f"{_named(each)} has succeeded", None)

    async def waiting(client: AsyncClient) -> int:
        async def one(number: int, id_: str) -> None:
            async def seen(operation: OperationDocument) -> None:
                changes.operations[number] = operation

            try:
                await seen(await client.wait(id_, timeout=timeout, watch=seen))
            except VmlabError as error:
                changes.errors[number] = error

        with _drawn(changes):
            await asyncio.gather(*(one(number, each) for number, each in enumerate(operations)))
        return changes.tell(len(operations))

    return ask(waiting)
