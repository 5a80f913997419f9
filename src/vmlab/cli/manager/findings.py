"""``vmlab findings``: where the store and the world differ, and what can be done about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.manager.changing import DryRunFlag, How, WaitFlag, change, request
from vmlab.cli.manager.completing import completed
from vmlab.cli.manager.connecting import ask
from vmlab.cli.manager.options import ago
from vmlab.cli.output import Column, JsonFlag

if TYPE_CHECKING:
    from vmlab.manager.client import AsyncClient
    from vmlab.manager.documents import FindingDocument

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="What the observer found: where the store and the world differ.",
)

FindingArgument = Annotated[
    str, typer.Argument(help="Id of a finding.", autocompletion=completed("findings"))
]

_COLUMNS = (
    Column("id", "finding", no_wrap=True),
    Column("severity", "severity"),
    Column("code", "code", no_wrap=True),
    Column("about", "about"),
    Column("message", "what"),
    Column("seen", "seen", justify="right"),
    Column("actions", "repairs"),
)


@app.command("list")
def list_(
    *,
    code: Annotated[str | None, typer.Option("--code", help="Only of this code.")] = None,
    severity: Annotated[
        Literal["info", "warning", "error", "critical"] | None,
        typer.Option("--severity", help="Only of this severity."),
    ] = None,
    subject: Annotated[
        str | None, typer.Option("--subject", help="Only about this (name or id).")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Also what is not so any more.")] = False,
    as_json: JsonFlag = False,
) -> ExitCode:
    """List findings; the exit status is 1 if there is one that is an error."""

    async def asking(client: AsyncClient) -> tuple[FindingDocument, ...]:
        return await client.findings.list(
            code=code, severity=severity, subject=subject, resolved=None if every else False
        )

    found = ask(asking)
    rows = [
        {
            **each.model_dump(mode="json"),
            **(
                {} if as_json else {"about": each.name or each.subject, "seen": ago(each.last_seen)}
            ),
        }
        for each in found
    ]
    output.print_table(_COLUMNS, rows, as_json=as_json, empty="nothing is found wrong")
    wrong = any(each.resolved is None and each.severity in {"error", "critical"} for each in found)
    return ExitCode.FAILED if wrong else ExitCode.OK


@app.command()
def show(finding: FindingArgument, *, as_json: JsonFlag = False) -> None:
    """Show a finding with its evidence."""

    async def asking(client: AsyncClient) -> FindingDocument:
        return await client.findings.show(finding)

    found = ask(asking)
    if as_json:
        output.print_json(found)
        return
    print(f"{found.code} ({found.severity}): {found.message}")
    print(f"about       {found.name or found.subject}")
    print(f"first seen  {ago(found.first_seen)} ago, last {ago(found.last_seen)} ago")
    print(f"policy      {found.policy}")
    for key, value in found.evidence.items():
        print(f"evidence    {key}: {value}")
    if found.resolved is not None:
        print(f"resolved    {ago(found.resolved)} ago")
    if found.hint:
        output.note(f"hint: {found.hint}")
    for action in found.actions:
        output.note(f"`vmlab findings repair {found.id} {action}`")


@app.command()
def repair(
    finding: FindingArgument,
    action: Annotated[
        Literal["report", "adopt", "reconcile", "quarantine"],
        typer.Argument(help="What to do: `vmlab findings show` says what can be done."),
    ],
    *,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help="What is to be removed, typed once more; needed where data would go."
        ),
    ] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Put back what that repair has done, where it can be.")
    ] = False,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Do something about a finding; it is an operation like any other."""
    wanted = request("RepairFinding", finding=finding, action=action, name=name, undo=undo or None)
    done = "undone" if undo else "done"
    return change([wanted], How(wait, dry_run, as_json), lambda each: f"{action} is {done}")
