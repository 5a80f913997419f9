"""``vmlab shell``: a shell in a machine that was kept, of the manager's, or in a fresh one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vmlab.cli.manager.choice import KeeperOption, keepers
from vmlab.cli.manager.completing import completed
from vmlab.cli.run import (
    AppendOption,
    CpusOption,
    DiskOption,
    GdbOption,
    HypervisorOption,
    ImageOption,
    InitrdOption,
    KernelOption,
    MemoryOption,
    ModulesOption,
    NetworkOption,
    ShareOption,
    attached,
    perform,
)

if TYPE_CHECKING:
    from vmlab.lab.session import Interrupts, Session

__all__ = ["shell"]


def shell(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A machine that `vmlab run --keep` left, or the manager's; else a fresh one.",
            autocompletion=completed("machines"),
        ),
    ] = None,
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
    store: KeeperOption = None,
) -> int:
    """Open a shell in a machine; a fresh machine goes when the shell ends.

    Without a terminal it is given what stdin has to say.
    """
    from vmlab.lab.boot import Wish
    from vmlab.lab.errand import Errand

    words = ("/bin/sh", "-l")
    if name is not None and keepers([name], store, hypervisor)[name] == "manager":
        from vmlab.cli.manager.inside import performed

        return performed(name, words)
    errand = Errand(words=words)
    if name is None:
        wish = Wish(
            image=image, kernel=kernel, initrd=initrd, modules=modules, append=append,
            memory=memory, cpus=cpus, shares=tuple(share or ()), disks=tuple(disk or ()),
            network=network, gdb=gdb,
        )  # fmt: skip
        return perform(wish, errand.run, hypervisor=hypervisor)

    async def body(session: Session, interrupts: Interrupts) -> int:
        return await errand.run(session, interrupts)

    return attached(name, body, hypervisor=hypervisor)
