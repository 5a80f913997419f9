"""``vmlab template``: what machines are made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmlab.cli import output
from vmlab.cli.manager import options
from vmlab.cli.manager.changing import DryRunFlag, How, WaitFlag, change, request
from vmlab.cli.manager.completing import completed
from vmlab.cli.manager.connecting import ask
from vmlab.cli.manager.making import (
    CpusOption,
    ImageOption,
    LabelsOption,
    MemoryOption,
    SpecOption,
    specification,
)
from vmlab.cli.output import Column, JsonFlag

if TYPE_CHECKING:
    from vmlab.manager.client import AsyncClient
    from vmlab.manager.documents import TemplateDocument

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Templates of the manager's: what machines are made of.",
)

TemplateArgument = Annotated[
    str, typer.Argument(help="Name of a template.", autocompletion=completed("templates"))
]

_COLUMNS = (
    Column("name", "template", no_wrap=True),
    Column("image", "image"),
    Column("vcpus", "vCPUs", justify="right"),
    Column("memory_text", "memory", justify="right"),
    Column("labels", "labels"),
    Column("machines", "machines", justify="right"),
    Column("age", "age", justify="right"),
)


@app.command("list")
def list_(*, as_json: JsonFlag = False) -> None:
    """List templates."""

    async def asking(client: AsyncClient) -> tuple[TemplateDocument, ...]:
        return await client.templates.list()

    templates = ask(asking)
    rows = [each.model_dump(mode="json") if as_json else _row(each) for each in templates]
    output.print_table(
        _COLUMNS,
        rows,
        as_json=as_json,
        empty="no templates; `vmlab template create web --image debian-12-amd64-tiny` makes one",
    )


def _row(template: TemplateDocument) -> dict[str, Any]:
    from vmlab.machine.sizes import rounded_size

    return {
        **template.model_dump(mode="json"),
        "memory_text": rounded_size(template.memory),
        "age": options.ago(template.created),
    }


@app.command()
def show(template: TemplateArgument, *, as_json: JsonFlag = False) -> None:
    """Show a template; --json has the whole specification, if it has one."""

    async def asking(client: AsyncClient) -> TemplateDocument:
        return await client.templates.show(template)

    found = ask(asking)
    if as_json:
        output.print_json(found)
    else:
        output.print_table(_COLUMNS, [_row(found)], as_json=False)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Its name.")],
    *,
    image: ImageOption = None,
    spec: SpecOption = None,
    cpus: CpusOption = None,
    memory: MemoryOption = None,
    label: LabelsOption = None,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Make a template of an image or a specification; prints its name."""
    if image is None and spec is None:
        raise options.wrong("template create", name, "--image or --spec", command="template create")
    wanted = request(
        "CreateTemplate",
        name=name,
        image=image,
        spec=None if spec is None else specification(Path(spec)),
        vcpus=cpus,
        memory=memory,
        labels=options.labels("--label", label, command="template create"),
    )

    def told(operation: object) -> str:
        output.note(f"next: `vmlab launch --template {name}`")
        return name

    return change([wanted], How(wait, dry_run, as_json), told)


@app.command()
def delete(
    templates: Annotated[
        list[str], typer.Argument(help="Names.", autocompletion=completed("templates"))
    ],
    *,
    wait: WaitFlag = True,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Remove templates that no machine was made of."""
    return change(
        [request("DeleteTemplate", template=template) for template in templates],
        How(wait, dry_run, as_json),
        lambda operation: f"{operation.target_name or operation.target} is gone",
    )
