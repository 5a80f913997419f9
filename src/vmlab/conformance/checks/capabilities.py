"""What a hypervisor declares: enough, consistent, and no less than it can do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from vmlab.conformance.bench import Bench
from vmlab.conformance.drills import DRILLS, Stage, stage
from vmlab.conformance.registry import check
from vmlab.machine.capabilities import Capability, sorted_names
from vmlab.machine.errors import UnsupportedOperation, VmlabError
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import Disk, HostDevice, Share, ShareKind
from vmlab.machine.states import MachineState

C = Capability
S = MachineState

IMPLIED: Mapping[Capability, Capability] = {
    C.MEMORY_SNAPSHOT: C.SNAPSHOT,
    C.RESTORE: C.SNAPSHOT,
    C.RESUME: C.PAUSE,
    C.LIVE_MIGRATION: C.COLD_MIGRATION,
}
"""Capabilities that are of no use without another."""


@check(
    "capability.required",
    clause="what the profile lists as due on a host like CI's is declared",
)
async def required(lab: Bench) -> None:
    missing = lab.profile.must_declare - lab.capabilities.supported
    lab.equal(sorted_names(missing), [], "capabilities that are due and not declared")


@check(
    "capability.consistent",
    clause="capabilities are the same whenever asked, none implies another that is missing, and a "
    "hypervisor that is used says of itself that it is available",
)
async def consistent(lab: Bench) -> None:
    declared = lab.capabilities
    lab.equal(await lab.hypervisor.capabilities(), declared, "capabilities asked again")
    lab.equal(declared.hypervisor, lab.hypervisor.name, "whose capabilities they are")
    for capability, other in IMPLIED.items():
        if capability in declared:
            lab.true(other in declared, f"who declares {capability} declares {other}")
    lab.equal(C.FAULTS in declared, bool(declared.faults), "faults are declared with their kinds")
    both = declared.supported & set(declared.unsupported)
    lab.equal(sorted_names(both), [], "what is declared both to work and not to")
    lab.true(bool(declared.architectures), "there are architectures that it can run")
    probe = await lab.hypervisor.probe()
    lab.true(probe.available, "a hypervisor that is in use is available")


_OPERATIONS: Mapping[Capability, tuple[str, MachineState]] = {
    C.PAUSE: ("pause", S.RUNNING),
    C.SNAPSHOT: ("snapshot", S.CREATED),
    C.FORK: ("fork", S.RUNNING),
    C.COLD_MIGRATION: ("migrate", S.CREATED),
    C.LIVE_MIGRATION: ("migrate", S.RUNNING),
    C.HOTPLUG_DISK: ("plug_disk", S.RUNNING),
    C.HOTPLUG_NIC: ("plug_nic", S.RUNNING),
    C.HOTPLUG_VCPU: ("resize", S.RUNNING),
    C.RESIZE: ("resize", S.CREATED),
    C.RESIZE_DISK: ("resize_disk", S.CREATED),
    C.PINNING: ("pin", S.CREATED),
    C.CONSOLE: ("console", S.RUNNING),
    C.DISPLAY: ("screenshot", S.RUNNING),
    C.GUEST_CHANNELS: ("channel", S.RUNNING),
}
_ATTEMPTS: Mapping[Capability, tuple[MachineState, Callable[[Stage], Awaitable[object]]]] = {
    C.MEMORY_SNAPSHOT: (S.RUNNING, lambda ready: ready.machine.snapshot("ram", memory=True)),
    C.RESTORE: (S.CREATED, lambda ready: ready.machine.restore("none")),
    C.HOTPLUG_MEMORY: (
        S.RUNNING,
        lambda ready: ready.machine.resize(memory=ready.machine.spec.memory.size),
    ),
}


@check(
    "capability.undeclared",
    clause="an operation whose capability is not declared raises UnsupportedOperation naming it, "
    "and changes nothing",
)
async def undeclared(lab: Bench) -> None:
    ready: dict[MachineState, Stage] = {}
    for capability in Capability:
        needed = IMPLIED.get(capability)
        if capability in lab.capabilities or (needed and needed not in lab.capabilities):
            continue
        if capability in _OPERATIONS:
            operation, state = _OPERATIONS[capability]
        elif capability in _ATTEMPTS:
            operation, state = "", _ATTEMPTS[capability][0]
        else:
            continue
        if state not in ready or ready[state].machine.state is not state:
            ready[state] = await stage(lab, state)
        attempt = (
            DRILLS[operation].call(lab, ready[state])
            if operation
            else _ATTEMPTS[capability][1](ready[state])
        )
        await _attempt(lab, capability, attempt, ready[state], state)


async def _attempt(
    lab: Bench,
    capability: Capability,
    attempt: Awaitable[object],
    ready: Stage,
    state: MachineState,
) -> None:
    what = f"{capability.value}, which is not declared"
    try:
        await attempt
    except UnsupportedOperation as error:
        lab.equal(error.capability, capability.value, f"{what}: the error names it")
        lab.equal(error.hypervisor, lab.hypervisor.name, f"{what}: the error names the hypervisor")
        await lab.is_in(ready.machine, state, f"{what}: afterwards")
    except VmlabError as error:
        lab.equal(type(error).__name__, UnsupportedOperation.__name__, what)
    else:
        lab.undeclared_working.add(capability)
        lab.note(f"{capability.value} works and is not declared")


_SPECS: Mapping[Capability, dict[str, object]] = {
    C.PINNING: {"cpus": {"count": 1, "pinning": {0: (0,)}}},
    C.NUMA: {
        "cpus": 2,
        "memory": {
            "size": 256 * MIB,
            "nodes": [
                {"memory": 128 * MIB, "cpus": (0,)},
                {"memory": 128 * MIB, "cpus": (1,)},
            ],
        },
    },
    C.HOTPLUG_VCPU: {"cpus": {"count": 1, "maximum": 2}},
    C.HOTPLUG_MEMORY: {"memory": {"size": 128 * MIB, "maximum": 256 * MIB}},
    C.GPU_PASSTHROUGH: {"host_devices": [HostDevice(name="g", kind="gpu", address="00:02.0")]},
    C.SRIOV_PASSTHROUGH: {"host_devices": [HostDevice(name="v", kind="sriov", address="00:03.0")]},
    C.DETERMINISTIC: {"deterministic": True},
    C.DISPLAY: {"display": True},
    C.CONSOLE: {"consoles": [{"name": "extra"}]},
    C.GUEST_CHANNELS: {"channels": ["extra"]},
}
_SHARES = {
    C.SHARE_9P: ShareKind.P9,
    C.SHARE_VIRTIOFS: ShareKind.VIRTIOFS,
    C.SHARE_COPY: ShareKind.COPY,
}


@check(
    "capability.unsupported-spec",
    clause="a specification that needs an undeclared capability is refused with "
    "UnsupportedOperation naming it, and nothing is created",
)
async def unsupported_spec(lab: Bench) -> None:
    source = lab.hypervisor.owner.directory
    specs = dict(_SPECS)
    in_place = Disk(name="kept", file=source / "kept.img", format="raw")
    specs[C.DISK_IN_PLACE] = {"disks": [in_place]}
    for capability, kind in _SHARES.items():
        share = Share(tag="src", source=source, target="/src", kind=kind)
        specs[capability] = {"shares": [share]}
    for capability, changes in specs.items():
        if capability in lab.capabilities:
            continue
        what = f"a specification that needs {capability.value}"
        asked = lab.hypervisor.create(lab.spec(**changes))
        error = await lab.refuses(UnsupportedOperation, asked, what)
        lab.equal(error.capability, capability.value, f"{what}: the error names it")
    lab.equal(len(await lab.hypervisor.list()), 0, "machines after refused specifications")
