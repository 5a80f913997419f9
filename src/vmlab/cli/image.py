"""``vmlab image``: build, import, list, show, verify, remove and prune images.

Parses, calls `vmlab.images`, prints. `progress_bars` draws the work of a store for any command.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.output import Column, JsonFlag

if TYPE_CHECKING:
    from vmlab.images import Image, ImageStore, Progress, ProgressEvent

__all__ = ["app", "progress_bars"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Kernels, initramfs and disks for guests: build, import, look at, keep in order.",
)

StoreOption = Annotated[
    Path | None,
    typer.Option("--store", help="Directory of the image store.", show_default=False),
]
Reference = Annotated[str, typer.Argument(help="Name, recipe file, or beginning of a digest.")]


def _store(root: Path | None) -> ImageStore:
    from vmlab.images import ImageStore

    return ImageStore(root)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Draw progress on stderr while the block runs: bars with rates on a terminal, else lines."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from vmlab.cli.amounts import work_bars

    with work_bars(output.console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def draw(event: ProgressEvent) -> None:
            task = tasks.get(event.step)
            if task is None:
                task = tasks[event.step] = bars.add_task(
                    event.step, total=event.total, unit=event.unit
                )
            if event.finished:
                total = event.total or event.done or 1
                bars.update(task, total=total, completed=total)
                bars.stop_task(task)
            else:
                bars.update(task, total=event.total, completed=event.done)

        yield draw


def _lines() -> Progress:
    """One line for each step, for logs: nothing that moves."""
    told: set[str] = set()

    def tell(event: ProgressEvent) -> None:
        if event.step not in told:
            told.add(event.step)
            size = ""
            if event.total and event.unit == "bytes":
                size = f" ({event.total / (1 << 20):.1f} MiB)"
            output.note(f"{event.step}{size}")

    return tell


@app.command()
def build(
    image: Reference,
    *,
    update: Annotated[
        bool, typer.Option("--update", help="Look for a newer package index first.")
    ] = False,
    index: Annotated[
        str | None,
        typer.Option(help="Build from this index snapshot (its digest).", show_default=False),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Build it a second time and compare the bytes."),
    ] = False,
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> ExitCode:
    """Build an image, if it is not in the store, and tell where it is.

    IMAGE is a built-in recipe (`vmlab image list --all` names them) or a recipe file. Packages
    come from the mirrors that this host's apt uses, or VMLAB_DEBIAN_MIRROR; every byte is checked
    against the archive's signature. `vmlab image show NAME --recipe` prints a recipe to begin
    your own with.
    """
    images = _store(store)
    differences: dict[str, tuple[str, str]] = {}
    with progress_bars() as progress:
        found = images.ensure(image, refresh=update, index=index, progress=progress)
        if check:
            recipe = images.recipe(image)
            if recipe is None:
                raise typer.BadParameter(f"{image!r} was imported, there is nothing to build")
            found, differences = images.build_twice(recipe, progress=progress)
    row = _row(found)
    if check:
        row["differences"] = {role: list(pair) for role, pair in differences.items()}
    if as_json:
        output.print_json(row)
    else:
        _print_image(found)
        for role, (stored, new) in differences.items():
            output.print_error(f"{role} differs: {stored} in the store, {new} built now")
        if check and not differences:
            print("built again: the same bytes")
    return ExitCode.FAILED if differences else ExitCode.OK


@app.command("import")
def import_(
    name: Annotated[str, typer.Argument(help="What the image is called from now on.")],
    *,
    kernel: Annotated[
        Path | None, typer.Option(help="bzImage, Image or vmlinux.", show_default=False)
    ] = None,
    initrd: Annotated[
        Path | None, typer.Option(help="An initramfs for the kernel.", show_default=False)
    ] = None,
    disk: Annotated[
        Path | None,
        typer.Option(help="A qcow2, raw or cloud image; may be compressed.", show_default=False),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="A tarred root of any distribution.", show_default=False),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Needed for a disk alone.", show_default=False)
    ] = None,
    cmdline: Annotated[
        str | None, typer.Option(help="The kernel's command line.", show_default=False)
    ] = None,
    channel: Annotated[
        list[str] | None,
        typer.Option(help="How to talk to it: agent, qga, ssh, console.", show_default=False),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help='Size of the disk made of a root, such as "4G".', show_default=False),
    ] = None,
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Copy a kernel, an initramfs, a disk, a cloud image or a tarred root into the store.

    Examples: `vmlab image import mine --kernel bzImage --initrd initrd.img`; `vmlab image import
    cloud --disk image.qcow2 --architecture x86_64`; `vmlab image import alpine --root
    rootfs.tar.gz`. Imported images are never pruned: only `vmlab image remove`
    takes them away.
    """
    from vmlab.images.importing import Parts, import_image

    images = _store(store)
    with progress_bars() as progress:
        found = import_image(
            images,
            name,
            Parts(kernel=kernel, initrd=initrd, disk=disk, root=root),
            architecture=_architecture(architecture),
            cmdline=cmdline,
            channels=_channels(channel),
            size=_size(size),
            progress=progress,
        )
    if as_json:
        output.print_json(_row(found))
    else:
        _print_image(found)


def _architecture(text: str | None) -> Any:
    from vmlab.machine.architecture import parse_architecture

    return None if text is None else _parsed("--architecture", text, parse_architecture)


def _size(text: str | None) -> Any:
    from vmlab.machine.sizes import parse_size

    return None if text is None else _parsed("--size", text, parse_size)


def _parsed(option: str, text: str, parse: Any) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option} {text!r}: {error}") from error


