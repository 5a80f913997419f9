"""Faults: each kind that is declared can be injected and has its effect, seen from the guest.

One check for each place where a fault strikes. A kind that is not declared is left out with a
note; that it is refused by name is a check of its own.
"""

from __future__ import annotations

from vmlab.conformance.bench import Bench, Skipped
from vmlab.conformance.registry import Means, check
from vmlab.hypervisors.base import Machine
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import (
    DeadlineExceeded,
    FaultInjected,
    HypervisorUnavailable,
    OperationFailed,
    UnsupportedOperation,
    VmlabError,
)
from vmlab.machine.events import EventType
from vmlab.machine.faults import (
    At,
    Chance,
    ClockJump,
    ConsoleText,
    CpuStall,
    DiskCorrupt,
    DiskError,
    DiskSlow,
    DiskTornWrite,
    Fault,
    FaultKind,
    HypervisorCrash,
    KillFault,
    LostEvent,
    MemoryPressure,
    NetDelay,
    NetLoss,
    NetPartition,
    Nth,
    OperationFailure,
    OperationHang,
    OperationPartial,
    PauseFault,
    PowerCut,
    StaleStatus,
)
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import Disk, Nic
from vmlab.machine.states import MachineState

NEEDS = [Capability.FAULTS]


def declared(lab: Bench, *kinds: FaultKind) -> frozenset[FaultKind]:
    """Those of `kinds` that are declared; the check is skipped if none is."""
    found = lab.capabilities.faults & set(kinds)
    if not found:
        words = [kind.value + _why_not(lab, kind) for kind in kinds]
        raise Skipped("declares no fault of " + ", ".join(words))
    for kind in kinds:
        if kind not in found:
            lab.note(f"the fault {kind.value} is not declared{_why_not(lab, kind)}")
    return found


def _breakable(lab: Bench) -> list[Disk]:
    """The disks of the suite's machines, such that every fault can strike them."""
    # Linux repeats what a SCSI disk of QEMU's fails (ABORTED COMMAND: hw/scsi/utils.c), so that its
    # programs do not see the errors that are counted here.
    seen = {"breakable": True, "bus": "virtio"}
    return [disk.model_copy(update=seen) for disk in lab.profile.spec.disks]


def _why_not(lab: Bench, kind: FaultKind) -> str:
    """Why there are no faults of that kind, where the profile knows."""
    why = lab.profile.faultless.get(kind)
    return f" ({why})" if why else ""


@check(
    "fault.disks",
    clause="faults of a disk reach the guest's requests to that disk, and no others: errors, "
    "delays, torn writes, silent corruption",
    needs=NEEDS,
    means=[Means.GUEST],
)
async def disks(lab: Bench) -> None:
    kinds = declared(
        lab,
        FaultKind.DISK_ERROR,
        FaultKind.DISK_SLOW,
        FaultKind.DISK_TORN_WRITE,
        FaultKind.DISK_CORRUPT,
    )
    machine = await lab.run(disks=_breakable(lab))
    guest, disk = lab.guest(machine), lab.scratch[0]
    old = lab.bytes(4096)
    await guest.write_disk(disk, 0, old)
    if FaultKind.DISK_ERROR in kinds:
        fault = await machine.inject(DiskError(disk=disk, operation="read"))
        request = guest.read_disk(disk, 0, 512)
        await lab.refuses(OperationFailed, request, "a read of a disk that fails")
        for other in lab.scratch[1:]:
            await guest.read_disk(other, 0, 512)
        await machine.clear_fault(fault)
        lab.equal(await guest.read_disk(disk, 0, 4096), old, "the disk when it works again")
    if FaultKind.DISK_SLOW in kinds:
        delay = 3 * lab.profile.settle
        fault = await machine.inject(DiskSlow(disk=disk, delay=delay))
        begun = lab.now()
        await guest.read_disk(disk, 0, 512)
        lab.true(lab.now() - begun >= delay, f"a slow disk takes {delay:g} s longer")
        await machine.clear_fault(fault)
    if FaultKind.DISK_TORN_WRITE in kinds:
        fault = await machine.inject(DiskTornWrite(disk=disk, keep=512))
        new = lab.bytes(4096)
        await guest.write_disk(disk, 0, new)
        await machine.clear_fault(fault)
        found = await guest.read_disk(disk, 0, 4096)
        lab.equal(found, new[:512] + old[512:], "the disk after a torn write")
    if FaultKind.DISK_CORRUPT in kinds:
        before = await guest.read_disk(disk, 0, 4096)
        await machine.inject(DiskCorrupt(disk=disk, offset=1000, length=8))
        found = await guest.read_disk(disk, 0, 4096)
        lab.true(found[1000:1008] != before[1000:1008], "corrupt bytes differ")
        lab.equal(
            found[:1000] + found[1008:], before[:1000] + before[1008:], "the bytes around them"
        )


