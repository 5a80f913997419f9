"""Machine specifications: what they accept, what they refuse and how they say so."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tests.unit.machine.strategies import json_values, specs, tables, toml

from vmlab.machine.architecture import (
    Architecture,
    host_architecture,
    parse_architecture,
)
from vmlab.machine.documents import build
from vmlab.machine.errors import InvalidSpec
from vmlab.machine.faults import FaultSchedule
from vmlab.machine.sizes import GIB, MIB
from vmlab.machine.spec import Disk, MachineSpec, Nic

FULL = """
name = "db-1"
architecture = "amd64"
boot = "debian-13"
channels = ["vmlab.agent", "probe"]
deterministic = true
seed = 7
display = true
accelerator = "kvm"

[cpus]
count = 4
sockets = 2
cores = 2
maximum = 8
model = "host"
pinning = { 0 = [0, 1], 3 = [2] }

[memory]
size = "4G"
maximum = "8G"
shared = true
nodes = [
    { memory = "1G", cpus = [0] },
    { memory = "3G", cpus = [1, 2, 3], host_node = 1 },
]

[[disks]]
name = "root"
source = "/images/root.qcow2"
format = "qcow2"

[[disks]]
name = "data"
size = "1.5G"
bus = "scsi"
serial = "WD-1"

[[nics]]
name = "lan"
network = "segment:blue"
mac = "52:54:00:AB:CD:EF"

[[nics]]
name = "wan"
forwards = [{ guest = 22 }, { guest = 53, host = 5353, protocol = "udp" }]

[[shares]]
tag = "src"
source = "."
target = "/src"
kind = "9p"

[[consoles]]
name = "serial"

[[host_devices]]
name = "gpu"
kind = "gpu"
address = "0000:01:00.0"

