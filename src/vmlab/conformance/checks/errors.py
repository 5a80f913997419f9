"""What is refused, with which error, and that a refusal changes nothing."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from vmlab.conformance.bench import Bench, Skipped, names, shape
from vmlab.conformance.registry import check
from vmlab.hypervisors.base import Machine
from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import (
    InvalidSpec,
    InvalidState,
    MachineExists,
    MachineNotFound,
    ResourceExhausted,
    ResourceNotFound,
    SnapshotNotFound,
    VmlabError,
    from_record,
)
from vmlab.machine.sizes import GIB, MIB
from vmlab.machine.spec import Disk, MachineSpec, Nic
from vmlab.machine.states import MachineState


@check(
    "errors.unknown-machine",
    clause="get finds a machine by name and by id, and says MachineNotFound of one that never was "
    "or was deleted",
)
async def unknown_machine(lab: Bench) -> None:
    machine = await lab.create()
    for key in (machine.name, machine.id):
        found = await lab.hypervisor.get(key)
        lab.equal(found.id, machine.id, f"get({key!r})")
    await machine.delete()
    for key in (machine.name, machine.id, "never-was"):
        error = await lab.refuses(MachineNotFound, lab.hypervisor.get(key), f"get({key!r})")
        lab.true(key in str(error), "the error names what was looked for")


@check(
    "errors.invalid-spec",
    clause="an empty or invalid specification is refused with InvalidSpec naming the field, and "
    "nothing is created",
)
async def invalid_spec(lab: Bench) -> None:
    there = await names(lab.hypervisor)
    no_spec: Any
    for no_spec in (None, {}, {"name": "x"}, "x"):
        what = f"create({no_spec!r})"
        await lab.refuses(InvalidSpec, lab.hypervisor.create(cast(MachineSpec, no_spec)), what)
    strange = set(Architecture) - lab.capabilities.architectures
    wrong: dict[str, object] = {"accelerator": "no-such-accelerator"}
    if strange:
        wrong["architecture"] = min(strange)
    for field, value in wrong.items():
        what = f"a specification with {field} = {value!r}"
        asked = lab.hypervisor.create(lab.spec(**{field: value}))
        error = await lab.refuses(InvalidSpec, asked, what)
        lab.equal([problem.field for problem in error.problems], [field], f"{what}: the field")
    lab.equal(await names(lab.hypervisor), there, "machines after refused specifications")


@check(
    "errors.limits",
    clause="a machine beyond a limit of the hypervisor is refused with ResourceExhausted, and "
    "nothing is created",
)
async def limits(lab: Bench) -> None:
    limit = lab.capabilities.limits
    beyond: dict[str, dict[str, Any]] = {}
    if limit.vcpus_per_machine is not None and limit.vcpus_per_machine < 4096:
        beyond["vCPUs"] = {"cpus": limit.vcpus_per_machine + 1}
    if limit.memory_per_machine is not None:
        beyond["memory"] = {"memory": limit.memory_per_machine // GIB * GIB + GIB}
    if limit.disks_per_machine is not None:
        disks = [Disk(name=f"d{i}", size=MIB) for i in range(limit.disks_per_machine + 1)]
        beyond["disks"] = {"disks": disks}
    if limit.disk_size is not None:
        size = limit.disk_size // MIB * MIB + MIB
        beyond["the size of a disk"] = {"disks": [Disk(name="big", size=size)]}
    if limit.nics_per_machine is not None:
        nics = [Nic(name=f"n{i}", network="none") for i in range(limit.nics_per_machine + 1)]
        beyond["NICs"] = {"nics": nics}
    if not beyond:
        raise Skipped("declares no limit for one machine")
    for what, changes in beyond.items():
        asked = lab.hypervisor.create(lab.spec(**changes))
        await lab.refuses(ResourceExhausted, asked, f"more than the limit of {what}")
    lab.equal(await names(lab.hypervisor), [], "machines after refused specifications")


@check(
    "errors.duplicate-name",
    clause="a name that is taken is refused with MachineExists, of calls at once one wins, and a "
    "name is free again after delete",
)
async def duplicate_name(lab: Bench) -> None:
    first = await lab.create()
    before = shape(await first.info())
    again = lab.hypervisor.create(lab.spec(name=first.name, cpus=2))
    error = await lab.refuses(MachineExists, again, "a second machine of one name")
    lab.equal(error.machine, first.name, "the error names the machine")
    lab.equal(shape(await first.info()), before, "the first machine afterwards")
    spec = lab.spec()
    answers = await asyncio.gather(
        *(lab.hypervisor.create(spec) for _ in range(5)), return_exceptions=True
    )
    for answer in answers:
        if isinstance(answer, Machine):
            lab.keep(answer)
    kinds = sorted(type(answer).__name__ for answer in answers if not isinstance(answer, Machine))
    lab.equal(kinds, ["MachineExists"] * 4, "what those are told who come too late")
    await first.delete()
    await lab.create(name=first.name)


@check(
    "errors.unknown-part",
    clause="a disk, NIC, console, channel, snapshot or fault that a machine does not have is "
    "refused with ResourceNotFound, and nothing changes",
)
async def unknown_part(lab: Bench) -> None:
    machine = await lab.run()
    before = shape(await machine.info())
    calls: dict[str, tuple[tuple[Capability, ...], Any, type[VmlabError]]] = {
        "disk": (
            (Capability.HOTPLUG_DISK,),
            lambda: machine.unplug_disk("nosuch"),
            ResourceNotFound,
        ),
        "disk to resize": (
            (Capability.RESIZE_DISK,),
            lambda: machine.resize_disk("nosuch", GIB),
            ResourceNotFound,
        ),
        "NIC": ((Capability.HOTPLUG_NIC,), lambda: machine.unplug_nic("nosuch"), ResourceNotFound),
        "console": ((Capability.CONSOLE,), lambda: machine.console("nosuch"), ResourceNotFound),
        "channel": (
            (Capability.GUEST_CHANNELS,),
            lambda: machine.channel("nosuch"),
            ResourceNotFound,
        ),
        "snapshot to restore": (
            (Capability.RESTORE,),
            lambda: machine.restore("nosuch"),
            SnapshotNotFound,
        ),
        "snapshot to delete": (
            (Capability.SNAPSHOT,),
            lambda: machine.delete_snapshot("nosuch"),
            SnapshotNotFound,
        ),
        "fault": ((Capability.FAULTS,), lambda: machine.clear_fault("nosuch"), ResourceNotFound),
    }
    for what, (needs, call, kind) in calls.items():
        if lab.has(*needs):
            await lab.refuses(kind, call(), f"an unknown {what}")
    await lab.is_in(machine, MachineState.RUNNING, "after refused calls")
    lab.equal(shape(await machine.info()), before, "what the machine is made of afterwards")


@check(
    "errors.invalid-part",
    clause="a disk or NIC whose name is taken, a disk that would shrink, and names that are no "
    "names or no times are refused with InvalidSpec, and nothing changes",
)
async def invalid_part(lab: Bench) -> None:
    machine = await lab.create(
        disks=[Disk(name="disk", size=16 * MIB)], nics=[Nic(name="nic", network="none")]
    )
    before = shape(await machine.info())
    same_disk = machine.plug_disk(Disk(name="disk", size=MIB))
    await lab.refuses(InvalidSpec, same_disk, "a disk whose name is taken")
    same_nic = machine.plug_nic(Nic(name="nic", network="none"))
    await lab.refuses(InvalidSpec, same_nic, "a NIC whose name is taken")
    if lab.has(Capability.RESIZE_DISK):
        smaller = machine.resize_disk("disk", MIB)
        await lab.refuses(InvalidSpec, smaller, "a disk that would shrink")
    await lab.refuses(InvalidSpec, machine.start(timeout=-1), "a negative timeout")
    if lab.has(Capability.SNAPSHOT):
        for name in ("", "../x", "a b", "x" * 64):
            await lab.refuses(InvalidSpec, machine.snapshot(name), f"a snapshot named {name!r}")
    lab.equal(shape(await machine.info()), before, "what the machine is made of afterwards")


@check(
    "errors.tell",
    clause="an error names the machine, the hypervisor and the operation, gives a hint, and "
    "survives the way between processes",
)
async def tell(lab: Bench) -> None:
    machine = await lab.create()
    error = await lab.refuses(InvalidState, machine.stop(), "stop of a machine at rest")
    lab.equal(error.machine, machine.name, "the error names the machine")
    lab.equal(error.hypervisor, lab.hypervisor.name, "the error names the hypervisor")
    lab.equal(error.operation, "stop", "the error names the operation")
    lab.true(bool(error.hint), "the error has a hint")
    copy = from_record(error.to_record())
    lab.equal((type(copy), str(copy)), (type(error), str(error)), "the error after its way")
