"""Addresses that two have or nobody, and interfaces that belong to nothing or are not there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from vmlab.machine.states import OFF, MachineState
from vmlab.manager.documents import Severity
from vmlab.manager.networks.names import SWITCH, interface
from vmlab.manager.observer.difference import Difference
from vmlab.manager.observer.known import Known, KnownAddress
from vmlab.manager.observer.seen import Seen

__all__ = ["address_conflict", "leaked_address", "lost_interface"]

_ON = frozenset({MachineState.RUNNING, MachineState.PAUSED})


def address_conflict(known: Known, seen: Seen) -> Iterator[Difference]:
    """Addresses in use by somebody else than whose they are, or by two at once."""
    if "leases" not in seen.looked or not seen.leases:
        return
    taken = {(address.network, address.address): address for address in known.addresses}
    users: dict[tuple[str, str], set[str]] = defaultdict(set)
    sources: dict[tuple[str, str], set[str]] = defaultdict(set)
    for lease in seen.leases:
        users[lease.network, lease.address].add(lease.mac)
        sources[lease.network, lease.address].add(lease.source)
    nics = {nic.mac: (machine, nic) for machine, nic in known.nic.values()}
    for (network, address), macs in users.items():
        owner = taken.get((network, address))
        wrong = sorted(mac for mac in macs if owner is not None and mac != owner.mac)
        if not wrong and len(macs) < 2:
            continue
        intruders = [nics[mac] for mac in wrong or sorted(macs)[1:] if mac in nics]
        title = known.network[network].name if network in known.network else network
        yield Difference(
            code="address-conflict",
            severity="error",
            subject=f"{network}/{address}",
            name=address,
            message=f"address {address} of network {title!r} is used by {', '.join(sorted(macs))}"
            + (f", and belongs to {_whose(known, owner)}" if owner is not None else ""),
            hint="give the guest that took it an address of its own",
            source="leases",
            evidence={
                "network": network,
                "address": address,
                "used_by": sorted(macs),
                "belongs_to": owner.mac if owner is not None else None,
                "intruders": [{"machine": m.id, "nic": n.name} for m, n in intruders],
                "seen_in": sorted(sources[network, address]),
            },
            touches=frozenset({network} | {machine.id for machine, _ in intruders})
            | frozenset(filter(None, (owner.machine if owner is not None else None,))),
            actions=("quarantine",) if intruders else (),
        )


def _whose(known: Known, address: KnownAddress) -> str:
    machine = known.machine.get(address.machine) if address.machine is not None else None
    return f"machine {machine.name!r} ({address.mac})" if machine is not None else "nobody"


def leaked_address(known: Known, seen: Seen) -> Iterator[Difference]:
    """Addresses that are taken by nobody, or by a machine at rest that should have let go."""
    for address in known.addresses:
        machine = known.machine.get(address.machine) if address.machine is not None else None
        if machine is None:
            why = "is taken, and by no machine"
        elif all(nic.id != address.nic for nic in machine.nics):
            why = f"is taken by machine {machine.name!r}, which has no such NIC any more"
        elif machine.releases == "stop" and machine.state in OFF and machine.wanted == "stopped":
            why = f"is taken by machine {machine.name!r}, which is {machine.state}"
        else:
            continue
        title = known.network[address.network].name if address.network in known.network else "?"
        yield Difference(
            code="leaked-address",
            severity="warning",
            subject=address.id,
            name=address.address,
            message=f"address {address.address} of network {title!r} {why}",
            hint="reconcile releases it",
            source="store",
            evidence={
                "network": address.network,
                "address": address.address,
                "machine": address.machine,
                "nic": address.nic,
                "mac": address.mac,
            },
            touches=frozenset(filter(None, (address.id, address.network, address.machine))),
            actions=("reconcile",),
        )


def lost_interface(known: Known, seen: Seen) -> Iterator[Difference]:
    """Interfaces of the host that belong to nothing, and those that are needed and not there."""
    if "interfaces" not in seen.looked:
        return
    for found in seen.interfaces:
        if found.network == SWITCH and any(each.vlan for each in known.network.values()):
            continue
        if found.network in known.network:
            continue
        yield _lost(
            found.name,
            found.kind,
            found.network,
            severity="warning",
            message=f"the {found.kind} {found.name!r} of the host is of a network that the store "
            "does not have",
            hint="reconcile removes it",
        )
    yield from _lacking(known, seen)
    yield from _cut_off(known, seen)


def _lacking(known: Known, seen: Seen) -> Iterator[Difference]:
    """What running machines on bridged networks need and the host does not have."""
    needed: dict[str, tuple[str, str, frozenset[str]]] = {}
    for machine, nic in known.nic.values():
        network = known.network.get(nic.network) if nic.network is not None else None
        if network is None or network.mode != "bridged" or machine.state not in _ON:
            continue
        touches = frozenset({network.id, machine.id})
        needed[network.bridge] = (network.id, "bridge", touches)
        if network.vlan is not None:
            # By it, the bridge is on the switch.
            needed[interface("port", network.id)] = (network.id, "port", touches)
    for name, (id_, kind, touches) in needed.items():
        if name in seen.every_interface:
            continue
        yield _lost(
            name,
            kind,
            id_,
            message=f"network {known.network[id_].name!r} needs the {kind} {name!r}, "
            "and the host does not have it",
            hint="reconcile makes it again",
            touches=touches,
            lacking=True,
        )


def _cut_off(known: Known, seen: Seen) -> Iterator[Difference]:
    """NICs of running machines whose tap is gone, or is not on its bridge."""
    on_bridge = {network.bridge: network for network in known.networks if network.bridge}
    for machine in known.machines:
        found = seen.placed.get((machine.host, machine.at))
        if found is None or found.nics is None or found.state not in _ON:
            continue
        for nic in found.nics:
            bridge = nic.network.partition(":")[2]
            network = on_bridge.get(bridge)
            if not nic.tap or network is None or (nic.tap, bridge) in seen.joined:
                continue
            if bridge not in seen.every_interface:
                continue  # that is what is wrong
            lacking = nic.tap not in seen.every_interface
            what = "is gone" if lacking else f"is not on the bridge {bridge!r}"
            yield _lost(
                nic.tap,
                "tap",
                network.id,
                message=f"the tap {nic.tap!r} of machine {machine.name!r} {what}: "
                f"its {nic.name} is cut off from network {network.name!r}",
                hint="reconcile plugs the NIC anew" if lacking else "reconcile puts it there again",
                source=f"parts:{machine.id}",
                touches=frozenset({machine.id}),
                lacking=lacking,
                machine=machine.id,
                nic=nic.name,
                bridge=bridge,
            )


def _lost(
    name: str,
    kind: str,
    network: str,
    *,
    message: str,
    hint: str,
    severity: Severity = "error",
    source: str = "interfaces",
    touches: frozenset[str] = frozenset(),
    lacking: bool = False,
    **evidence: str,
) -> Difference:
    """Of the interface of that name and kind, which is or was of a network: by its id."""
    return Difference(
        code="lost-interface",
        severity=severity,
        subject=name,
        name=name,
        message=message,
        hint=hint,
        source=source,
        evidence={
            "interface": name,
            "kind": kind,
            "network": network,
            "lacking": lacking,
            **evidence,
        },
        touches=touches | {network},
        actions=("reconcile",),
    )
