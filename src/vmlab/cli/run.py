"""``vmlab run``: boots a machine, runs a command in it as if it ran here, and clears it away."""

from __future__ import annotations

import gc
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmlab.cli import output

if TYPE_CHECKING:
    from vmlab.images import Progress
    from vmlab.lab.boot import Wish
    from vmlab.lab.session import Interrupts, Session
    from vmlab.lab.timeline import Timeline

__all__ = ["run"]

ImageOption = Annotated[
    str | None,
    typer.Option("--image", "-i", help="Image to boot; a tiny Debian if left out."),
]
KernelOption = Annotated[
    Path | None,
    typer.Option("--kernel", "-k", help="A bzImage or Image of your own, with vmlab's initramfs."),
]
InitrdOption = Annotated[
    Path | None, typer.Option("--initrd", help="An initramfs of your own for --kernel.")
]
AppendOption = Annotated[str, typer.Option("--append", help="Add to the kernel's command line.")]
ModulesOption = Annotated[
    Path | None, typer.Option("--modules", help="Directory with the modules of --kernel.")
]
HypervisorOption = Annotated[
    str | None,
    typer.Option(
        "--hypervisor",
        "-H",
        help="The hypervisor that runs it; the embedded engine where it can, else QEMU.",
    ),
]
HolderOption = Annotated[
    str | None,
    typer.Option("--hypervisor", "-H", help="The hypervisor that has it; found if left out."),
]
MemoryOption = Annotated[str, typer.Option("--memory", "-m", help='Memory, such as "512M".')]
CpusOption = Annotated[int, typer.Option("--cpus", "-c", min=1, help="Number of vCPUs.")]
ShareOption = Annotated[
    list[str] | None,
    typer.Option(
        "--share",
        "-s",
        metavar="DIR:/PLACE[:rw]",
        help="A directory of this host inside the guest, read-only unless :rw follows; repeatable.",
    ),
]
DiskOption = Annotated[
    list[str] | None,
    typer.Option("--disk", metavar="SIZE", help='An empty disk, such as "1G"; repeatable.'),
]
NetworkOption = Annotated[
    bool, typer.Option("--network", "-n", help="Give the guest a network (NAT, no root needed).")
]
GdbOption = Annotated[
    bool, typer.Option("--gdb", help="Wait for gdb before the first instruction; says how.")
]


def run(
    command: Annotated[
        list[str], typer.Argument(help="Program and arguments; one word with spaces is shell text.")
    ],
    *,
    image: ImageOption = None,
    kernel: KernelOption = None,
    initrd: InitrdOption = None,
    append: AppendOption = "",
    modules: ModulesOption = None,
    hypervisor: HypervisorOption = None,
    memory: MemoryOption = "512M",
    cpus: CpusOption = 1,
    share: ShareOption = None,
    disk: DiskOption = None,
    network: NetworkOption = False,
    gdb: GdbOption = False,
    copy_out: Annotated[
        list[str] | None,
        typer.Option(
            "--copy-out",
            metavar="/PATH[:HERE]",
            help="Copy a file or directory out afterwards, whatever the exit status; repeatable.",
        ),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the machine running, for `vmlab shell NAME`.")
    ] = False,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="Print where the time went, on stderr.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print it as one line of JSON, the last on stderr.")
    ] = False,
) -> int:
    """Boot a machine, run a command in it as if it ran here, and clear the machine away.

    Exit status, stdin, stdout, stderr and Ctrl-C pass through; on a terminal the command gets a
    terminal. Put `--` before the command: `vmlab run -- uname -a`.
    """
    from vmlab.lab.boot import Wish
    from vmlab.lab.errand import Errand, parse_copy_out

    wish = Wish(
        image=image, kernel=kernel, initrd=initrd, modules=modules, append=append, memory=memory,
        cpus=cpus, shares=tuple(share or ()), disks=tuple(disk or ()), network=network, gdb=gdb,
    )  # fmt: skip
    errand = Errand(
        words=tuple(command),
        copies=tuple(parse_copy_out(text) for text in copy_out or ()),
        detailed=timeline or as_json,
    )
    show = print_timeline_as_json if as_json else print_timeline if timeline else None
    return perform(wish, errand.run, hypervisor=hypervisor, keep=keep, show_timeline=show)