@check(
    "fault.network",
    clause="faults of a NIC reach its packets: loss, delay, a link that is down; cleared, packets "
    "arrive again",
    needs=NEEDS,
    means=[Means.GUEST],
)
async def network(lab: Bench) -> None:
    kinds = declared(lab, FaultKind.NET_LOSS, FaultKind.NET_DELAY, FaultKind.NET_PARTITION)
    nic = lab.nic
    sender, receiver = await lab.run(), await lab.run()
    delay = 2 * lab.profile.settle
    faults: dict[FaultKind, Fault] = {
        FaultKind.NET_LOSS: NetLoss(nic=nic),
        FaultKind.NET_DELAY: NetDelay(nic=nic, delay=delay),
        FaultKind.NET_PARTITION: NetPartition(nic=nic),
    }
    # From the first question on it is kept what comes.
    lab.equal(await lab.guest(receiver).received(nic), [], "packets that arrive unsent")
    await lab.until(lambda: _passes(lab, sender, receiver), "a packet arrives without a fault")
    for kind, fault in faults.items():
        if kind not in kinds:
            continue
        identity = await receiver.inject(fault)
        if kind is FaultKind.NET_DELAY:
            took = await _lateness(lab, sender, receiver)
            lab.true(took >= delay, f"a packet takes {delay:g} s longer ({took:g} s)")
        else:
            passed = await _passes(lab, sender, receiver)
            lab.equal(passed, False, f"a packet arrives in spite of {kind.value}")
        if kind is FaultKind.NET_PARTITION:
            await lab.until(lambda: _link_is(lab, receiver, False), "the guest sees no link")
        await receiver.clear_fault(identity)
        # What had to wait arrives by and by.
        await lab.until(
            lambda: _passes(lab, sender, receiver), f"a packet arrives when {kind.value} is over"
        )
        await lab.until(lambda: _link_is(lab, receiver, True), "the guest sees its link again")


async def _lateness(lab: Bench, sender: Machine, receiver: Machine) -> float:
    """Seconds until the first packet of some gets from one to the other."""
    begun, sent = lab.now(), set[bytes]()

    async def arrived() -> bool:
        # A guest may have given up one that is a whole conversation.
        packet = lab.bytes(64)
        sent.add(packet)
        await lab.guest(sender).send(lab.nic, packet)
        return bool(sent & set(await lab.guest(receiver).received(lab.nic)))

    await lab.until(arrived, "what is late arrives")
    return lab.now() - begun


async def _passes(lab: Bench, sender: Machine, receiver: Machine) -> bool:
    """Whether a packet gets from one to the other."""
    packet = lab.bytes(64)
    await lab.guest(sender).send(lab.nic, packet)
    await lab.wait()
    return packet in await lab.guest(receiver).received(lab.nic)


async def _link_is(lab: Bench, machine: Machine, up: bool) -> bool:
    """Whether the link of the machine's first NIC is up, by its guest's word."""
    links = {each.name: each.link for each in await lab.guest(machine).nics()}
    return links.get(lab.nic) is up


