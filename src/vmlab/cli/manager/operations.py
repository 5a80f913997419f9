"""``vmlab operations``: changes that were asked for, how they go, and how they ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vmlab.cli import output
from vmlab.cli.manager.changing import doing, watched
from vmlab.cli.manager.completing import completed
from vmlab.cli.manager.connecting import ask
from vmlab.cli.manager.options import ago
from vmlab.cli.output import Column, JsonFlag

if TYPE_CHECKING:
    from vmlab.manager.client import AsyncClient
    from vmlab.manager.documents import OperationDocument

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Changes that the manager was asked for: list, show, wait for and cancel them.",
)

OperationArgument = Annotated[
    str,
    typer.Argument(
        help="Id of an operation, or how it begins.", autocompletion=completed("operations")
    ),
]

_COLUMNS = (
    Column("id", "operation", no_wrap=True),
    Column("kind", "kind", no_wrap=True),
    Column("what", "of"),
    Column("state", "state"),
    Column("progress_text", "done", justify="right"),
    Column("doing", "what it does"),
    Column("actor", "by"),
    Column("age", "asked", justify="right"),
)


@app.command("list")
def list_(
    *,
    state: Annotated[
        Literal["queued", "running", "succeeded", "failed", "cancelled"] | None,
        typer.Option("--state", help="Only in this state."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help='Only of this kind, such as "machine.*".')
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Only of this machine, disk, ... (name or id).")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="The newest so many.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    """List operations, the newest first."""

    async def asking(client: AsyncClient) -> list[OperationDocument]:
        found: list[OperationDocument] = []
        async for operation in client.operations.each(state=state, kind=kind, target=target):
            found.append(operation)
            if len(found) == limit:
                break
        return found

    rows = [each.model_dump(mode="json") if as_json else _row(each) for each in ask(asking)]
    output.print_table(_COLUMNS, rows, as_json=as_json, empty="nothing was asked for")


def _row(operation: OperationDocument) -> dict[str, Any]:
    what = doing(operation) if operation.state in {"queued", "running"} else ""
    if operation.error is not None:
        what = str(operation.error.get("message", ""))
    return {
        **operation.model_dump(mode="json"),
        "what": operation.target_name or operation.target,
        "progress_text": f"{operation.progress:.0%}",
        "doing": what or ("dry run" if operation.dry_run else ""),
        "age": f"{ago(operation.created)} ago",
    }


@app.command()
def show(operation: OperationArgument, *, as_json: JsonFlag = False) -> None:
    """Show an operation: what was asked, its steps, how it ended."""

    async def asking(client: AsyncClient) -> OperationDocument:
        return await client.operations.show(operation)

    found = ask(asking)
    if as_json:
        output.print_json(found)
        return
    target = found.target_name or found.target or ""
    print(f"{found.kind} {target}: {found.state}{' (dry run)' if found.dry_run else ''}")
    print(f"asked {ago(found.created)} ago by {found.actor or 'nobody'}, {found.id}")
    for step in found.steps:
        took = ""
        if step.started is not None and step.ended is not None:
            took = f"  {(step.ended - step.started).total_seconds():.2f} s"
        print(f"  {step.state:<8} {step.text or step.name}{took}")
    if found.error is not None:
        print(f"error: {found.error.get('message')}")
        if found.error.get("hint"):
            output.note(f"hint: {found.error['hint']}")
    for key, value in (found.result or {}).items():
        print(f"{key}: {value}")


@app.command()
def wait(
    operations: Annotated[
        list[str], typer.Argument(help="Ids.", autocompletion=completed("operations"))
    ],
    *,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, help="Seconds to wait at most.")
    ] = None,
    as_json: JsonFlag = False,
) -> int:
    """Wait for operations to end; Ctrl-C leaves them to themselves."""
    return watched(operations, as_json=as_json, timeout=timeout)


@app.command()
def cancel(operation: OperationArgument, *, as_json: JsonFlag = False) -> None:
    """Have an operation undone and ended; it goes on until that is done."""

    async def asking(client: AsyncClient) -> OperationDocument:
        return await client.operations.cancel(operation)

    found = ask(asking)
    if as_json:
        output.print_json(found)
        return
    print(f"{found.kind} of {found.target_name or found.target} is being cancelled")
    output.note(f"`vmlab operations wait {found.id}` waits for its end")
