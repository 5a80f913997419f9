"""The machine file: what a specification becomes, and that the engine reads what is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmlab.engine.configuration import (
    Boot,
    Configuration,
    DiskBus,
    DiskFile,
    Execution,
    Forward,
    Gdb,
    ImageFormat,
    Nic,
    SegmentKind,
    SocketPort,
    Time,
    TimeMode,
    load,
    text_of,
)
from vmlab.hypervisors.embedded.machine_file import Launch, check, configuration
from vmlab.hypervisors.monitored import disks
from vmlab.hypervisors.monitored.networks import segment_group
from vmlab.hypervisors.ownership import Owner
from vmlab.machine.errors import InvalidSpec
from vmlab.machine.spec import MachineSpec

OWNER = Owner("run", "r1", Path("/home/runs/r1"))
LOGS = Path("/home/machine")


def made(spec: MachineSpec, *files: disks.DiskFile) -> Configuration:
    macs = {nic.name: f"52:54:00:00:00:0{n}" for n, nic in enumerate(spec.nics)}
    return configuration(Launch("1" * 32, spec, files, macs, LOGS, OWNER))


def spec_of(**fields: object) -> MachineSpec:
    base: dict[str, object] = {"name": "vm", "architecture": "riscv64", "boot": {"kernel": "/k"}}
    return MachineSpec.of(**(base | fields))


def test_a_debugger_has_a_socket_where_one_is_wanted(tmp_path: Path) -> None:
    launch = Launch("1" * 32, spec_of(), (), {}, LOGS, OWNER, Path("/run/gdb.sock"))
    wanted = configuration(launch)
    assert wanted.gdb == Gdb("/run/gdb.sock")
    (tmp_path / "m.toml").write_text(text_of(wanted))
    assert load(tmp_path / "m.toml").gdb == wanted.gdb
    assert configuration(replace(launch, debugger=None)).gdb is None


def test_a_machine_is_made_of_what_was_specified() -> None:
    spec = spec_of(
        cpus=2,
        memory="64M",
        boot={"kernel": "/k", "initrd": "/i", "cmdline": "quiet"},
        consoles=[{"name": "serial"}, {"name": "terminal", "kind": "virtio"}],
        channels=["org.x.0"],
        disks=[{"name": "data", "size": "1M", "bus": "scsi"}],
        nics=[
            {"name": "a", "network": "segment:lan"},
            {"name": "b", "network": "user", "forwards": [{"guest": 22, "protocol": "udp"}]},
            {"name": "c", "network": "tap:tap0"},
            {"name": "d", "network": "bridge:br0"},
            {"name": "e", "network": "none"},
        ],
    )
    file = disks.DiskFile("data", Path("/d.img"), "raw", 1 << 20, readonly=True, made=True)
    found = made(spec, file)
    assert (found.name, found.harts, found.memory) == ("vm", 2, 64 << 20)
    assert found.boot == Boot("/k", "/i", "console=ttyS0 quiet")
    assert found.serial == SocketPort("console-serial.sock", "serial", f"{LOGS}/console-serial.log")
    assert [console.name for console in found.consoles] == ["terminal"]
    assert found.channels == [SocketPort("channel-org.x.0.sock", "org.x.0")]
    assert found.disks == [
        DiskFile("d-data", "/d.img", ImageFormat.RAW, True, "data", DiskBus.SCSI, "disk-data")
    ]
    group, port = segment_group(OWNER, "lan")
    assert [(nic.segment, nic.path) for nic in found.nics] == [
        (SegmentKind.MULTICAST, f"{group}:{port}"),
        (SegmentKind.USER, ""),
        (SegmentKind.TAP, "tap0"),
        (SegmentKind.TAP, found.nics[3].path),
        (SegmentKind.NONE, ""),
    ]
    assert found.nics[1].forwards == [Forward(22, protocol="udp")]
    assert found.nics[3].path.startswith("vml") and len(found.nics[3].path) <= 15
    assert found.paused and found.no_shutdown
    assert (found.time, found.seed) == (Time(), None)


def test_time_and_randomness_come_from_the_seed_where_that_is_asked_for() -> None:
    found = made(spec_of(deterministic=True, seed=7))
    assert (found.time.mode, found.seed) == (TimeMode.DETERMINISTIC, 7)


def test_who_executes_is_chosen_and_firmware_is_loaded() -> None:
    spec = spec_of(accelerator="reference", boot={"firmware": "/f"}, consoles=[])
    found = made(spec)
    assert found.execution is Execution.REFERENCE
    assert found.boot == Boot(firmware="/f")
    assert found.serial is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"boot": {}}, "boot.kernel"),
        ({"boot": {"image": "debian"}}, "boot.image"),
        ({"cpus": {"count": 4, "model": "max"}}, "cpus.model"),
        ({"cpus": {"count": 4, "sockets": 2, "cores": 2, "threads": 1}}, "cpus.sockets"),
        ({"consoles": [{"name": "a"}, {"name": "b"}]}, "consoles"),
        ({"memory": (8 << 20) + 512}, "memory.size"),
        ({"nics": [{"name": f"n{n}", "network": "none"} for n in range(24)]}, "disks"),
    ],
)
def test_what_the_engine_does_not_have_is_named(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        check(spec_of(**fields))
    assert field in {problem.field for problem in caught.value.problems}


def test_disks_behind_the_scsi_host_need_no_slot() -> None:
    many = [{"name": f"d{n}", "size": "1M", "bus": "scsi"} for n in range(100)]
    check(spec_of(disks=many))


_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
_PATH = _TEXT.map(lambda text: "/x" + text.replace("/", ""))


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    name=_TEXT, cmdline=_TEXT, path=_PATH, seed=st.none() | st.integers(0, (1 << 64) - 1),
    flags=st.tuples(*[st.booleans()] * 3), count=st.integers(0, 2),
)  # fmt: skip
def test_the_engine_reads_what_was_written(
    tmp_path: Path, name: str, cmdline: str, path: str, seed: int | None,
    flags: tuple[bool, bool, bool], count: int,
) -> None:  # fmt: skip
    configured = Configuration(
        name=name,
        memory=1 << 20,
        qmp="/q",
        boot=Boot(path, cmdline=cmdline),
        serial=SocketPort(path, log=path) if flags[0] else None,
        channels=[SocketPort(path, f"{name}{number}") for number in range(count)],
        disks=[DiskFile(f"{name}{number}", path, read_only=flags[1]) for number in range(count)],
        nics=[
            Nic(f"{name}0", "52:54:00:00:00:01", SegmentKind.USER, forwards=[Forward(1)] * count)
        ],
        scsi=flags[2],
        seed=seed,
    )
    file = tmp_path / "machine.toml"
    file.write_text(text_of(configured), encoding="utf-8")
    nics = [replace(nic, path="", peer="") for nic in configured.nics]
    assert load(file) == replace(configured, nics=nics)
