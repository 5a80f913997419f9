"""Templates: an image is booted once, stands still, and each machine is a fork of it.

What a template is is its key: all that the guest could tell (image, memory, vCPUs, disks, NICs,
shares' tags, ...) and what runs it. A template belongs to the lab that booted it. Where several
processes work together they share a directory: the first one boots and leaves a snapshot there,
the others make their own template of that, so that whose process ends takes nothing from anybody.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from vmlab.hypervisors.base import Machine, Snapshot
from vmlab.hypervisors.locks import POLL_S, FileLock
from vmlab.hypervisors.threads import done_in_thread, in_thread
from vmlab.lab.boot import Bootable
from vmlab.lab.bringup import reached
from vmlab.lab.timeline import Step, Timeline
from vmlab.lab.venue import Venue
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import CorruptSnapshot, SnapshotNotFound, UnsupportedOperation
from vmlab.machine.spec import MachineSpec, ShareKind

__all__ = ["NAME", "Fork", "Templates", "why_no_template"]

NAME: Final = "template"
"""What a template calls itself, until it is somebody."""

MOST: Final = 4
"""Templates that a lab keeps of one hypervisor; the one that was used least recently goes."""

_SNAPSHOT: Final = "template"
_RECORD: Final = "template.json"


@dataclass(frozen=True, slots=True)
class Fork:
    """A machine that stands still and is to be somebody.

    Attributes:
        machine: The machine.
        macs: The MAC addresses that its guest remembers, by NIC.
        steps: What it took to have a template, if there was none yet.
    """

    machine: Machine
    macs: Mapping[str, str]
    steps: tuple[Step, ...] = ()


@dataclass(slots=True)
class _Template:
    machine: Machine
    macs: Mapping[str, str]
    users: int = 0


@dataclass(slots=True)
class _Slot:
    """Where a template is or will be; `why_not` once it is known that there can be none."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    template: _Template | None = None
    why_not: str = ""


def why_no_template(venue: Venue, spec: MachineSpec) -> str:
    """Why a machine cannot be a fork of one that was booted before; empty if it can."""
    if venue.hypervisor.owner.kind == "store":
        return "a template in a store would outlive this process"
    if Capability.FORK not in venue.capabilities.supported:
        return venue.capabilities.unsupported.get(Capability.FORK, "it cannot fork")
    if spec.deterministic:
        return "a deterministic machine is booted by itself"
    for nic in spec.nics:
        if nic.network.startswith(("tap:", "bridge:")):
            return f"there is only one {nic.network}"
        if any(forward.host for forward in nic.forwards):
            return "there is only one of a port of this host"
        if nic.mac is not None:
            return f"NIC {nic.name!r} has an address of its own"
    for share in spec.shares:
        if share.kind is ShareKind.VIRTIOFS:
            return f"share {share.tag!r} is by virtiofs, whose state cannot be saved"
        if Capability.SHARE_9P not in venue.capabilities.supported:
            return "shares are not by 9p, whose device alone can be saved"
    return ""


def template_spec(wanted: Bootable) -> MachineSpec:
    """The template of a machine, as a specification.

    Its shares are devices that nothing is mounted from yet, which is what can be saved: each fork
    mounts them for itself.
    """
    spec = wanted.spec
    own, general = f"vmlab.hostname={spec.name}", f"vmlab.hostname={NAME}"
    words = [general if word == own else word for word in spec.boot.cmdline.split(" ")]
    boot = spec.boot.model_copy(update={"cmdline": " ".join(words)})
    shares = tuple(share.model_copy(update={"kind": ShareKind.P9}) for share in spec.shares)
    return spec.renamed(NAME).with_changes(boot=boot, shares=shares, seed=0)


