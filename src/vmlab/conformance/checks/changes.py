"""Changing a machine: disks, NICs, vCPUs and memory, while it runs and at rest.

"Uninterrupted" is judged by the guest's own time: during a hot-plug it has to pass as the clock
outside does, less what the profile allows. It is asked for outside of the time that is measured,
so that it does not matter how long a guest on a busy host takes to answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from vmlab.conformance.bench import Bench, of_type
from vmlab.conformance.checks.snapshots import has_disks, write_disks
from vmlab.conformance.registry import Means, check
from vmlab.hypervisors.base import Machine
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import OperationFailed
from vmlab.machine.events import EventType
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import Disk, Nic
from vmlab.machine.states import MachineState


@asynccontextmanager
async def uninterrupted(lab: Bench, machine: Machine, what: str) -> AsyncIterator[None]:
    """State that the guest runs on meanwhile, by its own time."""
    guest = lab.guest(machine)
    before = await guest.ticks()
    begun = lab.now()
    yield
    took = lab.now() - begun
    passed = (await guest.ticks() - before) / 1000
    # A guest's clock may be wrong by a little, by its calibration.
    lab.true(
        passed >= took * 0.95 - lab.profile.stall,
        f"{what} does not interrupt the guest ({passed:g} s of its time in {took:g} s)",
    )


@check(
    "change.hotplug-disk",
    clause="a disk plugged into a running machine is there for the guest, keeps what is written, "
    "and is gone after unplug; the guest runs on and keeps its other disks",
    needs=[Capability.HOTPLUG_DISK],
    means=[Means.GUEST],
)
async def hotplug_disk(lab: Bench) -> None:
    machine = await lab.run()
    guest = lab.guest(machine)
    kept = await write_disks(lab, guest)
    async with uninterrupted(lab, machine, "plugging a disk"):
        told = await machine.plug_disk(Disk(name="more", size=32 * MIB))
    lab.equal((told.name, told.size), ("more", 32 * MIB), "what plug_disk answers")
    seen = {disk.name: disk.size for disk in await guest.disks()}
    lab.equal(seen.get("more"), 32 * MIB, "the new disk by the guest's word")
    data = lab.bytes()
    await guest.write_disk("more", 4096, data)
    lab.equal(await guest.read_disk("more", 4096, 512), data, "contents of the new disk")
    lab.equal([d.name for d in (await machine.info()).disks][-1], "more", "the new disk by info")
    lab.equal([d.name for d in machine.spec.disks][-1], "more", "the new disk in the specification")
    async with uninterrupted(lab, machine, "unplugging a disk"):
        await machine.unplug_disk("more")
    left = [disk.name for disk in machine.spec.disks]
    lab.equal([disk.name for disk in await guest.disks()], left, "disks by the guest's word")
    lab.equal([disk.name for disk in (await machine.info()).disks], left, "disks by info")
    await has_disks(lab, machine, kept, "after plug and unplug")
    await machine.plug_disk(Disk(name="more", size=32 * MIB))
    again = await guest.read_disk("more", 4096, 512)
    lab.true(again != data, "a new disk of an old name does not have the old contents")


@check(
    "change.hotplug-nic",
    clause="a NIC plugged into a running machine is there for the guest and gone after unplug; "
    "the guest runs on",
    needs=[Capability.HOTPLUG_NIC],
    means=[Means.GUEST],
)
async def hotplug_nic(lab: Bench) -> None:
    machine = await lab.run()
    guest = lab.guest(machine)
    before = [nic.name for nic in await guest.nics()]
    async with uninterrupted(lab, machine, "plugging a NIC"):
        told = await machine.plug_nic(Nic(name="more", network="none"))
    lab.equal(told.name, "more", "what plug_nic answers")
    seen = {nic.name: nic.mac for nic in await guest.nics()}
    lab.equal(seen.get("more"), told.mac, "the new NIC's address by the guest's word")
    listed = {nic.name: nic.mac for nic in (await machine.info()).nics}
    lab.equal(listed.get("more"), told.mac, "the new NIC's address by info")
    async with uninterrupted(lab, machine, "unplugging a NIC"):
        await machine.unplug_nic("more")
    lab.equal([nic.name for nic in await guest.nics()], before, "NICs by the guest's word")
    lab.equal([nic.name for nic in (await machine.info()).nics], before, "NICs by info")


@check(
    "change.hotplug-vcpu",
    clause="vCPUs of a running machine can be added up to its maximum; the guest uses them",
    needs=[Capability.HOTPLUG_VCPU],
    means=[Means.GUEST],
)
async def hotplug_vcpu(lab: Bench) -> None:
    machine = await lab.run(cpus={"count": 1, "maximum": 4})
    guest = lab.guest(machine)
    lab.equal(await guest.vcpus(), 1, "vCPUs at first, by the guest's word")
    async with uninterrupted(lab, machine, "adding vCPUs"):
        told = await machine.resize(vcpus=3)
    lab.equal(told.vcpus, 3, "what resize answers")
    lab.equal(await guest.vcpus(), 3, "vCPUs afterwards, by the guest's word")
    lab.equal((await machine.info()).vcpus, 3, "vCPUs afterwards, by info")
    lab.equal(machine.spec.cpus.count, 3, "vCPUs afterwards, in the specification")


@check(
    "change.hotplug-memory",
    clause="memory of a running machine can be added up to its maximum; the guest uses it and "
    "keeps what it had",
    needs=[Capability.HOTPLUG_MEMORY],
    means=[Means.GUEST],
)
async def hotplug_memory(lab: Bench) -> None:
    small, large = 256 * MIB, 512 * MIB
    machine = await lab.run(memory={"size": small, "maximum": large})
    guest = lab.guest(machine)
    marker = lab.bytes()
    await guest.write_memory(0, marker)
    async with uninterrupted(lab, machine, "adding memory"):
        told = await machine.resize(memory=large)
    lab.equal(told.memory, large, "what resize answers")
    lab.equal(await guest.memory(), large, "memory afterwards, by the guest's word")
    lab.equal((await machine.info()).memory, large, "memory afterwards, by info")
    lab.equal(await guest.read_memory(0, len(marker)), marker, "what was in memory before")


@check(
    "change.resize-at-rest",
    clause="vCPUs and memory of a machine at rest can be changed both ways, and it starts with "
    "the new ones",
    needs=[Capability.RESIZE],
    means=[Means.GUEST],
)
async def resize_at_rest(lab: Bench) -> None:
    machine = await lab.create(cpus=2, memory=256 * MIB)
    # What a guest needs to boot is its profile's to know.
    for vcpus, memory in (lab.profile.sizes[-1], lab.profile.sizes[0]):
        told = await machine.resize(vcpus=vcpus, memory=memory)
        lab.equal((told.vcpus, told.memory), (vcpus, memory), "what resize answers")
        await machine.start()
        guest = lab.guest(machine)
        lab.equal(await guest.vcpus(), vcpus, "vCPUs by the guest's word")
        if (size := await lab.told(guest.memory(), "its memory")) is not None:
            lab.equal(size, memory, "memory by the guest's word")
        asked = (machine.spec.cpus.count, machine.spec.memory.size)
        lab.equal(asked, (vcpus, memory), "vCPUs and memory in the specification")
        await machine.stop()


@check(
    "change.resize-disk",
    clause="a disk grows, at rest and under a running guest, which sees it and keeps its contents",
    needs=[Capability.RESIZE_DISK],
    means=[Means.GUEST],
)
async def resize_disk(lab: Bench) -> None:
    machine = await lab.run()
    kept = await write_disks(lab, lab.guest(machine))
    name = lab.scratch[0]
    size = next(disk.size for disk in (await machine.info()).disks if disk.name == name)
    for running in (True, False):
        if not running:
            await machine.stop()
        size += 16 * MIB
        told = await machine.resize_disk(name, size)
        lab.equal((told.name, told.size), (name, size), "what resize_disk answers")
        if not running:
            await machine.start()
        what = "grown under the guest" if running else "grown at rest"
        seen = {disk.name: disk.size for disk in await lab.guest(machine).disks()}
        lab.equal(seen[name], size, f"size by the guest's word, {what}")
        listed = {disk.name: disk.size for disk in (await machine.info()).disks}
        lab.equal(listed[name], size, f"size by info, {what}")
        await has_disks(lab, machine, kept, what)
        end = lab.bytes()
        await lab.guest(machine).write_disk(name, size - 4096, end)
        found = await lab.guest(machine).read_disk(name, size - 4096, 512)
        lab.equal(found, end, f"the new end of the disk, {what}")


@check(
    "change.disk-in-place",
    clause="a disk that is a file is written to where it is, and the file stays, with what was "
    "written, when the disk or the machine goes; one live machine writes to it at a time, and "
    "while a guest can, the machine is not copied",
    needs=[Capability.DISK_IN_PLACE],
    means=[Means.GUEST],
)
async def disk_in_place(lab: Bench) -> None:
    path = lab.directory("images") / "kept.img"
    with path.open("xb") as image:
        image.truncate(16 * MIB)
    kept = Disk(name="kept", file=path, format="raw", bus=lab.profile.bus)
    disks = [*lab.profile.spec.disks, kept]
    machine = await lab.run(disks=disks)
    lab.equal((await machine.info()).disks[-1].path, path, "the disk's path by info")
    first, second = lab.bytes(), lab.bytes()
    await _written(lab, machine, 4096, first)
    other = await lab.create(disks=disks)
    await lab.refuses(OperationFailed, other.start(), "a second live machine with the file")
    for capability, copy in (
        (Capability.SNAPSHOT, lambda: machine.snapshot("refused")),
        (Capability.FORK, lambda: machine.fork(lab.name())),
    ):
        if lab.has(capability):
            await lab.refuses(OperationFailed, copy(), f"{capability.value} of its machine")
    if lab.has(Capability.HOTPLUG_DISK):
        await machine.unplug_disk("kept")
    await machine.delete(force=True)
    lab.equal(_in_file(path, 4096), first, "the file, when its machine is gone")
    await other.start()
    found = await lab.guest(other).read_disk("kept", 4096, 512)
    lab.equal(found, first, "what another machine reads")
    await _written(lab, other, 8192, second)
    await other.stop()
    if lab.has(Capability.RESIZE_DISK):
        await other.resize_disk("kept", 32 * MIB)
        lab.equal(path.stat().st_size, 32 * MIB, "the file's size, grown at rest")
    await other.unplug_disk("kept")
    lab.equal(_in_file(path, 4096), first, "the file, when its disk is gone")
    lab.equal(_in_file(path, 8192), second, "the file, when its disk is gone")


async def _written(lab: Bench, machine: Machine, offset: int, data: bytes) -> None:
    guest = lab.guest(machine)
    await guest.write_disk("kept", offset, data)
    await guest.flush("kept")


def _in_file(path: Path, offset: int) -> bytes:
    with path.open("rb") as image:
        image.seek(offset)
        return image.read(512)


@check(
    "change.at-rest",
    clause="disks and NICs can be added to and removed from a machine at rest, which starts with "
    "what it has then",
    means=[Means.GUEST],
)
async def at_rest(lab: Bench) -> None:
    machine = await lab.create(
        disks=[*lab.profile.spec.disks, Disk(name="old", size=16 * MIB)],
        nics=[*lab.profile.spec.nics, Nic(name="oldnic", network="none")],
    )
    await machine.plug_disk(Disk(name="new", size=16 * MIB))
    await machine.unplug_disk("old")
    await machine.plug_nic(Nic(name="newnic", network="none"))
    await machine.unplug_nic("oldnic")
    await lab.is_in(machine, MachineState.CREATED, "a machine that was changed at rest")
    disks = [*(disk.name for disk in lab.profile.spec.disks), "new"]
    nics = [*(nic.name for nic in lab.profile.spec.nics), "newnic"]
    told = await machine.info()
    lab.equal([disk.name for disk in told.disks], disks, "disks by info")
    lab.equal([nic.name for nic in told.nics], nics, "NICs by info")
    await machine.start()
    guest = lab.guest(machine)
    # A guest has no order between disks on different buses.
    seen = sorted(disk.name for disk in await guest.disks())
    lab.equal(seen, sorted(disks), "disks by the guest's word")
    lab.equal([nic.name for nic in await guest.nics()], nics, "NICs by the guest's word")


@check(
    "change.events",
    clause="each change to a machine that succeeds is told by one event of its own kind with what "
    "was changed",
)
async def events(lab: Bench) -> None:
    machine = await lab.create()
    expected: list[tuple[EventType, dict[str, object]]] = []
    await machine.plug_disk(Disk(name="extra-disk", size=16 * MIB))
    expected.append((EventType.DISK_PLUGGED, {"disk": "extra-disk"}))
    if lab.has(Capability.RESIZE_DISK):
        await machine.resize_disk("extra-disk", 32 * MIB)
        expected.append((EventType.DISK_RESIZED, {"disk": "extra-disk", "size": 32 * MIB}))
    await machine.unplug_disk("extra-disk")
    expected.append((EventType.DISK_UNPLUGGED, {"disk": "extra-disk"}))
    await machine.plug_nic(Nic(name="extra-nic", network="none"))
    expected.append((EventType.NIC_PLUGGED, {"nic": "extra-nic"}))
    await machine.unplug_nic("extra-nic")
    expected.append((EventType.NIC_UNPLUGGED, {"nic": "extra-nic"}))
    if lab.has(Capability.RESIZE):
        await machine.resize(vcpus=2)
        expected.append((EventType.RESIZED, {"vcpus": 2, "memory": machine.spec.memory.size}))
    if lab.has(Capability.PINNING):
        await machine.pin({0: (0,)})
        expected.append((EventType.PINNED, {"pinning": {"0": [0]}}))
    if lab.has(Capability.SNAPSHOT):
        await machine.snapshot("told")
        expected.append((EventType.SNAPSHOT_TAKEN, {"snapshot": "told"}))
        if lab.has(Capability.RESTORE):
            await machine.restore("told")
            expected.append((EventType.RESTORED, {"snapshot": "told"}))
        await machine.delete_snapshot("told")
        expected.append((EventType.SNAPSHOT_DELETED, {"snapshot": "told"}))
    if lab.has(Capability.FORK):
        await machine.start()
        child = lab.keep(await machine.fork(lab.name()))
        expected.append((EventType.FORKED, {"into": child.name}))
    for kind, data in expected:
        told = [event.data for event in await of_type(lab.hypervisor, kind, machine)]
        lab.equal(told, [data], f"events {kind.value}")
