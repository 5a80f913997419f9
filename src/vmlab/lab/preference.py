"""Which hypervisor runs a machine when nobody has named one: the embedded engine, where it can.

What it cannot do is QEMU's, and that is told. A machine that was kept is looked for where it is.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vmlab.hypervisors import registry
from vmlab.machine.architecture import Architecture, host_architecture
from vmlab.machine.errors import MachineNotFound, VmlabError

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner
    from vmlab.images import Image
    from vmlab.lab.boot import Wish

EMBEDDED: Final = "embedded"
QEMU: Final = "qemu"
TINY: Final = {
    Architecture.X86_64: "debian-12-amd64-tiny",
    Architecture.RISCV64: "debian-13-riscv64-tiny",
    Architecture.AARCH64: "debian-13-arm64-tiny",
    Architecture.PPC64LE: "debian-13-ppc64el-tiny",
}
"""The tiny image of each architecture."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Who is to run a machine.

    Attributes:
        hypervisor: Its name.
        reason: Why it is not the one that runs machines otherwise; empty if it is, or was named.
    """

    hypervisor: str
    reason: str = ""

    @property
    def tiny_image(self) -> str:
        """The image that it boots when none is named: one that runs well on it."""
        if self.hypervisor == EMBEDDED:
            return TINY[Architecture.RISCV64]
        return TINY[host_architecture() or Architecture.X86_64]

    def for_image(self, image: Image, named: str | None) -> Preference:
        """The same now that the image is known, whose architecture may be another one."""
        if named is not None or self.hypervisor != EMBEDDED:
            return self
        if image.architecture is Architecture.RISCV64:
            return self
        return _qemu(_not_its_own(image.name, image.architecture))


def preference(wish: Wish, named: str | None) -> Preference:
    """Who is to run the machine that is wished for.

    Args:
        wish: The machine; its image may not be known yet.
        named: The hypervisor that somebody has named, if any.
    """
    if named is not None:
        return Preference(named)
    lacking = _lacking(wish)
    return _qemu(lacking) if lacking else Preference(EMBEDDED)


def architecture_of(image: str) -> Architecture | None:
    """The architecture of an image; None where it is found out only when it is fetched.

    Raises:
        RecipeError: it is a recipe's file, and not a valid one.
    """
    for architecture, tiny in TINY.items():
        if image == tiny:
            return architecture
    from vmlab.images import ImageStore

    store = ImageStore()
    known = store.recipe(image) or store.find(image)
    return known.architecture if known is not None else None


def _not_its_own(image: str | None, architecture: Architecture) -> str:
    return f"it runs riscv64 guests, and {image} is {architecture.value}"


def _qemu(lacking: str) -> Preference:
    return Preference(QEMU, f"on QEMU, and not on the embedded engine: {lacking}")


def _lacking(wish: Wish) -> str:
    """What the embedded engine does not have for a machine, in words; empty if it has all."""
    from vmlab.hypervisors.embedded.hypervisor import HOSTS
    from vmlab.machine.spec import ShareKind

    if platform.machine().lower() not in HOSTS:
        return f"it has no code for {platform.machine()}"
    architecture = architecture_of(wish.image) if wish.image is not None else None
    if architecture is not None and architecture is not Architecture.RISCV64:
        return _not_its_own(wish.image, architecture)
    for share in wish.parsed_shares:
        if share.kind is ShareKind.COPY:
            continue
        # A copy has to do where nothing can mount it.
        if share.kind is not ShareKind.AUTO or not share.readonly or _qemu_is_installed():
            return "it mounts no directories yet"
    networked = wish.network or any(nic.network == "user" for nic in wish.nics)
    if networked and shutil.which("passt") is None:
        return "a network needs passt there, which is not installed"
    return ""


def _qemu_is_installed() -> bool:
    from vmlab.hypervisors.accelerators import QEMU_BINARIES

    architecture = host_architecture() or Architecture.X86_64
    return shutil.which(QEMU_BINARIES[architecture]) is not None


def holder(name: str, owner: Owner, named: str | None) -> str:
    """The hypervisor that has a machine of a store's.

    Args:
        name: Of the machine, or its id.
        owner: The store.
        named: The hypervisor that somebody has named, if any.

    Raises:
        MachineNotFound: there is no such machine.
    """
    from vmlab.hypervisors.records import MachineRecords

    if named is not None:
        return named
    for hypervisor in registry.names():
        records = MachineRecords(owner, hypervisor)
        for id_ in records.ids():
            try:
                spec = records.load(id_).get("spec", {})
            except VmlabError:
                # Gone meanwhile, or damaged, which its own hypervisor tells.
                continue
            if name in {id_, spec.get("name") if isinstance(spec, dict) else None}:
                return hypervisor
    raise MachineNotFound(
        f"there is no machine {name!r}",
        hint="`vmlab run --keep` leaves one, and says its name",
        machine=name,
    )