def key_of(spec: MachineSpec, image: str, venue: Venue) -> str:
    """The key of a template: of all that makes it different from another one."""
    document = {
        "spec": spec.model_dump(mode="json"),
        "image": image,
        "hypervisor": f"{venue.name} {venue.capabilities.version}",
    }
    text = json.dumps(document, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Templates:
    """The templates of one hypervisor in a lab; used on its event loop only.

    Args:
        venue: The hypervisor.
        shared: Directory that other processes of the same tests have as well; None is none.
        gone: Told the key of a template that is no more.
    """

    def __init__(
        self,
        venue: Venue,
        shared: Path | None = None,
        *,
        gone: Callable[[str], None] = lambda key: None,
    ) -> None:
        self._venue = venue
        self._shared = shared
        self._gone = gone
        self._slots: OrderedDict[str, _Slot] = OrderedDict()

    def key(self, wanted: Bootable) -> str:
        """The key of a machine's template, whether there is or can be one or not."""
        return key_of(template_spec(wanted), wanted.image.digest, self._venue)

    def lacks(self, wanted: Bootable) -> str | None:
        """The key of the template that a machine's fork would have to have made first, if any."""
        if why_no_template(self._venue, wanted.spec):
            return None
        key = self.key(wanted)
        slot = self._slots.get(key)
        return key if slot is None or (slot.template is None and not slot.why_not) else None

    async def fork(self, wanted: Bootable, *, patience: float) -> Fork | str:
        """A fork of the template of a machine, or why there can be none.

        Args:
            wanted: The machine.
            patience: Seconds that the template has to boot, if there is none yet.

        Raises:
            VmlabError: the template does not boot, or cannot be forked now.
        """
        if reason := why_no_template(self._venue, wanted.spec):
            return reason
        spec = template_spec(wanted)
        key = key_of(spec, wanted.image.digest, self._venue)
        slot = self._slots.setdefault(key, _Slot())
        self._slots.move_to_end(key)
        timeline = Timeline()
        async with slot.lock:
            if slot.template is None and not slot.why_not:
                with timeline.step("template"):
                    try:
                        slot.template = await self._made(key, spec, patience)
                    except BaseException:
                        self._gone(key)
                        raise
            template = slot.template
            if template is None:
                return slot.why_not
            template.users += 1
        try:
            with timeline.step("fork"):
                machine = await template.machine.fork(wanted.spec.name)
        except UnsupportedOperation as error:
            slot.why_not, slot.template = error.hint or error.message, None
            await template.machine.delete(force=True)
            self._gone(key)
            return slot.why_not
        finally:
            template.users -= 1
        await self._trim()
        return Fork(machine, template.macs, tuple(timeline.steps))

    @property
    def keys(self) -> frozenset[str]:
        """The keys of the templates that there are."""
        return frozenset(key for key, slot in self._slots.items() if slot.template is not None)

    async def discard(self, keep: Container[str] = ()) -> int:
        """Remove the templates that nobody is forking; returns how many those were.

        Args:
            keep: Keys of those that stay in any case.
        """
        idle = [key for key, slot in self._slots.items() if key not in keep and _is_idle(slot)]
        for key in idle:
            await self._drop(key)
        return len(idle)

    async def _trim(self) -> None:
        kept = [key for key, slot in self._slots.items() if slot.template is not None]
        for key in kept[: max(0, len(kept) - MOST)]:
            if _is_idle(self._slots[key]):
                await self._drop(key)

    async def _drop(self, key: str) -> None:
        template = self._slots.pop(key).template
        assert template is not None
        await template.machine.delete(force=True)
        self._gone(key)

    async def _made(self, key: str, spec: MachineSpec, patience: float) -> _Template:
        """The template of this process, from what another one left or booted here."""
        name = f"{NAME}-{key}"
        if self._shared is None:
            machine = await self._booted(spec.with_changes(name=name), patience)
        else:
            place = self._shared / key
            async with _alone(place.with_suffix(".lock")):
                machine = await self._common(place, spec.with_changes(name=name), patience)
        macs = {nic.name: nic.mac for nic in (await machine.info()).nics}
        remembered = await self._remembered(key)
        return _Template(machine, remembered or macs)

    async def _booted(self, spec: MachineSpec, patience: float) -> Machine:
        """Boot a template and have it stand still."""
        machine = await self._venue.hypervisor.create(spec)
        try:
            await machine.start()
            guest = await reached(machine, Timeline(), patience)
            await guest.close()
            await machine.pause()
        except BaseException:
            await machine.delete(force=True)
            raise
        return machine

    async def _common(self, place: Path, spec: MachineSpec, patience: float) -> Machine:
        """The template that lies in `place`, or one that is booted here and left there."""
        left = await done_in_thread(_left_in, place)
        if left is not None:
            try:
                return await self._venue.hypervisor.create_from(left, spec.name)
            except (CorruptSnapshot, SnapshotNotFound):
                await done_in_thread(shutil.rmtree, place)
        machine = await self._booted(spec, patience)
        if Capability.MEMORY_SNAPSHOT in self._venue.capabilities.supported:
            try:
                await self._leave(machine, place)
            except BaseException:
                await machine.delete(force=True)
                raise
        return machine

    async def _leave(self, machine: Machine, place: Path) -> None:
        """Leave a template for others."""
        snapshot = await machine.snapshot(_SNAPSHOT, memory=True)
        if snapshot.directory is None:
            # Nothing that another process could use; each boots its own.
            await machine.delete_snapshot(_SNAPSHOT)
            return
        macs = {nic.name: nic.mac for nic in (await machine.info()).nics}
        await in_thread(lambda check: _publish(snapshot, macs, place))

    async def _remembered(self, key: str) -> dict[str, str] | None:
        """The MAC addresses that the guest of a shared template had when it was booted."""
        if self._shared is None:
            return None
        path = self._shared / key / _RECORD
        return await done_in_thread(_macs_in, path)


def _is_idle(slot: _Slot) -> bool:
    return slot.template is not None and not slot.template.users and not slot.lock.locked()


class _alone:
    """While it is entered, no other process makes the template."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: FileLock | None = None

    async def __aenter__(self) -> None:
        await done_in_thread(lambda: self._path.parent.mkdir(parents=True, exist_ok=True))
        # Held by another process, whose end no event of this loop tells.
        while (lock := FileLock.take(self._path)) is None:  # noqa: ASYNC110  # see above
            await asyncio.sleep(POLL_S)
        self._lock = lock

    async def __aexit__(self, *_: object) -> None:
        assert self._lock is not None
        self._lock.release()


def _publish(snapshot: Snapshot, macs: Mapping[str, str], place: Path) -> None:
    """Put a snapshot's files into `place`, all at once, with what has to be known of it."""
    assert snapshot.directory is not None
    part = place.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    shutil.move(snapshot.directory, part / "snapshot")
    moved = snapshot.model_copy(update={"directory": place / "snapshot"})
    record = {"snapshot": moved.model_dump(mode="json"), "macs": dict(macs)}
    (part / _RECORD).write_text(json.dumps(record), "utf-8")
    part.rename(place)


def _left_in(place: Path) -> Snapshot | None:
    """The snapshot that another process left; None if there is none that can be read."""
    try:
        record = json.loads((place / _RECORD).read_text("utf-8"))
        return Snapshot.model_validate(record["snapshot"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, ValidationError):
        shutil.rmtree(place, ignore_errors=True)
        return None


def _macs_in(path: Path) -> dict[str, str] | None:
    try:
        found = json.loads(path.read_text("utf-8"))["macs"]
        return {str(nic): str(mac) for nic, mac in found.items()}
    except (OSError, ValueError, LookupError):
        return None
