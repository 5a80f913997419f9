"""The command line and the layout: pure functions of a specification."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from vmlab.hypervisors.monitored.disks import DiskFile
from vmlab.hypervisors.monitored.names import made_mac, node_name
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.qemu import networks
from vmlab.hypervisors.qemu.boards import BOARDS
from vmlab.hypervisors.qemu.command_line import Launch, arguments, keyval
from vmlab.hypervisors.qemu.layout import Layout, effective_bus
from vmlab.machine.architecture import Architecture
from vmlab.machine.errors import InvalidSpec, ResourceExhausted
from vmlab.machine.spec import Disk, MachineSpec, Nic

OWNER = Owner("run", "r1", Path("/home/runs/r1"))


def spec_of(**fields: Any) -> MachineSpec:
    return MachineSpec.of(**({"name": "m", "architecture": "x86_64"} | fields))


def argv(spec: MachineSpec, **options: Any) -> list[str]:
    board = BOARDS[spec.architecture]
    disks = tuple(
        DiskFile(disk.name, Path(f"/d/{disk.name}"), "qcow2", 512, False, True, disk.serial)
        for disk in spec.disks
    )
    return arguments(
        Launch(
            id="0123456789abcdef0123456789abcdef",
            spec=spec,
            accelerator=options.pop("accelerator", "tcg"),
            layout=options.pop("layout", None) or Layout.of(spec, board),
            disks=disks,
            netdevs=tuple(networks.backend(nic, OWNER, "id") for nic in spec.nics),
            logs=Path("/logs, with a comma"),
            program="qemu-system-x86_64",
            **options,
        )
    )


def after(words: list[str], option: str) -> list[str]:
    """The arguments of every `option`."""
    return [value for word, value in pairwise(words) if word == option]


@pytest.mark.parametrize("architecture", list(Architecture))
def test_every_board_has_a_console_a_balloon_entropy_and_no_default_devices(
    architecture: Architecture,
) -> None:
    words = argv(spec_of(architecture=architecture.value))
    devices = after(words, "-device")
    assert "virtio-rng-pci" in devices
    assert any(device.startswith("virtio-balloon-pci") for device in devices)
    assert {"-nodefaults", "-no-user-config", "-S"} <= set(words)
    assert after(words, "-serial") == ["chardev:con-serial"]
    assert after(words, "-display") == ["none"]
    assert after(words, "-machine")[0].startswith(BOARDS[architecture].machine)


def test_kernel_initrd_and_command_line_are_those_of_the_specification() -> None:
    boot = {"kernel": "/k", "initrd": "/i", "cmdline": "quiet", "firmware": "/f"}
    words = argv(spec_of(boot=boot))
    assert after(words, "-kernel") == ["/k"]
    assert after(words, "-initrd") == ["/i"]
    assert after(words, "-bios") == ["/f"]
    assert after(words, "-append") == ["console=ttyS0 quiet"]
    told = argv(spec_of(boot=boot), ticks_khz=2_000_000)
    assert after(told, "-append") == ["console=ttyS0 tsc_early_khz=2000000 quiet"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"boot": {"kernel": "/k", "cmdline": "console=hvc7"}}, ["console=hvc7"]),
        (
            {"boot": {"kernel": "/k"}, "consoles": [{"name": "a", "kind": "virtio"}]},
            ["console=hvc0"],
        ),
        ({"boot": {"kernel": "/k"}, "consoles": []}, []),
    ],
)
def test_kernel_gets_the_first_console_unless_it_has_one(
    fields: dict[str, Any], expected: list[str]
) -> None:
    assert after(argv(spec_of(**fields)), "-append") == expected


def test_image_that_nobody_has_looked_up_is_refused() -> None:
    with pytest.raises(InvalidSpec, match=r"boot\.image") as caught:
        argv(spec_of(boot="debian"))
    assert "vmlab run" in str(caught.value.hint)


def test_cpus_and_numa_nodes_are_spelled_out() -> None:
    words = argv(
        spec_of(
            cpus={"count": 4, "sockets": 2, "threads": 2, "model": "Nehalem"},
            memory={
                "size": "64M",
                "nodes": [
                    {"memory": "48M", "cpus": [0, 1], "host_node": 0},
                    {"memory": "16M", "cpus": [2, 3]},
                ],
            },
        )
    )
    assert after(words, "-smp") == ["4,sockets=2,cores=1,threads=2"]
    assert after(words, "-cpu") == ["Nehalem"]
    first, second = map(json.loads, after(words, "-object"))
    assert (first["size"], first["host-nodes"], first["policy"]) == (48 << 20, [0], "bind")
    assert (second["size"], second["share"]) == (16 << 20, True)
    assert after(words, "-numa")[1] == "node,nodeid=1,cpus=2,cpus=3,memdev=ram1"


def test_accelerated_machines_have_the_hosts_cpu_and_hot_plug_room() -> None:
    words = argv(spec_of(cpus={"count": 1, "maximum": 4}), accelerator="kvm")
    assert after(words, "-cpu") == ["host"]
    assert after(words, "-smp") == ["1,maxcpus=4"]


def test_memory_of_a_copy_is_mapped_privately_from_files() -> None:
    words = argv(spec_of(), memory=(Path("/proc/1/fd/3"),), private=True, incoming=True)
    (backend,) = map(json.loads, after(words, "-object"))
    assert (backend["mem-path"], backend["share"]) == ("/proc/1/fd/3", False)
    assert after(words, "-incoming") == ["defer"]


def test_room_to_grow_is_on_the_command_line_and_so_is_what_came() -> None:
    spec = spec_of(
        cpus={"count": 3, "maximum": 4},
        memory={"size": "384M", "maximum": "1G"},
        boot={"kernel": "/k"},
    )
    fresh = argv(spec)
    assert after(fresh, "-smp") == ["3,maxcpus=4"]
    assert after(fresh, "-m") == ["384M,slots=16,maxmem=1073741824B"]
    assert "memhp_default_state=online" in after(fresh, "-append")[0]
    assert not any("pc-dimm" in word for word in fresh)
    vcpu = {"driver": "max-x86_64-cpu", "id": "vcpu-2", "core-id": 2}
    layout = Layout.of(spec, BOARDS[Architecture.X86_64])
    layout = layout.with_module(128 << 20).with_vcpus([vcpu])
    assert Layout.from_record(json.loads(json.dumps(layout.to_record()))) == layout
    grown = argv(spec, layout=layout)
    assert after(grown, "-smp") == ["2,maxcpus=4"]
    assert after(grown, "-m") == ["256M,slots=16,maxmem=1073741824B"]
    devices = after(grown, "-device")
    assert {"pc-dimm,id=dimm-1,memdev=ram1", "max-x86_64-cpu,id=vcpu-2,core-id=2"} <= set(devices)
    objects = [json.loads(word) for word in after(grown, "-object")]
    assert [(each["id"], each["size"]) for each in objects] == [
        ("ram0", 256 << 20),
        ("ram1", 128 << 20),
    ]


def test_odd_memory_sizes_are_given_in_bytes() -> None:
    assert after(argv(spec_of(memory=(1 << 20) + 4096)), "-m") == [f"{(1 << 20) + 4096}B"]


def test_disks_are_behind_ports_and_bootable_without_a_kernel() -> None:
    words = argv(
        spec_of(disks=[{"name": "a", "size": 512}, {"name": "b", "size": 512, "bus": "scsi"}])
    )
    devices = after(words, "-device")
    assert "virtio-blk-pci,drive=d-a,serial=a,id=disk-a,bus=port0,bootindex=0" in devices
    assert "scsi-hd,drive=d-b,serial=b,id=disk-b,bus=scsi0.0,scsi-id=0,lun=0,bootindex=1" in devices
    assert len([device for device in devices if device.startswith("pcie-root-port")]) == 10


@pytest.mark.parametrize(("user", "model"), [(0, "passthrough"), (1000, "none")])
def test_shares_are_read_only_unless_they_are_not_and_their_files_are_ordinary(
    monkeypatch: pytest.MonkeyPatch, user: int, model: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    words = argv(
        spec_of(
            shares=[
                {"tag": "ro", "source": "/a,b", "target": "/a"},
                {"tag": "rw", "source": "/c", "target": "/c", "readonly": False, "kind": "9p"},
                {"tag": "copied", "source": "/d", "target": "/d", "kind": "copy"},
            ]
        )
    )
    read, write = after(words, "-fsdev")
    assert "path=/a,,b" in read
    assert read.endswith("readonly=on")
    assert f"security_model={model}" in write
    assert write.endswith("readonly=off")


def test_a_share_has_a_device_for_each_way_that_it_may_go() -> None:
    kinds = {"own": "auto", "slow": "9p", "fast": "virtiofs", "mine": "copy"}
    spec = spec_of(
        shares=[
            {"tag": tag, "source": "/a", "target": "/a", "kind": kind}
            for tag, kind in kinds.items()
        ]
    )
    layout = Layout.of(spec, BOARDS[spec.architecture], ("own", "fast"))
    devices = after(argv(spec, layout=layout), "-device")
    assert [word for word in devices if word.startswith("virtio-9p")] == [
        "virtio-9p-pci,fsdev=share0,mount_tag=own",
        "virtio-9p-pci,fsdev=share1,mount_tag=slow",
    ]
    assert [word for word in devices if word.startswith("vhost")] == [
        "vhost-user-fs-pci,chardev=virtiofs0,tag=own",
        "vhost-user-fs-pci,chardev=virtiofs2,tag=fast",
    ]
    assert "socket,id=virtiofs2,path=virtiofs-2.sock" in after(
        argv(spec, layout=layout), "-chardev"
    )
    assert Layout.from_record(json.loads(json.dumps(layout.to_record()))).virtiofs == (
        "own",
        "fast",
    )
    old = layout.to_record()
    del old["virtiofs"]
    assert Layout.from_record(old).virtiofs == ()


def test_commas_in_paths_are_doubled() -> None:
    assert any("/logs,, with a comma/" in word for word in argv(spec_of()))
    assert keyval({"a": "x", "b": True, "c": 1}) == "x,b=on,c=1"


def test_too_many_serial_ports_are_refused() -> None:
    consoles = [{"name": "a"}, {"name": "b"}]
    with pytest.raises(InvalidSpec, match="at most 1 serial ones"):
        argv(spec_of(architecture="riscv64", consoles=consoles))


def test_display_is_there_if_it_is_asked_for() -> None:
    assert "VGA" in after(argv(spec_of(display=True)), "-device")
    assert "VGA" not in after(argv(spec_of()), "-device")


# ------------------------------------------------------------------- layout


def test_layout_keeps_places_when_devices_come_and_go() -> None:
    spec = spec_of(disks=[{"name": "a", "size": 512}], nics=[{"name": "n"}])
    layout = Layout.of(spec, BOARDS[Architecture.X86_64])
    more = layout.with_disk("b", "virtio").with_disk("s", "scsi").without("disk-a")
    again = more.with_disk("c", "virtio")
    assert (again.places["disk-b"], again.places["disk-c"], again.places["disk-s"]) == (2, 0, 0)
    assert Layout.from_record(json.loads(json.dumps(again.to_record()))) == again
    assert again.without("nic-n").macs == {}


def test_layout_that_is_full_says_so() -> None:
    layout = Layout(ports=1).with_disk("a", "virtio")
    with pytest.raises(ResourceExhausted, match="all 1 places for PCI devices are taken"):
        layout.with_nic("n", "52:54:00:00:00:01")


def test_long_names_of_disks_get_short_names_of_nodes() -> None:
    assert node_name("a") == "d-a"
    long = node_name("x" * 63)
    assert len(long) <= 31
    assert long != node_name("x" * 62)


def test_disk_plugged_into_a_running_riscv_machine_is_a_scsi_disk() -> None:
    disk = Disk(name="a", size=512)
    board = BOARDS[Architecture.RISCV64]
    assert effective_bus(disk, board, live=True) == "scsi"
    assert effective_bus(disk, board, live=False) == "virtio"


def test_mac_addresses_come_from_seed_and_names_and_avoid_those_taken() -> None:
    spec = spec_of(seed=1)
    mac = made_mac(spec, "n")
    assert mac == made_mac(spec, "n")
    assert mac != made_mac(spec_of(seed=2), "n")
    assert mac != made_mac(spec, "n", [mac])
    assert mac.startswith("52:54:00:")


# ------------------------------------------------------------------- networks


def test_segments_of_two_owners_are_two() -> None:
    other = Owner("run", "r2", Path("/home/runs/r2"))
    assert networks.segment_group(OWNER, "lan") == networks.segment_group(OWNER, "lan")
    assert networks.segment_group(OWNER, "lan") != networks.segment_group(other, "lan")
    assert networks.segment_group(OWNER, "lan") != networks.segment_group(OWNER, "wan")


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        ("user", "user"),
        ("segment:lan", "socket"),
        ("tap:tap0", "tap"),
        ("bridge:br0", "tap"),
        ("none", "hubport"),
    ],
)
def test_each_kind_of_network_has_its_own_backend(network: str, kind: str) -> None:
    backend = networks.backend(Nic(name="n", network=network), OWNER, "id")
    assert (backend["type"], backend["id"]) == (kind, "net-n")
    if network == "tap:tap0":
        assert backend["ifname"] == "tap0"
    if network == "bridge:br0":
        assert len(backend["ifname"]) <= 15


def test_ports_of_forwards_are_read_out_of_the_monitors_text() -> None:
    text = (
        "Hub -1 (net-a):\r\n"
        "  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
        "  TCP[HOST_FORWARD]  11       127.0.0.1 42641       10.0.2.15    22     0     0\r\n"
        "  UDP[HOST_FORWARD]  12       127.0.0.1 42642       10.0.2.15    53     0     0\r\n"
        "  TCP[ESTABLISHED]   13       127.0.0.1 42641       10.0.2.15    22     0     0\r\n"
        "Hub -1 (net-b):\r\n"
    )
    assert networks.parse_usernet(text) == {
        "net-a": [("tcp", 42641, 22), ("udp", 42642, 53)],
        "net-b": [],
    }