def _channels(given: list[str] | None) -> tuple[str, ...] | None:
    known = ("agent", "qga", "ssh", "console")
    for channel in given or ():
        if channel not in known:
            raise typer.BadParameter(f"--channel {channel!r}: one of {', '.join(known)}")
    return tuple(given) if given else None


@app.command("list")
def list_(
    everything: Annotated[
        bool, typer.Option("--all", help="Also the recipes that were not built yet.")
    ] = False,
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """List the images in the store, and with --all the recipes that come with vmlab."""
    from vmlab.images import recipe as recipes

    images = _store(store)
    rows = [_row(image) for image in images.images()]
    if everything:
        built = {row["name"] for row in rows}
        for name in recipes.builtin_names():
            if name not in built:
                recipe = recipes.builtin(name)
                rows.append(
                    {
                        "name": name,
                        "architecture": recipe.architecture.value,
                        "origin": "recipe, not built",
                        "description": recipe.description,
                    }
                )
    for row in rows:
        row["megabytes"] = round(row["size"] / 1e6) if "size" in row else None
        row["short"] = row["digest"][:12] if "digest" in row else None
    output.print_table(
        [
            Column("name", "NAME", no_wrap=True),
            Column("architecture", "ARCHITECTURE"),
            Column("megabytes", "MB", justify="right"),
            Column("kernel_release", "KERNEL"),
            Column("channels", "CHANNELS"),
            Column("origin", "ORIGIN"),
            Column("short", "DIGEST", no_wrap=True),
        ],
        rows,
        as_json=as_json,
        empty="no images yet; `vmlab image list --all` shows what can be built",
    )


@app.command()
def show(
    image: Reference,
    recipe: Annotated[
        bool, typer.Option("--recipe", help="Print the built-in recipe's text instead.")
    ] = False,
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show an image of the store: its files, their digests, and what it was made from."""
    from vmlab.images import recipe as recipes
    from vmlab.images.errors import ImageNotFound

    if recipe:
        text = recipes.builtin_text(image)
        if as_json:
            output.print_json(recipes.parse(text))
        else:
            print(text, end="")
        return
    images = _store(store)
    found = images.ensure(image) if images.recipe(image) is None else images.find(image)
    if found is None:
        raise ImageNotFound(
            f"image {image!r} is not in the store", hint=f"`vmlab image build {image}` makes it"
        )
    if as_json:
        output.print_json(_row(found))
    else:
        _print_image(found, details=True)


@app.command()
def verify(
    image: Annotated[
        str | None, typer.Argument(help="One image; all without it.", show_default=False)
    ] = None,
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> ExitCode:
    """Read every byte of the images and say which are not as they were written.

    Ends with status 1 if any is not. What can be built is built again when it is next asked for.
    """
    images = _store(store)
    with progress_bars() as progress:
        problems = images.verify(image, progress=progress)
    rows = [
        {"name": problem.image.name, "digest": problem.image.digest, "problem": problem.what}
        for problem in problems
    ]
    output.print_table(
        [Column("name", "NAME"), Column("problem", "PROBLEM")],
        rows,
        as_json=as_json,
        empty="every file is as it was written",
    )
    return ExitCode.FAILED if problems else ExitCode.OK


@app.command()
def remove(
    image: Annotated[list[str], typer.Argument(help="Names or digests.")],
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Remove images from the store: by name all builds of it, by digest that one.

    An image that a machine uses is not removed.
    """
    images = _store(store)
    removed = [gone for reference in image for gone in images.remove(reference)]
    if as_json:
        output.print_json([{"name": gone.name, "digest": gone.digest} for gone in removed])
        return
    for gone in removed:
        print(f"removed {gone.name} {gone.digest[:12]}")


@app.command()
def prune(
    limit: Annotated[
        str | None,
        typer.Option(help='Keep at most this much, such as "2G".', show_default=False),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Remove all that can be built or fetched again.")
    ] = False,
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make room: remove leftovers, and what was used longest ago beyond the limit.

    The limit is images.limit of the configuration file, or VMLAB_IMAGE_STORE_LIMIT. Fetched files
    go before images; what was imported, or is in use, stays.
    """
    freed = _store(store).prune(_size(limit), everything=everything)
    if as_json:
        output.print_json({"bytes": freed.size, "images": freed.images, "files": freed.files})
        return
    print(
        f"freed {freed.size / 1e6:.1f} MB: {len(freed.images)} images, {freed.files} fetched files"
    )


def _row(image: Image) -> dict[str, Any]:
    """All that there is to know of an image, for JSON and tables."""
    return {
        **image.to_manifest(),
        "size": image.size,
        "directory": str(image.directory),
        "kernel": None if image.kernel is None else str(image.kernel),
        "initrd": None if image.initrd is None else str(image.initrd),
        "disk": None if image.disk is None else str(image.disk),
    }


def _print_image(image: Image, *, details: bool = False) -> None:
    lines = [
        ("name", image.name),
        ("digest", image.digest),
        ("architecture", image.architecture.value),
        ("kernel", image.kernel),
        ("initrd", image.initrd),
        ("disk", image.disk),
        ("release", image.kernel_release or None),
        ("cmdline", image.cmdline or None),
        ("channels", ", ".join(image.channels)),
        ("origin", image.origin),
    ]
    for name, value in lines:
        if value is not None:
            print(f"{name + ':':14}{value}")
    if details:
        for role, file in sorted(image.files.items()):
            print(f"{role + ' sha256:':14}{file.sha256} ({file.size} bytes)")
        for key, value in image.source.items():
            print(f"{key + ':':14}{value}")
