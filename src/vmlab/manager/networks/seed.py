"""What a guest's cloud-init is told: documents, and a disk with them (the data source NoCloud).

The disk is an ISO 9660 image with the label "cidata" (cloudinit.readthedocs.io, NoCloud), made by
pycdlib. Its network configuration is of version 2 and finds NICs by their MAC addresses; a
network's addresses stand in it where DHCP does not tell them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_interface
from pathlib import Path
from typing import Any, Final

from vmlab.report import write_atomically

__all__ = ["Identity", "SeedNic", "documents", "instance_id", "write_seed"]

_LABEL: Final = "cidata"
_EMPTY_USER_DATA: Final = "#cloud-config\n{}\n"


@dataclass(frozen=True, slots=True)
class SeedNic:
    """A NIC as its guest is to set it up.

    Args:
        name: In the machine's specification.
        mac: How the guest finds it.
        dhcp: The versions of IP that it asks for its addresses of.
        addresses: With prefix length; it is told those that it does not ask for.
        gateways: Of the network, of the same versions of IP.
        dns: Servers.
    """

    name: str
    mac: str
    dhcp: frozenset[int]
    addresses: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Identity:
    """What a guest is told about itself.

    Args:
        instance: Id that cloud-init knows it by: with another one it starts anew.
        hostname: Its name.
        ssh_keys: Public keys that may log in.
        user_data: For cloud-init; None is nothing.
        nics: How it is connected; None leaves that to the image.
    """

    instance: str
    hostname: str
    ssh_keys: tuple[str, ...] = ()
    user_data: str | None = None
    nics: Sequence[SeedNic] = field(default_factory=tuple)


def instance_id(machine: str, instance: int) -> str:
    """The id by which cloud-init knows a machine: with another one it begins anew.

    Args:
        machine: Id of the machine.
        instance: How often it was to begin anew (`Metadata.instance`).
    """
    return f"i-{machine[:17]}" + (f"-{instance}" if instance else "")


def documents(identity: Identity) -> dict[str, str]:
    """The files of a NoCloud seed by name; YAML, of which JSON is a part."""
    told: dict[str, Any] = {
        "instance-id": identity.instance,
        "local-hostname": identity.hostname,
        "public-keys": list(identity.ssh_keys),
    }
    made = {
        "meta-data": json.dumps(told, indent=1) + "\n",
        "user-data": identity.user_data or _EMPTY_USER_DATA,
    }
    if identity.nics:
        config = {"version": 2, "ethernets": {nic.name: _ethernet(nic) for nic in identity.nics}}
        made["network-config"] = json.dumps(config, indent=1) + "\n"
    return made


def _ethernet(nic: SeedNic) -> Mapping[str, Any]:
    made: dict[str, Any] = {"match": {"macaddress": nic.mac}}
    made |= {f"dhcp{version}": True for version in sorted(nic.dhcp)}
    told = [each for each in nic.addresses if ip_interface(each).version not in nic.dhcp]
    if told:
        made["addresses"] = told
    versions = {ip_interface(each).version for each in told}
    routes = [
        {"to": "::/0" if ":" in each else "0.0.0.0/0", "via": each}
        for each in nic.gateways
        if (6 if ":" in each else 4) in versions
    ]
    if routes:
        made["routes"] = routes
    if nic.dns and told:
        made["nameservers"] = {"addresses": list(nic.dns)}
    return made


def write_seed(identity: Identity, path: Path) -> Path:
    """Write the disk; one that says the same already is left as it is.

    A running guest may have the file open: it is replaced, never written into.
    """
    import pycdlib

    files = documents(identity)
    says = path.with_suffix(".json")
    text = json.dumps(files).encode()
    if path.exists() and says.exists() and says.read_bytes() == text:
        return path
    disk = pycdlib.PyCdlib()
    disk.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=_LABEL)
    for number, (name, content) in enumerate(sorted(files.items())):
        data = content.encode()
        disk.add_fp(
            io.BytesIO(data),
            len(data),
            f"/FILE{number}.;1",
            rr_name=name,
            joliet_path=f"/{name}",
        )
    out = io.BytesIO()
    disk.write_fp(out)
    disk.close()
    says.unlink(missing_ok=True)
    write_atomically(path, out.getvalue())
    write_atomically(says, text)
    return path
