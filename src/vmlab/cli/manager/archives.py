"""``vmlab export`` and ``vmlab import``: a machine as one file.

The manager has a directory of its own for such files, and takes names there alone. With the home's
own manager, files anywhere on this host are moved out of it and linked into it; with another one
they are downloaded, uploaded, and removed there afterwards.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmlab.cli import output
from vmlab.cli.manager import options
from vmlab.cli.manager.changing import DryRunFlag, How, change, request
from vmlab.cli.manager.connecting import ask, extra
from vmlab.cli.manager.options import MachineArgument
from vmlab.cli.manager.snapshots import Made
from vmlab.cli.output import JsonFlag
from vmlab.machine.errors import InvalidSpec, OperationFailed, VmlabError

if TYPE_CHECKING:
    from vmlab.manager.client import AsyncClient
    from vmlab.manager.documents import OperationDocument

__all__ = ["export", "import_"]


def export(
    machine: MachineArgument,
    file: Annotated[
        Path | None,
        typer.Argument(help="File to write (tar); the machine's name and .tar if left out."),
    ] = None,
    *,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Write a machine at rest, with its disks, to one file; `vmlab import` makes it again.

    Prints the file.
    """
    with extra():
        from vmlab.manager.lending import passing_name

    name = passing_name()
    target = (file or Path(f"{machine}.tar")).absolute()
    if os.path.lexists(target) or not target.parent.is_dir():
        raise options.wrong(
            "FILE", str(file), "a place that is free, in a directory that is there",
            command="export",
        )  # fmt: skip

    async def settled(client: AsyncClient, operation: OperationDocument) -> None:
        if operation.dry_run:
            return
        if _is_elsewhere():
            await client.exports.download(name, target)
            await _forget(client, name)
            return
        written = str((operation.result or {}).get("path", name))
        try:
            shutil.move(written, target)
        except OSError as error:
            raise OperationFailed(
                f"{written} cannot be moved to {target}: {error.strerror or error}",
                hint="it stays where it is for a week: move it yourself",
            ) from error

    wanted = request("ExportMachine", machine=machine, path=name)
    return change([wanted], How(True, dry_run, as_json), lambda each: str(target), after=settled)


def import_(
    file: Annotated[Path, typer.Argument(help="File of `vmlab export`.")],
    name: Annotated[str | None, typer.Argument(help="Its name; as exported if left out.")] = None,
    *,
    dry_run: DryRunFlag = False,
    as_json: JsonFlag = False,
) -> int:
    """Make a machine of an exported file; prints its name.

    A manager at a URL is sent the file, which takes a token of scope `admin`.
    """
    made = Made()
    how = How(True, dry_run, as_json)
    _check(file)
    with _sent(file) if _is_elsewhere() else _lent(file) as there:
        wanted = request("ImportMachine", path=there, name=name)
        try:
            return change([wanted], how, made.told, after=made.looked_up)
        except VmlabError as error:
            # What it is called there, and where, nobody has been told.
            error.message = re.sub(rf"\S*{there}", lambda _: str(file), error.message)
            raise


def _check(file: Path) -> None:
    """Refuse what is no exported machine, before all of it is copied or sent.

    Raises:
        InvalidSpec: it is no file that can be read.
        VmlabError: it is something else.
    """
    with extra():
        from vmlab.manager.machine_archive import read_manifest

    try:
        if file.is_fifo():
            # It can be read once.
            return
        file.open("rb").close()
    except OSError as error:
        raise _unreadable(file, error) from error
    read_manifest(file)


def _is_elsewhere() -> bool:
    """Whether the manager is not the home's own, whose files are here."""
    return bool(os.environ.get("VMLAB_URL"))


@contextmanager
def _sent(file: Path) -> Iterator[str]:
    """A name of a file among the exports of the manager of VMLAB_URL, while the block lasts.

    Raises:
        VmlabError: what the manager raised.
    """
    from vmlab.manager.lending import passing_name

    name = passing_name()
    output.note(f"sending {file}")
    ask(lambda client: client.exports.upload(name, file))
    try:
        yield name
    finally:
        ask(lambda client: _forget(client, name))


async def _forget(client: AsyncClient, name: str) -> None:
    """Remove an archive that is of no use any more; what was done with it is done."""
    try:
        await client.exports.delete(name)
    except VmlabError as error:
        output.note(f"{name} stays among the manager's exports for a week: {error}")


@contextmanager
def _lent(file: Path) -> Iterator[str]:
    """A name of a file among the exports of the home's manager, for as long as the block lasts.

    Raises:
        InvalidSpec: it is no file that can be read.
    """
    with extra():
        from vmlab.hypervisors.ownership import Home
        from vmlab.manager.client.address import directory_of
        from vmlab.manager.lending import lent

    exports = directory_of(Home.open()) / "exports"
    with ExitStack() as stack:
        lending = lent(file, exports, copying=lambda: output.note(f"copying {file}"))
        try:
            name = stack.enter_context(lending)
        except OSError as error:
            raise _unreadable(file, error) from error
        yield name


def _unreadable(file: Path, error: OSError) -> InvalidSpec:
    expected = f"a file that can be read: {error.strerror}"
    return options.wrong("FILE", str(file), expected, command="import")
