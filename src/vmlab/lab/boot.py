"""From a wish ("this image, that kernel, so much memory") to the specification of a machine.

Images are built or fetched here, before anything is started; nothing here runs a machine.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmlab.guests.agent import CHANNELS
from vmlab.guests.shares import parse_share
from vmlab.images import Image, ImageStore, Progress
from vmlab.images.progress import silent
from vmlab.lab.debugger import KERNEL_OPTION, symbols_of
from vmlab.lab.ways import label_of
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.spec import Disk, MachineSpec, Nic, Share, ShareKind

TERMINAL: Final = "terminal"
"""The console of the kind virtio that commands get as their terminal."""
AUDIBLE: Final = "loglevel=5"
"""Has the kernel print its warnings on the console, which "quiet" would not: watchdogs read them
there (KERN_WARNING is 4, and what is below the console's level is printed)."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody wants to be booted, as they said it.

    Args:
        image: Name of an image; None until a hypervisor is chosen, or with a kernel.
        kernel: A kernel of one's own instead, in the tiny image of its architecture.
        initrd: An initramfs of one's own for it.
        modules: A directory with its modules.
        append: What to add to the kernel's command line.
        memory: Size, such as "512M".
        cpus: Number of vCPUs.
        shares: "HOST:GUEST[:ro|:rw]", a directory each, or as a specification has them.
        disks: Sizes of empty disks, such as "1G", or disks as a specification has them.
        nics: Network interfaces, beside that of `network`.
        terminal: Whether there is a terminal to be passed on.
        network: Whether the guest has a network (NAT, without root).
        gdb: Whether it waits for a debugger before its first instruction.
        engine: Whether the embedded engine is to run it, if its architecture is the engine's.
        seed: Source of what is random about the machine's devices.
    """

    image: str | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    modules: Path | None = None
    append: str = ""
    memory: str = "512M"
    cpus: int = 1
    shares: tuple[str | Share, ...] = ()
    disks: tuple[str | Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    terminal: bool = False
    network: bool = False
    gdb: bool = False
    engine: bool = False
    seed: int = 0
    name: str = field(default_factory=lambda: f"vm-{secrets.token_hex(3)}")

    @property
    def parsed_shares(self) -> list[Share]:
        """The shares as a specification has them.

        Raises:
            InvalidSpec: a text is none.
        """
        return [
            parse_share(share, f"share{number}") if isinstance(share, str) else share
            for number, share in enumerate(self.shares)
        ]


@dataclass(frozen=True, slots=True)
class Bootable:
    """A machine that can be created now, and what it boots."""

    spec: MachineSpec
    image: Image
    copies: MachineSpec
    """The same with the shares that are copied instead of mounted."""
    debugged: bool = False
    """Whether it waits for a debugger before its first instruction."""
    symbols: Path | None = None
    """The kernel's vmlinux, for the debugger."""
    notes: tuple[str, ...] = ()
    """What is done otherwise than the wish may mean, a sentence each."""


def check(wish: Wish) -> None:
    """Refuse a wish that contradicts itself, before anything is fetched.

    Raises:
        InvalidSpec: naming what is wrong and what would be right.
    """
    problems = []
    if wish.image is not None and wish.kernel is not None:
        problems.append(
            SpecProblem("--image", wish.image, "leave it out: --kernel brings its own initramfs")
        )
    for option, path in (("--initrd", wish.initrd), ("--modules", wish.modules)):
        if path is not None and wish.kernel is None:
            problems.append(SpecProblem(option, str(path), "needs --kernel"))
    for option, file in (("--kernel", wish.kernel), ("--initrd", wish.initrd)):
        if file is not None and not file.is_file():
            problems.append(SpecProblem(option, str(file), "a file that exists"))
    if wish.modules is not None and not wish.modules.is_dir():
        problems.append(SpecProblem("--modules", str(wish.modules), "a directory that exists"))
    for share in wish.parsed_shares:
        if not share.source.is_dir():
            text = f"{share.source}:{share.target}"
            problems.append(SpecProblem("--share", text, "a directory that exists, then :/GUEST"))
    if problems:
        raise InvalidSpec(
            problems, what="command line", hint="`vmlab run --help` shows what it takes"
        )
    specification(wish, "")


def find_image(wish: Wish, store: ImageStore, *, progress: Progress = silent) -> Image:
    """The image that is wished for, built or fetched first if it is not there.

    Raises:
        ImageError: of the kind that says why it cannot be had.
    """
    if wish.kernel is not None:
        return _with_own_kernel(wish, wish.kernel, store, progress)
    assert wish.image is not None, "without a kernel there is an image"
    return store.ensure(wish.image, progress=progress)


def _with_own_kernel(wish: Wish, kernel: Path, store: ImageStore, progress: Progress) -> Image:
    from vmlab.images.importing import with_kernel
    from vmlab.lab.own_kernel import check_modules, check_virtio

    if wish.modules is not None:
        check_modules(kernel, wish.modules)
    image = with_kernel(store, kernel, modules=wish.modules, initrd=wish.initrd, progress=progress)
    # What another initramfs brings, and how its guest is talked to, is its owner's business.
    if wish.initrd is None:
        transport = "virtio_mmio" if _by_engine(wish, image) else "virtio_pci"
        check_virtio(kernel, image, wish.modules, transport)
    return image


def _by_engine(wish: Wish, image: Image) -> bool:
    return wish.engine and image.architecture is Architecture.RISCV64


def booted_by(wish: Wish, image: Image) -> Bootable:
    """The machine that is wished for, booting `image`."""
    whole = specification(wish, image.cmdline, image)
    engine = _by_engine(wish, image)
    mounted, copied, notes = list[Share](), list[Share](), list[str]()
    for share in whole.shares:
        if engine and share.readonly and share.kind is ShareKind.AUTO:
            # The engine mounts none; what is only read can as well be copied.
            notes.append(f"{share.source} is copied to {share.target}: the engine mounts nothing")
            share = share.model_copy(update={"kind": ShareKind.COPY})
        (copied if share.kind is ShareKind.COPY else mounted).append(share)
    return Bootable(
        whole.with_changes(shares=tuple(mounted)),
        image,
        whole.with_changes(shares=tuple(copied)),
        debugged=wish.gdb,
        symbols=symbols_of(wish.kernel) if wish.gdb and wish.kernel is not None else None,
        notes=tuple(notes),
    )


def specification(wish: Wish, cmdline: str, image: Image | None = None) -> MachineSpec:
    """The machine that is wished for.

    Raises:
        InvalidSpec: a value of the wish is not what it has to be.
    """
    boot: dict[str, object] = {}
    fields: dict[str, object] = {}
    disks: list[dict[str, object] | Disk] = []
    channels: list[str] = list(CHANNELS)
    if image is not None:
        fields["architecture"] = image.architecture
        boot = {"kernel": image.kernel, "initrd": image.initrd}
        if image.disk is not None:
            disks.append({"name": "root", "source": image.disk, "format": image.disk_format})
        if "qga" in image.channels:
            channels.append("org.qemu.guest_agent.0")
    words = [cmdline]
    if image is not None:
        words += [AUDIBLE, f"vmlab.hostname={wish.name}"]
    if wish.network:
        words.append("vmlab.net=dhcp")
    if wish.gdb:
        words.append(KERNEL_OPTION)
    if image is None or image.kernel is not None:
        boot["cmdline"] = " ".join(filter(None, [*words, wish.append]))
    disks += [
        {"name": f"disk{number}", "size": disk} if isinstance(disk, str) else disk
        for number, disk in enumerate(wish.disks)
    ]
    consoles = [{"name": "serial", "kind": "serial"}]
    if wish.terminal:
        consoles.append({"name": TERMINAL, "kind": "virtio"})
    if image is not None:
        fields["labels"] = label_of(image.channels)
    return MachineSpec.of(
        name=wish.name,
        cpus=wish.cpus,
        memory=wish.memory,
        boot=boot,
        disks=disks,
        nics=[*([Nic(name="net0")] if wish.network else []), *wish.nics],
        shares=wish.parsed_shares,
        consoles=consoles,
        channels=channels,
        seed=wish.seed,
        **fields,
    )
