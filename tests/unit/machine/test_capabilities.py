"""Capabilities, limits, and whether a specification fits them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.machine.strategies import specs

from vmlab.machine.architecture import Architecture
from vmlab.machine.capabilities import (
    DESCRIPTIONS,
    Capabilities,
    Capability,
    Limits,
    sorted_names,
)
from vmlab.machine.errors import InvalidSpec, ResourceExhausted, UnsupportedOperation
from vmlab.machine.fit import (
    Usage,
    check_fit,
    check_totals,
    needed_capabilities,
    usage_of,
)
from vmlab.machine.sizes import GIB, MIB
from vmlab.machine.spec import MachineSpec

ALL = frozenset(Capability)


def able(*lacks: Capability, **fields: Any) -> Capabilities:
    fields = {"architectures": frozenset(Architecture), "accelerators": ("kvm",)} | fields
    return Capabilities(hypervisor="h", supported=ALL - set(lacks), **fields)


def test_every_capability_is_described_once() -> None:
    assert list(DESCRIPTIONS) == list(Capability)
    assert len(set(DESCRIPTIONS.values())) == len(Capability)


def test_what_is_missing_is_refused_by_name_with_the_reason() -> None:
    capabilities = able(
        Capability.FORK, Capability.PAUSE, unsupported={Capability.PAUSE: "no signal"}
    )
    capabilities.require(Capability.RESUME)
    assert Capability.RESUME in capabilities
    with pytest.raises(UnsupportedOperation) as caught:
        capabilities.require(Capability.RESUME, Capability.FORK, machine="m", operation="fork")
    error = caught.value
    assert (error.capability, error.machine, error.operation) == ("fork", "m", "fork")
    assert str(error) == ("hypervisor 'h' does not have the capability 'fork' (machine 'm')")
    assert error.hint == "`vmlab hypervisors` lists what each one can do on this host"
    with pytest.raises(UnsupportedOperation) as caught:
        capabilities.require(Capability.PAUSE)
    assert caught.value.hint == "why not: no signal"


def test_capabilities_can_be_taken_away() -> None:
    fewer = able().without(Capability.FORK, Capability.NUMA)
    assert fewer.supported == ALL - {Capability.FORK, Capability.NUMA}
    assert Capabilities.model_validate_json(fewer.model_dump_json()) == fewer


@given(st.sets(st.sampled_from(list(Capability))))
def test_names_are_listed_in_their_own_order(chosen: set[Capability]) -> None:
    names = sorted_names(chosen)
    assert {Capability(name) for name in names} == chosen
    assert names == [one.value for one in Capability if one in chosen]


NEEDS: list[tuple[dict[str, Any], str, Capability]] = [
    ({"cpus": {"pinning": {0: [1]}}}, "cpus.pinning", Capability.PINNING),
    ({"cpus": {"maximum": 2}}, "cpus.maximum", Capability.HOTPLUG_VCPU),
    ({"memory": {"maximum": "1G"}}, "memory.maximum", Capability.HOTPLUG_MEMORY),
    (
        {
            "cpus": 2,
            "memory": {"nodes": [{"memory": "256M", "cpus": [one]} for one in (0, 1)]},
        },
        "memory.nodes",
        Capability.NUMA,
    ),
    (
        {"memory": {"nodes": [{"memory": "512M", "cpus": [0], "host_node": 1}]}},
        "memory.nodes",
        Capability.NUMA,
    ),
    *(
        (
            {"shares": [{"tag": "s", "source": ".", "target": "/s", "kind": kind}]},
            "shares.0.kind",
            capability,
        )
        for kind, capability in (
            ("9p", Capability.SHARE_9P),
            ("virtiofs", Capability.SHARE_VIRTIOFS),
            ("copy", Capability.SHARE_COPY),
        )
    ),
    ({"consoles": [{"name": "a"}, {"name": "b"}]}, "consoles", Capability.CONSOLE),
    ({"channels": ["mine"]}, "channels", Capability.GUEST_CHANNELS),
    (
        {"host_devices": [{"name": "g", "kind": "gpu", "address": "01:00.0"}]},
        "host_devices.0",
        Capability.GPU_PASSTHROUGH,
    ),
    (
        {"host_devices": [{"name": "g", "kind": "sriov", "address": "01:00.0"}]},
        "host_devices.0",
        Capability.SRIOV_PASSTHROUGH,
    ),
    ({"deterministic": True}, "deterministic", Capability.DETERMINISTIC),
]


@pytest.mark.parametrize(("fields", "field", "capability"), NEEDS)
def test_a_field_that_needs_a_capability_is_refused_without_it(
    fields: dict[str, Any], field: str, capability: Capability
) -> None:
    spec = MachineSpec.of(name="a", **fields)
    assert needed_capabilities(spec) == [(field, capability)]
    check_fit(spec, able())
    with pytest.raises(UnsupportedOperation) as caught:
        check_fit(spec, able(capability, unsupported={capability: "old kernel"}))
    assert caught.value.capability == capability.value
    assert caught.value.hint is not None
    assert f"{field} ({capability.value})" in caught.value.hint
    assert "old kernel" in caught.value.hint


def test_a_plain_machine_needs_nothing() -> None:
    plain = MachineSpec.of(
        name="a",
        memory={"nodes": [{"memory": "512M", "cpus": [0]}]},
        cpus={"count": 1, "maximum": 1},
        disks=[{"name": "d", "size": "1G"}],
        nics=[{"name": "n"}],
    )
    assert needed_capabilities(plain) == []
    check_fit(plain, able(*Capability))


def test_any_kind_of_share_does_where_the_kind_is_left_open() -> None:
    spec = MachineSpec.of(name="a", shares=[{"tag": "s", "source": ".", "target": "/s"}])
    check_fit(spec, able(Capability.SHARE_9P, Capability.SHARE_VIRTIOFS))
    kinds = (Capability.SHARE_9P, Capability.SHARE_VIRTIOFS, Capability.SHARE_COPY)
    with pytest.raises(UnsupportedOperation) as caught:
        check_fit(spec, able(*kinds))
    assert caught.value.capability == "share-9p"


def test_architecture_and_accelerator_have_to_be_there_and_both_are_told() -> None:
    spec = MachineSpec.of(name="a", architecture="riscv64", accelerator="hvf")
    with pytest.raises(InvalidSpec) as caught:
        check_fit(spec, able(architectures=frozenset({Architecture.X86_64})))
    assert [(p.field, p.value) for p in caught.value.problems] == [
        ("architecture", "riscv64"),
        ("accelerator", "hvf"),
    ]
    assert "'h' runs x86_64" in str(caught.value)
    assert "accelerators that work on this host: kvm" in str(caught.value)
    with pytest.raises(InvalidSpec, match="none on this host"):
        check_fit(spec, able(architectures=frozenset(), accelerators=()))


@pytest.mark.parametrize(
    ("limits", "fields", "told"),
    [
        ({"vcpus_per_machine": 2}, {"cpus": 3}, "cpus.count = 3: hypervisor 'h' allows 2"),
        ({"vcpus_per_machine": 2}, {"cpus": {"count": 1, "maximum": 4}}, "cpus.maximum = 4"),
        ({"memory_per_machine": "1G"}, {"memory": "2G"}, "memory.size = 2G"),
        ({"memory_per_machine": "1G"}, {"memory": {"maximum": "2G"}}, "memory.maximum = 2G"),
        (
            {"disks_per_machine": 1},
            {"disks": [{"name": name, "size": "1G"} for name in "ab"]},
            "disks = 2",
        ),
        ({"disk_size": "1G"}, {"disks": [{"name": "a", "size": "2G"}]}, "disks.0.size = 2G"),
        ({"nics_per_machine": 0}, {"nics": [{"name": "n"}]}, "nics = 1"),
        (
            {"vcpus_per_machine": 1, "nics_per_machine": 0},
            {"cpus": 2, "nics": [{"name": "n"}]},
            "allows 1; nics = 1",
        ),
    ],
)
def test_what_passes_a_limit_of_one_machine_is_refused(
    limits: dict[str, Any], fields: dict[str, Any], told: str
) -> None:
    spec = MachineSpec.of(name="a", **fields)
    check_fit(spec, able())
    with pytest.raises(ResourceExhausted) as caught:
        check_fit(spec, able(limits=Limits(**limits)))
    assert told in caught.value.message
    assert (caught.value.machine, caught.value.hypervisor) == ("a", "h")


def test_at_the_limit_is_within_it() -> None:
    spec = MachineSpec.of(name="a", cpus=2, memory="1G", disks=[{"name": "d", "size": "1G"}])
    limits = Limits(vcpus_per_machine=2, memory_per_machine=GIB, disks_per_machine=1, disk_size=GIB)
    check_fit(spec, able(limits=limits))


BIG = MachineSpec.of(
    name="big",
    cpus=4,
    memory="1G",
    display=True,
    disks=[{"name": "d", "size": "2G"}, {"name": "i", "source": "/i.raw"}],
    nics=[{"name": "n", "forwards": [{"guest": 22}, {"guest": 80}]}],
)


def test_what_a_machine_takes_up_depends_on_whether_it_is_live() -> None:
    assert usage_of(BIG, live=True) == Usage(1, 4, GIB, 2 * GIB, 3)
    assert usage_of(BIG, live=False) == Usage(1, 0, 0, 2 * GIB, 0)
    assert usage_of(BIG, live=True) + usage_of(BIG, live=False) == Usage(2, 4, GIB, 4 * GIB, 3)


@pytest.mark.parametrize(
    ("limits", "live", "told"),
    [
        ({"machines": 2}, False, "machines: 1 more would make 3 of 2 that there are"),
        ({"vcpus": 5}, True, "vCPUs: 4 more would make 6 of 5 that there are"),
        ({"memory": 2 * GIB - 1}, True, "memory: 1G more would make 2G of"),
        ({"disk_space": 2 * GIB}, False, "disk space: 2G more would make 3G of 2G"),
        ({"ports": 3}, True, "ports: 3 more would make 4 of 3 that there are"),
        ({"machines": 2, "vcpus": 1}, True, "there are; vCPUs:"),
    ],
)
def test_what_passes_a_limit_of_all_machines_is_refused(
    limits: dict[str, Any], live: bool, told: str
) -> None:
    usage = Usage(machines=2, vcpus=2, memory=GIB, disk_space=GIB, ports=1)
    with pytest.raises(ResourceExhausted) as caught:
        check_totals(Limits(**limits), usage, BIG, live=live, hypervisor="h", operation="start")
    assert told in caught.value.message
    assert caught.value.message.startswith("cannot start 'big': ")
    assert (caught.value.machine, caught.value.operation) == ("big", "start")
    check_totals(Limits(), usage, BIG, live=live)


def test_a_machine_at_rest_needs_no_room_for_what_it_does_not_take_up() -> None:
    full = Limits(vcpus=1, memory=MIB, ports=0)
    check_totals(full, Usage(machines=1, vcpus=9, memory=GIB, ports=9), BIG, live=False)


@given(specs, specs)
def test_usage_adds_up(one: MachineSpec, other: MachineSpec) -> None:
    total = usage_of(one, live=True) + usage_of(other, live=False)
    limits = Limits(
        machines=2,
        vcpus=total.vcpus,
        memory=total.memory,
        disk_space=total.disk_space,
        ports=total.ports,
    )
    check_totals(limits, usage_of(one, live=True), other)
    check_totals(limits, usage_of(other, live=False), one, live=True)