@check(
    "fault.machine",
    clause="a machine can be made to stand still for a while, to die, and to lose power with all "
    "that was not flushed",
    needs=NEEDS,
    means=[Means.GUEST],
)
async def machine_faults(lab: Bench) -> None:
    kinds = declared(lab, FaultKind.PAUSE, FaultKind.KILL, FaultKind.POWER_CUT)
    machine = await lab.run(disks=_breakable(lab))
    if FaultKind.PAUSE in kinds:
        still = 10 * lab.profile.settle
        guest = lab.guest(machine)
        # From before the question on, however long its answer takes.
        begun, before = lab.now(), await guest.ticks()
        await machine.inject(PauseFault(duration=still))
        await lab.wait(still)
        await lab.until(
            lambda: lab.status_is(machine, MachineState.RUNNING), "it runs when the pause is over"
        )
        ran = (await guest.ticks() - before) / 1000
        lab.true(
            ran <= lab.now() - begun - still * 0.9, f"it stood still meanwhile ({ran:g} s passed)"
        )
    if FaultKind.KILL in kinds:
        await machine.inject(KillFault())
        await _failed(lab, machine, "kill")
        await machine.start()
    if FaultKind.POWER_CUT in kinds:
        guest, disk = lab.guest(machine), lab.scratch[0]
        flushed, lost = lab.bytes(), lab.bytes()
        await guest.write_disk(disk, 0, flushed)
        await guest.flush(disk)
        await guest.write_disk(disk, 0, lost)
        await machine.inject(PowerCut())
        await _failed(lab, machine, "power-cut")
        await machine.start()
        found = await lab.guest(machine).read_disk(disk, 0, len(flushed))
        lab.equal(found, flushed, "the disk after a power cut")


async def _failed(lab: Bench, machine: Machine, what: str) -> None:
    await lab.until(
        lambda: lab.status_is(machine, MachineState.FAILED), f"a machine has failed after {what}"
    )