[labels]
team = "storage"
"""

SHORT = 'name = "a"\ncpus = 2\nmemory = "512M"\nboot = "debian"\n'


def problems(error: InvalidSpec) -> dict[str, tuple[object, str]]:
    return {problem.field: (problem.value, problem.expected) for problem in error.problems}


def refused(**fields: Any) -> dict[str, tuple[object, str]]:
    with pytest.raises(InvalidSpec) as caught:
        MachineSpec.of(**({"name": "a"} | fields))
    return problems(caught.value)


def test_a_full_specification_is_read() -> None:
    spec = MachineSpec.parse(FULL)
    assert spec.architecture is Architecture.X86_64
    assert spec.boot.image == "debian-13"
    assert spec.cpus.pinning == {0: (0, 1), 3: (2,)}
    assert [node.memory for node in spec.memory.nodes] == [GIB, 3 * GIB]
    data = spec.disk("data")
    assert data is not None
    assert data.size == 3 * GIB // 2
    lan = spec.nic("lan")
    assert lan is not None
    assert lan.mac == "52:54:00:ab:cd:ef"
    assert spec.disk("nothing") is None
    assert spec.nic("nothing") is None


def test_bare_values_stand_for_count_size_and_image() -> None:
    spec = MachineSpec.parse(SHORT)
    assert (spec.cpus.count, spec.memory.size, spec.boot.image) == (2, 512 * MIB, "debian")


def test_what_is_left_out_has_its_default() -> None:
    spec = MachineSpec.of(name="a")
    assert (spec.cpus.count, spec.memory.size) == (1, 512 * MIB)
    assert [console.name for console in spec.consoles] == ["serial"]
    assert spec.channels == ("vmlab.agent",)
    assert spec.architecture is (host_architecture() or Architecture.X86_64)


@pytest.mark.parametrize(
    ("fields", "field", "value", "expected"),
    [
        ({"name": "a b"}, "name", "a b", "1 to 63 letters"),
        ({"name": "a\n"}, "name", "a\n", "1 to 63 letters"),
        ({"name": 5}, "name", 5, "1 to 63 letters"),
        ({"cpus": True}, "cpus.count", True, "a whole number"),
        ({"cpus": "2"}, "cpus.count", "2", "a whole number"),
        ({"cpus": 2.0}, "cpus.count", 2.0, "a whole number"),
        ({"cpus": 0}, "cpus.count", 0, "at least 1"),
        ({"cpus": 10**30}, "cpus.count", 10**30, "at most 4096"),
        ({"cpus": [2]}, "cpus", "[2]", "a table of fields"),
        ({"cpus": {"cont": 2}}, "cpus.cont", 2, "no such field; did you mean 'count'?"),
        (
            {"cpus": {"count": 2, "sockets": 3}},
            "cpus.count",
            2,
            "sockets x cores x threads, which is 3; or leave the topology out",
        ),
        ({"cpus": {"count": 2, "maximum": 1}}, "cpus.maximum", 1, "at least count, which is 2"),
        ({"cpus": {"count": 2, "pinning": {2: [0]}}}, "cpus.pinning.2", "[0]", "vCPUs 0 to 1"),
        ({"cpus": {"pinning": {"1": [0]}}}, "cpus.pinning.1", "[0]", "vCPU 0 alone"),
        ({"cpus": {"pinning": {0: []}}}, "cpus.pinning.0", "[]", "CPU numbers of the host"),
        ({"cpus": {"pinning": {0: [-1]}}}, "cpus.pinning.0", "[-1]", "CPU numbers of the host"),
        ({"cpus": {"pinning": {0: [True]}}}, "cpus.pinning.0.0", True, "a whole number"),
        ({"cpus": {"pinning": {"x": [0]}}}, "cpus.pinning.x", "x", "a whole number"),
        ({"cpus": {"model": ""}}, "cpus.model", "", "at least 1 characters"),
        ({"memory": "512X"}, "memory.size", "512X", "a size is a number with K, M, G, T or P"),
        ({"memory": True}, "memory.size", True, "a size is a number of bytes or text"),
        ({"memory": "512K"}, "memory.size", "512K", 'at least "1M"'),
        ({"memory": 1048577}, "memory.size", 1048577, "a multiple of the page size, 4096"),
        ({"memory": {"maximum": "1M"}}, "memory.maximum", "1M", "at least size, which is 512M"),
        (
            {"memory": {"nodes": [{"memory": "1M", "cpus": [0]}]}},
            "memory.nodes",
            "['1M']",
            "memory that adds up to size, which is 512M",
        ),
        (
            {"memory": {"nodes": [{"memory": "512M", "cpus": [1]}]}},
            "memory.nodes",
            "[[1]]",
            "each of the vCPUs 0 to 0 in the cpus of one node",
        ),
        ({"boot": 5}, "boot.image", 5, "text in quotes"),
        ({"boot": {"kernel": 5}}, "boot.kernel", 5, "a path, as text in quotes"),
        ({"boot": {"kernel": ""}}, "boot.kernel", "", "the path of a file or directory"),
        ({"boot": {"kernel": "a\0"}}, "boot.kernel", "a\0", "the path of a file or directory"),
        (
            {"boot": {"kernel": "k", "image": "i"}},
            "boot.kernel",
            "k",
            "nothing beside image, which brings its kernel",
        ),
        ({"boot": {"initrd": "i"}}, "boot.initrd", "i", "a kernel beside it"),
        ({"boot": {"cmdline": "a\nb"}}, "boot.cmdline", "a\nb", "one line of text without NUL"),
        ({"disks": [{"name": "x"}]}, "disks.0.size", None, 'such as size = "1G"'),
        ({"disks": [{"name": "x", "size": 0}]}, "disks.0.size", 0, "a positive multiple of 512"),
        ({"disks": [{"name": "x", "size": 513}]}, "disks.0.size", 513, "a positive multiple"),
        (
            {"disks": [{"name": "x", "size": 512, "bus": "virtoi"}]},
            "disks.0.bus",
            "virtoi",
            "one of 'virtio', 'scsi'; did you mean 'virtio'?",
        ),
        (
            {"disks": [{"name": "x", "size": 512, "serial": "a b"}]},
            "disks.0.serial",
            "a b",
            "1 to 20 letters",
        ),
        (
            {"disks": [{"name": "x", "size": 512, "readonly": 1}]},
            "disks.0.readonly",
            1,
            "true or false",
        ),
        (
            {"disks": [{"name": "x", "size": 512}, {"name": "x", "size": 512}]},
            "disks.1.name",
            "x",
            "a name that disks.0 has not",
        ),
        ({"disks": {"name": "x"}}, "disks", "{'name': 'x'}", "begins with [[disks]]"),
        ({"disks": "x"}, "disks", "x", "a list"),
        ({"nics": [{"name": "n", "network": "lan"}]}, "nics.0.network", "lan", '"segment:NAME"'),
        ({"nics": [{"name": "n", "network": "tap:"}]}, "nics.0.network", "tap:", "where NAME has"),
        ({"nics": [{"name": "n", "network": "user:x"}]}, "nics.0.network", "user:x", '"user"'),
        ({"nics": [{"name": "n", "mac": "1"}]}, "nics.0.mac", "1", "a unicast MAC address"),
        (
            {"nics": [{"name": "n", "mac": "01:00:00:00:00:00"}]},
            "nics.0.mac",
            "01:00:00:00:00:00",
            "a unicast MAC address",
        ),
        (
            {"nics": [{"name": "n", "network": "none", "forwards": [{"guest": 22}]}]},
            "nics.0.network",
            "none",
            '"user", because it has forwards',
        ),
        (
            {"nics": [{"name": "n", "forwards": [{"guest": 0}]}]},
            "nics.0.forwards.0.guest",
            0,
            "at least 1",
        ),
        (
            {"nics": [{"name": n, "mac": "52:54:00:00:00:01"} for n in "ab"]},
            "nics.1.mac",
            "52:54:00:00:00:01",
            "a mac that nics.0 has not",
        ),
        (
            {"shares": [{"tag": "s", "source": ".", "target": "src"}]},
            "shares.0.target",
            "src",
            "an absolute path in the guest",
        ),
        ({"shares": [{"tag": "s", "source": "."}]}, "shares.0.target", None, "has to be given"),
        ({"channels": ["a", "a"]}, "channels.1", "a", "a name that channels.0 has not"),
        (
            {"host_devices": [{"name": "g", "kind": "gpu", "address": "1"}]},
            "host_devices.0.address",
            "1",
            "a PCI address",
        ),
        ({"architecture": "z80"}, "architecture", "z80", "one of 'riscv64', 'aarch64'"),
        ({"architecture": 86}, "architecture", 86, "one of 'riscv64', 'aarch64'"),
        ({"seed": -1}, "seed", -1, "at least 0"),
        ({"seed": 1 << 64}, "seed", 1 << 64, "less than 18446744073709551616"),
        ({"seed": 1.5}, "seed", 1.5, "a whole number"),
        ({"display": "yes"}, "display", "yes", "true or false"),
        ({"labels": {"a": 1}}, "labels.a", 1, "text in quotes"),
        ({"labels": [1]}, "labels", "[1]", "a table of names and values"),
        ({"a b": 1}, "'a b'", 1, "no such field"),
    ],
)
def test_each_error_names_field_value_and_what_would_be_right(
    fields: dict[str, Any], field: str, value: object, expected: str
) -> None:
    found = refused(**fields)
    assert list(found) == [field]
    assert found[field][0] == value
    assert expected in found[field][1]


def test_every_problem_is_told_at_once_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text('name = "a b"\ncpuss = 2\nmemory = "5X"\n')
    with pytest.raises(InvalidSpec) as caught:
        MachineSpec.load(file)
    assert set(problems(caught.value)) == {"name", "cpuss", "memory.size"}
    assert str(caught.value).startswith(f"{file} has 3 problems:\n  name = 'a b': 1 to 63")
    assert caught.value.source == str(file)
    assert caught.value.hint


def test_a_message_lists_some_of_many_problems_and_counts_the_rest() -> None:
    with pytest.raises(InvalidSpec) as caught:
        MachineSpec.of(name="a", channels=["a b"] * 1000)
    assert len(caught.value.problems) == 1000
    assert str(caught.value).count("\n") == 21
    assert "and 980 more" in str(caught.value)


@settings(max_examples=150)
@given(tables())
def test_a_specification_is_read_back_from_its_json_and_toml(table: dict[str, Any]) -> None:
    spec = MachineSpec.of(**table)
    assert MachineSpec.parse(spec.model_dump_json(), form="json") == spec
    data = json.loads(spec.model_dump_json(exclude_none=True))
    assert MachineSpec.parse(toml(data)) == spec
    assert MachineSpec.of(**spec.model_dump()) == spec


@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from([*MachineSpec.model_fields]) | st.text(), json_values),
    st.sampled_from([MachineSpec, FaultSchedule]),
)
def test_any_data_is_a_document_or_invalid(
    data: dict[str, Any], model: type[MachineSpec | FaultSchedule]
) -> None:
    try:
        build(model, data)
    except InvalidSpec as error:
        text = str(error)
        # Errors go to terminals, files and other processes.
        text.encode()
        json.dumps(error.to_record(), allow_nan=False)
        for internal in ("pydantic", "function-", "Input should", "<class", "tuple", "dict"):
            assert internal not in text.replace(repr(data), "") or internal in repr(data)


def test_parts_that_are_models_already_are_taken() -> None:
    spec = MachineSpec.of(name="a", disks=[Disk(name="d", size=MIB)], nics=[Nic(name="n")])
    assert spec.disks[0].size == MIB


def test_changes_are_checked_as_a_whole() -> None:
    spec = MachineSpec.parse(FULL)
    assert spec.with_changes(seed=9).seed == 9
    assert spec.with_changes(seed=9).with_changes(seed=7) == spec
    with pytest.raises(InvalidSpec) as caught:
        spec.with_changes(disks=[*spec.disks, Disk(name="root", size=MIB)])
    assert problems(caught.value) == {"disks.2.name": ("root", "a name that disks.0 has not")}
    with pytest.raises(InvalidSpec) as caught:
        spec.with_changes(cpus=2)
    assert set(problems(caught.value)) == {"memory.nodes"}


@given(specs)
def test_another_machine_has_another_name_and_other_addresses(spec: MachineSpec) -> None:
    other = spec.renamed("twin")
    assert other.name == "twin"
    assert all(nic.mac is None for nic in other.nics)
    assert MachineSpec.of(**other.model_dump()) == other
    changes = {"name": spec.name, "nics": spec.nics}
    assert other.model_copy(update=changes) == spec


@pytest.mark.parametrize("name", ["a b", "", None, 3])
def test_another_name_has_to_be_a_name(name: Any) -> None:
    with pytest.raises(InvalidSpec) as caught:
        MachineSpec.of(name="a").renamed(name)
    assert [problem.field for problem in caught.value.problems] == ["name"]


@pytest.mark.parametrize(
    ("spelling", "architecture"),
    [
        ("riscv64", Architecture.RISCV64),
        ("arm64", Architecture.AARCH64),
        ("AArch64", Architecture.AARCH64),
        ("x86-64", Architecture.X86_64),
        ("amd64", Architecture.X86_64),
        ("ppc64el", Architecture.PPC64LE),
        ("powerpc64le", Architecture.PPC64LE),
    ],
)
def test_usual_spellings_of_architectures_are_understood(
    spelling: str, architecture: Architecture
) -> None:
    assert parse_architecture(spelling) is architecture
    assert MachineSpec.of(name="a", architecture=spelling).architecture is architecture


def test_every_architecture_has_a_debian_name_and_a_console() -> None:
    for architecture in Architecture:
        assert parse_architecture(architecture.debian) is architecture
        assert architecture.console


# The JSON Schema that `vmlab schema` prints.

SCHEMA = MachineSpec.model_json_schema()


def fields_of(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = [(f"{schema['title']}.{name}", one) for name, one in schema["properties"].items()]
    for name, part in schema["$defs"].items():
        for field, one in part.get("properties", {}).items():
            found.append((f"{name}.{field}", one))
    return found


def test_the_schema_is_valid_and_describes_every_field() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert [name for name, field in fields_of(SCHEMA) if not field.get("description")] == []


@pytest.mark.parametrize(
    "text",
    [FULL, SHORT, 'name = "a"\nmemory = 1073741824\narchitecture = "arm64"\n'],
    ids=["full", "short", "bytes"],
)
def test_valid_documents_are_valid_by_the_schema(text: str) -> None:
    MachineSpec.parse(text)
    Draft202012Validator(SCHEMA).validate(tomllib.loads(text))


@settings(max_examples=100)
@given(tables())
def test_no_valid_document_is_invalid_by_the_schema(table: dict[str, Any]) -> None:
    spec = MachineSpec.of(**table)
    validator = Draft202012Validator(SCHEMA)
    validator.validate(json.loads(json.dumps(table)))
    validator.validate(json.loads(spec.model_dump_json()))


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"name": "a b"},
        {"name": "a", "cpus": 0},
        {"name": "a", "cpus": "two"},
        {"name": "a", "memory": "5X"},
        {"name": "a", "boot": ""},
        {"name": "a", "disk": []},
        {"name": "a", "architecture": "z80"},
        {"name": "a", "nics": [{"name": "n", "mac": "1"}]},
        {"name": "a", "disks": [{"name": "d", "size": "1G", "bus": "ide"}]},
    ],
)
def test_the_schema_refuses_what_is_refused(table: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec):
        build(MachineSpec, table)
    assert not Draft202012Validator(SCHEMA).is_valid(table)
