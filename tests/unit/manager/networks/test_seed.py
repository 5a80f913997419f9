from __future__ import annotations

import io
import json
from pathlib import Path

import pycdlib
import pytest
from tests.unit.manager.store.rows import add_machine, add_network, add_nic

from vmlab.manager.networks import addresses
from vmlab.manager.networks.networks import Networks
from vmlab.manager.networks.seed import Identity, SeedNic, documents, write_seed
from vmlab.manager.store.database import Database

IDENTITY = Identity("i-1", "one", ("ssh-ed25519 AAAA me",), "#cloud-config\nruncmd: [true]\n")


def read(path: Path) -> dict[str, str]:
    """What another reader finds on the disk, by the names that Linux shows."""
    disk = pycdlib.PyCdlib()
    disk.open(str(path))
    try:
        found = {}
        for child in disk.list_children(rr_path="/"):
            if child.is_file():
                name = child.rock_ridge.name().decode()
                out = io.BytesIO()
                disk.get_file_from_iso_fp(out, rr_path=f"/{name}")
                found[name] = out.getvalue().decode()
        return found
    finally:
        disk.close()


def test_the_disk_is_what_cloud_init_looks_for(tmp_path: Path) -> None:
    path = write_seed(IDENTITY, tmp_path / "a.iso")
    image = path.read_bytes()
    # ECMA-119, 8.4: the primary volume descriptor, and the volume's label in it.
    assert image[0x8001:0x8006] == b"CD001"
    assert image[0x8028:0x8048].strip() == b"cidata"
    assert len(image) % 512 == 0
    assert read(path) == documents(IDENTITY)


def test_guests_are_told_who_they_are() -> None:
    made = documents(IDENTITY)
    assert json.loads(made["meta-data"]) == {
        "instance-id": "i-1",
        "local-hostname": "one",
        "public-keys": ["ssh-ed25519 AAAA me"],
    }
    assert made["user-data"] == IDENTITY.user_data
    assert "network-config" not in made
    assert documents(Identity("i-1", "one"))["user-data"].startswith("#cloud-config\n")


@pytest.mark.parametrize(
    ("nic", "told"),
    [
        (SeedNic("net0", "52:54:00:00:00:01", frozenset({4, 6})), {"dhcp4": True, "dhcp6": True}),
        (
            SeedNic(
                "net0",
                "52:54:00:00:00:01",
                frozenset({4}),
                ("10.9.0.2/24", "fd00:9::2/64"),
                ("10.9.0.1", "fd00:9::1"),
                ("fd00:9::53",),
            ),
            {
                "dhcp4": True,
                "addresses": ["fd00:9::2/64"],
                "routes": [{"to": "::/0", "via": "fd00:9::1"}],
                "nameservers": {"addresses": ["fd00:9::53"]},
            },
        ),
        (
            SeedNic("net0", "52:54:00:00:00:01", frozenset(), ("10.9.0.2/24",), ("10.9.0.1",)),
            {"addresses": ["10.9.0.2/24"], "routes": [{"to": "0.0.0.0/0", "via": "10.9.0.1"}]},
        ),
    ],
)
def test_a_nic_is_told_what_it_does_not_ask_for(nic: SeedNic, told: dict[str, object]) -> None:
    config = json.loads(documents(Identity("i", "one", nics=[nic]))["network-config"])
    assert config["version"] == 2
    assert config["ethernets"]["net0"] == {"match": {"macaddress": nic.mac}} | told


def test_a_disk_that_says_the_same_is_left_and_another_one_takes_its_place(tmp_path: Path) -> None:
    path = write_seed(IDENTITY, tmp_path / "a.iso")
    before = path.stat()
    with path.open("rb") as held:
        write_seed(IDENTITY, path)
        assert path.stat().st_ino == before.st_ino
        write_seed(Identity("i-2", "two"), path)
        # Who has it open still reads what was there.
        assert b"i-1" in held.read()
    assert "i-2" in read(path)["meta-data"]


def test_a_machine_s_seed_says_what_the_store_has_and_goes_with_it(
    database: Database, networks: Networks
) -> None:
    from sqlalchemy.orm import Session

    def make(s: Session) -> tuple[str, Path]:
        lan = add_network(s, "lan", subnet="10.9.0.0/24", subnet6="fd00:9::/64")
        one = add_machine(s, "one", metadata_={"ssh_keys": ["ssh-rsa B"], "user_data": None})
        add_nic(s, one, lan)
        add_nic(s, one)
        addresses.take(s, one)
        s.refresh(one)
        return one.id, networks.seed(one)

    id_, path = database.write_now(make)
    told = read(path)
    assert json.loads(told["meta-data"])["public-keys"] == ["ssh-rsa B"]
    ethernets = json.loads(told["network-config"])["ethernets"]
    # All is told by DHCP: on a network of the store's what the store has, and behind NAT.
    mac = ethernets["net0"]["match"]
    assert ethernets["net0"] == {"match": mac, "dhcp4": True, "dhcp6": True}
    assert ethernets["net1"]["dhcp4"] is True

    import asyncio

    asyncio.run(networks.machine_deleted(id_))
    assert not list(path.parent.iterdir())
