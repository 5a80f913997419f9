"""``vmlab token``: who may ask a manager that is asked over TCP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vmlab.cli import output
from vmlab.cli.manager import options
from vmlab.cli.manager.connecting import ask
from vmlab.cli.output import Column, JsonFlag

if TYPE_CHECKING:
    from vmlab.manager.api.security import IssuedToken, TokenDocument
    from vmlab.manager.client import AsyncClient

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Tokens for managers that are asked over TCP.",
)

_COLUMNS = (
    Column("id", "token", no_wrap=True),
    Column("name", "name"),
    Column("user", "user"),
    Column("scope", "scope"),
    Column("created", "made"),
    Column("expires", "expires"),
    Column("last_used", "last used"),
)


@app.command("list")
def list_(*, as_json: JsonFlag = False) -> None:
    """List tokens, without what is secret about them."""

    async def asking(client: AsyncClient) -> tuple[TokenDocument, ...]:
        return await client.tokens.list()

    rows = [each.model_dump(mode="json") for each in ask(asking)]
    output.print_table(
        _COLUMNS, rows, as_json=as_json, empty="no tokens; `vmlab token create laptop` makes one"
    )


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    *,
    scope: Annotated[
        Literal["read", "operate", "admin"] | None,
        typer.Option("--scope", help="What it allows; operate if left out."),
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", help="Whose it is; admin's if left out.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", help='How long it is good for, such as "30d".')
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a token, and print it: it is told this once."""

    expires_in = options.duration("--expires", expires, command="token create")

    async def asking(client: AsyncClient) -> IssuedToken:
        return await client.tokens.create(name, scope=scope, user=user, expires_in=expires_in)

    made = ask(asking)
    if as_json:
        output.print_json(made)
        return
    print(made.token)
    output.note("clients take it from VMLAB_TOKEN; it is not told again")


@app.command()
def revoke(
    tokens: Annotated[list[str], typer.Argument(help="Ids: `vmlab token list` tells them.")],
) -> None:
    """Have tokens be good for nothing from now on."""

    async def asking(client: AsyncClient) -> None:
        for token in tokens:
            await client.tokens.revoke(token)
            print(f"{token} is revoked")

    ask(asking)