def perform(
    wish: Wish,
    body: Callable[[Session, Interrupts], Awaitable[int]],
    *,
    hypervisor: str | None,
    keep: bool = False,
    show_timeline: Callable[[Timeline], None] | None = None,
) -> int:
    """Fetch, boot, do, clear away: what `run` and `shell` share; returns the exit status."""
    # What is imported from here on stays: looking for garbage in it takes a fifth of the time.
    gc.disable()
    try:
        return _perform(wish, body, hypervisor, keep, show_timeline)
    finally:
        gc.enable()


def _perform(
    wish: Wish,
    body: Callable[[Session, Interrupts], Awaitable[int]],
    hypervisor: str | None,
    keep: bool,
    show_timeline: Callable[[Timeline], None] | None,
) -> int:
    from dataclasses import replace

    from vmlab.images import ImageStore
    from vmlab.lab import boot
    from vmlab.lab.preference import EMBEDDED, preference
    from vmlab.lab.session import Interrupted, run_session
    from vmlab.lab.terminal import on_terminal
    from vmlab.lab.timeline import Timeline

    async def collecting(session: Session, interrupts: Interrupts) -> int:
        gc.freeze()
        gc.enable()
        return await body(session, interrupts)

    chosen = preference(wish, hypervisor)
    named = wish.image or (chosen.tiny_image if wish.kernel is None else None)
    terminal, engine = on_terminal() or keep, chosen.hypervisor == EMBEDDED
    wish = replace(wish, image=named, terminal=terminal, engine=engine)
    boot.check(wish)
    steps = Timeline()
    with steps.step("image"), drawn_progress() as progress:
        image = boot.find_image(wish, ImageStore(), progress=progress)
    chosen = chosen.for_image(image, hypervisor)
    if chosen.reason:
        output.note(chosen.reason)
    wanted = boot.booted_by(wish, image)
    for note in wanted.notes:
        output.note(note)
    try:
        status = run_session(
            wanted,
            collecting,
            hypervisor=chosen.hypervisor,
            keep=keep,
            timeline=steps,
            tell=output.note,
        )
    except Interrupted as interrupted:
        return 128 + interrupted.number
    finally:
        if show_timeline is not None:
            show_timeline(steps)
    if keep:
        output.note(f"{wish.name} runs on: `vmlab shell {wish.name}`")
    return status


def attached(
    name: str, body: Callable[[Session, Interrupts], Awaitable[int]], *, hypervisor: str | None
) -> int:
    """Do something with a machine that was kept; returns the exit status."""
    from vmlab.lab.session import Interrupted, attach_session

    try:
        return attach_session(name, body, hypervisor=hypervisor)
    except Interrupted as interrupted:
        return 128 + interrupted.number


@contextmanager
def drawn_progress() -> Iterator[Progress]:
    """Draws how far the image is, on a terminal; says nothing elsewhere."""
    from vmlab.images.progress import ProgressEvent, silent

    if not sys.stderr.isatty():
        yield silent
        return
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    tasks: dict[str, TaskID] = {}
    with Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=output.console(stderr=True),
        transient=True,
    ) as bars:

        def draw(event: ProgressEvent) -> None:
            if event.step not in tasks:
                tasks[event.step] = bars.add_task(event.step, total=event.total)
            bars.update(tasks[event.step], completed=event.done, total=event.total)
            if event.finished:
                bars.remove_task(tasks.pop(event.step))

        yield draw


def timeline_text(steps: Timeline) -> str:
    """The steps and their seconds, one to a line, and what they add up to."""
    rows = [(step.seconds, step.name) for step in steps.steps]
    return "\n".join(
        f"{seconds:8.3f} s  {name}" for seconds, name in [*rows, (steps.seconds, "in all")]
    )


def print_timeline(steps: Timeline) -> None:
    """Print the steps and their seconds on stderr."""
    output.note(timeline_text(steps))


def print_timeline_as_json(steps: Timeline) -> None:
    """Print the same as one line of JSON, for programs that take the last line of stderr."""
    import json

    rows = [{"step": step.name, "seconds": round(step.seconds, 6)} for step in steps.steps]
    output.note(json.dumps({"timeline": rows, "seconds": round(steps.seconds, 6)}))