@check(
    "fault.guest",
    clause="a guest can be left with less memory, its clock can jump, and one of its vCPUs can "
    "stand still",
    needs=NEEDS,
    means=[Means.GUEST],
)
async def guest_faults(lab: Bench) -> None:
    kinds = declared(lab, FaultKind.MEMORY_PRESSURE, FaultKind.CLOCK_JUMP, FaultKind.CPU_STALL)
    # What is left has to be enough for the guest's own programs.
    size = 512 * MIB
    machine = await lab.run(cpus=2, memory=size)
    guest = lab.guest(machine)
    if FaultKind.MEMORY_PRESSURE in kinds:
        whole = await guest.memory_left()
        fault = await machine.inject(MemoryPressure(leave=size // 2))

        async def squeezed() -> bool:
            return await guest.memory_left() <= size // 2

        async def whole_again() -> bool:
            return await guest.memory_left() == whole

        # A guest gives its memory up by and by, and gets it back so.
        await lab.until(squeezed, "the guest is left with less memory")
        await machine.clear_fault(fault)
        await lab.until(whole_again, "the guest has its memory again")
    if FaultKind.CLOCK_JUMP in kinds:
        before, begun = await guest.clock(), lab.now()
        await machine.inject(ClockJump(seconds=-86400))
        moved = await guest.clock() - before - (lab.now() - begun)
        lab.true(abs(moved + 86400) < 60, f"the guest's clock jumps back by a day ({moved:g} s)")
    if FaultKind.CPU_STALL in kinds:
        fault = await machine.inject(CpuStall(vcpu=1))
        first = (await machine.metrics()).cpu.per_vcpu_seconds
        await lab.wait(10 * lab.profile.settle)
        last = (await machine.metrics()).cpu.per_vcpu_seconds
        lab.equal(len(last), 2, "vCPUs in the metrics")
        lab.equal(last[1], first[1], "CPU time of the vCPU that stands still")
        lab.true(last[0] > first[0], "CPU time of the other vCPU")
        await machine.clear_fault(fault)


@check(
    "fault.operations",
    clause="operations can be made to fail before and after their effect and to hang; the error "
    "says so, and the state is a true one",
    needs=[*NEEDS, Capability.PAUSE, Capability.RESUME],
)
async def operations(lab: Bench) -> None:
    kinds = declared(
        lab, FaultKind.OPERATION_FAILURE, FaultKind.OPERATION_HANG, FaultKind.OPERATION_PARTIAL
    )
    machine = await lab.run()
    once = Nth(n=1)
    if FaultKind.OPERATION_FAILURE in kinds:
        await machine.inject(OperationFailure(operation="pause", when=once))
        await lab.refuses(FaultInjected, machine.pause(), "an operation that is to fail")
        await lab.is_in(machine, MachineState.RUNNING, "after an injected failure")
    if FaultKind.OPERATION_HANG in kinds:
        await machine.inject(OperationHang(operation="pause", when=once))
        hanging = machine.pause(timeout=10 * lab.profile.settle)
        await lab.refuses(DeadlineExceeded, hanging, "an operation that is to hang")
        await lab.is_in(machine, MachineState.RUNNING, "after an injected hang")
    if FaultKind.OPERATION_PARTIAL in kinds:
        await machine.inject(OperationPartial(operation="pause", when=once))
        await lab.refuses(FaultInjected, machine.pause(), "an operation that is to fail late")
        lab.true(machine.state.is_stable, f"{machine.state.value} lasts")
        await lab.is_in(machine, machine.state, "after a failure that came after the effect")
    if machine.state is MachineState.RUNNING:
        await machine.pause()
    await lab.is_in(machine, MachineState.PAUSED, "when the faults are used up")


@check(
    "fault.hypervisor",
    clause="the hypervisor can be made to lose an event, to answer with what was, and to crash, "
    "after which its machines are still there and run",
    needs=[*NEEDS, Capability.PAUSE],
)
async def hypervisor(lab: Bench) -> None:
    kinds = declared(lab, FaultKind.LOST_EVENT, FaultKind.STALE_STATUS, FaultKind.HYPERVISOR_CRASH)
    # One of its own, since its events are not what is audited elsewhere.
    host = lab.another()
    lab.lossy.append(host)
    machine = await lab.run(host)
    if FaultKind.LOST_EVENT in kinds and lab.has(Capability.HOTPLUG_NIC):
        fault = await machine.inject(LostEvent(event=EventType.NIC_PLUGGED.value))
        await machine.plug_nic(Nic(name="unheard", network="none"))
        await machine.clear_fault(fault)
        told = await host.events()
        lost = [event for event in told if event.type is EventType.NIC_PLUGGED]
        lab.equal(lost, [], "events of the kind that is to be lost")
        lab.true(told[-1].sequence > len(told), "the numbers of the events show that one is lost")
    if FaultKind.STALE_STATUS in kinds:
        await lab.wait(60)
        fault = await machine.inject(StaleStatus(age=30))
        await machine.pause()
        said = (await machine.status()).state.value
        lab.equal(said, MachineState.RUNNING.value, "a stale status")
        await machine.clear_fault(fault)
        said = (await machine.status()).state.value
        lab.equal(said, MachineState.PAUSED.value, "a status that is not stale")
    if FaultKind.HYPERVISOR_CRASH in kinds:
        name = machine.name
        outage = 10 * lab.profile.settle
        await machine.inject(HypervisorCrash(restart_after=outage))
        # It crashes under the call or just after it.
        await lab.wait()
        asked = machine.info()
        await lab.refuses(HypervisorUnavailable, asked, "a call while the hypervisor is down")
        await lab.wait(outage * 1.5)
        found = await host.get(name)
        lab.true((await found.status()).state.is_live, "a machine that outlived its hypervisor")
        await found.delete(force=True)
    await lab.close(host)


@check(
    "fault.triggers",
    clause="a fault strikes when its trigger says: at a time, at the nth occasion and no other, "
    "by chance, when a text is printed; cleared before, it does not strike; a trigger that does "
    "not work here is refused by its name",
    needs=NEEDS,
    means=[Means.GUEST],
)
async def triggers(lab: Bench) -> None:
    kinds = declared(lab, FaultKind.DISK_ERROR, FaultKind.KILL)
    machine = await lab.run(disks=_breakable(lab))
    guest = lab.guest(machine)
    if FaultKind.DISK_ERROR in kinds:
        disk = lab.scratch[0]
        third = DiskError(disk=disk, operation="read", when=Nth(n=3))
        # The first to open a disk reads its partition table.
        await guest.read_disk(disk, 0, 512)
        if await _armed(lab, machine, third) is not None:
            outcome = []
            for _request in range(5):
                try:
                    await guest.read_disk(disk, 0, 512)
                    outcome.append(True)
                except VmlabError:
                    outcome.append(False)
            expected = [True, True, False, True, True]
            lab.equal(outcome, expected, "reads of which the third is to fail")
        for probability in (0.0, 1.0):
            by_chance = Chance(probability=probability)
            fault = DiskError(disk=disk, operation="read", when=by_chance)
            identity = await _armed(lab, machine, fault)
            if identity is not None:
                failed = False
                try:
                    await guest.read_disk(disk, 0, 512)
                except OperationFailed:
                    failed = True
                lab.equal(failed, probability == 1.0, f"a read fails by a chance of {probability}")
                await machine.clear_fault(identity)
    if FaultKind.KILL in kinds:
        delay = 10 * lab.profile.settle
        cleared = await machine.inject(KillFault(when=At(seconds=delay)))
        await machine.clear_fault(cleared)
        await lab.wait(delay * 1.2)
        await lab.is_in(machine, MachineState.RUNNING, "when the time of a cleared fault is over")
        begun = lab.now()
        await machine.inject(KillFault(when=At(seconds=delay)))
        while (await machine.status()).state is MachineState.RUNNING:
            lab.true(lab.now() - begun < delay + lab.profile.slack, "a machine dies in its time")
            await lab.wait(delay / 100)
        lived = lab.now() - begun
        lab.true(lived >= delay, f"it lived for its {delay:g} s ({lived:g} s)")
        await lab.is_in(machine, MachineState.FAILED, "after the time of its death")
        await machine.start()
    at_text = KillFault(when=ConsoleText(text="conformance says die"))
    if (
        FaultKind.KILL in kinds
        and lab.has(Capability.CONSOLE)
        and await _armed(lab, machine, at_text) is not None
    ):
        await lab.guest(machine).print("conformance says wait")
        await lab.is_in(machine, MachineState.RUNNING, "after another text")
        try:
            await lab.guest(machine).print("conformance says die")
        except VmlabError as error:
            lab.note(f"the guest died before it answered: {error}")
        await _failed(lab, machine, "its text")


async def _armed(lab: Bench, machine: Machine, fault: Fault) -> str | None:
    """Inject a fault; None if its trigger is refused by its name, as it may be."""
    try:
        return await machine.inject(fault)
    except UnsupportedOperation as error:
        lab.equal(error.capability, f"fault trigger {fault.when.on}", "what the error names")
        lab.true(fault.when.on not in lab.profile.triggers, f"the trigger {fault.when.on} works")
        lab.note(f"faults cannot be triggered by {fault.when.on}")
        return None


@check(
    "fault.undeclared",
    clause="a fault of a kind that is not declared is refused with UnsupportedOperation naming it, "
    "and changes nothing",
)
async def undeclared(lab: Bench) -> None:
    machine = await lab.run()
    kinds = lab.capabilities.faults if lab.has(Capability.FAULTS) else frozenset[FaultKind]()
    name = lab.profile.scratch[0] if lab.profile.scratch else "disk"
    nic = lab.profile.spec.nics[0].name if lab.profile.spec.nics else "nic"
    faults: list[Fault] = [
        DiskError(disk=name),
        DiskSlow(disk=name, delay=1),
        DiskTornWrite(disk=name),
        DiskCorrupt(disk=name),
        PowerCut(),
        NetLoss(nic=nic),
        NetDelay(nic=nic, delay=1),
        NetPartition(nic=nic),
        PauseFault(),
        KillFault(),
        MemoryPressure(leave=64 * MIB),
        ClockJump(seconds=1),
        CpuStall(),
        OperationFailure(),
        OperationHang(),
        OperationPartial(),
        LostEvent(),
        StaleStatus(),
        HypervisorCrash(),
    ]
    for fault in faults:
        if fault.kind in kinds:
            continue
        what = f"the fault {fault.kind.value}, which is not declared"
        error = await lab.refuses(UnsupportedOperation, machine.inject(fault), what)
        if lab.has(Capability.FAULTS):
            lab.true(fault.kind.value in str(error), f"{what}: the error names it")
    await lab.is_in(machine, MachineState.RUNNING, "after refused faults")
