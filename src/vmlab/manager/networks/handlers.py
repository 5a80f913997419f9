"""Networks made and removed, as operations.

A network's row is there from when it is asked for, so its name and its addresses are its own; the
host follows. It goes in the other order: first the row, which nothing may refer to, then what the
host has of it; what a crash leaves on the host then is of no network, and `reconcile` clears it.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from ipaddress import IPv4Network, ip_network
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from vmlab.machine.errors import InvalidSpec, OperationFailed, ResourceExhausted, SpecProblem
from vmlab.machine.fields import NAME_RULE, is_name
from vmlab.manager.networks import ipam, links, names
from vmlab.manager.networks.layout import network_pools, subnets_of
from vmlab.manager.networks.switch import PROGRAMS
from vmlab.manager.operator.handler import Handler, PlannedStep, Target, key, register
from vmlab.manager.operator.journal import Work
from vmlab.manager.requests import CreateNetwork, DeleteNetwork
from vmlab.manager.store.changes import Conflict, add_event
from vmlab.manager.store.queries import find_network
from vmlab.manager.store.tables import MachineRow, NetworkRow, NicRow, new_id

__all__ = ["CreateNetworkHandler", "DeleteNetworkHandler"]

_OWN_SUBNETS: Final = IPv4Network("10.214.0.0/16")
"""Where networks that name no subnet get theirs: of RFC 1918's, beside those that labs use."""

_RESERVED_NAMES: Final = ("user", "none")
"""What a NIC's network may be without there being one of that name."""

_OF_SUBNETS: Final = ("subnet", "subnet6", "gateway", "ranges", "reserved", "dns")
_OF_BRIDGES: Final = ("vlan", "bridge")


@register
class CreateNetworkHandler(Handler[CreateNetwork]):
    """Makes a network, here and on the host."""

    kind = "network.create"

    async def prepare(self, request: CreateNetwork) -> CreateNetwork:
        """Refuse what this host cannot have."""
        if request.mode == "bridged":
            await asyncio.to_thread(_check_host, request)
        return request

    def check(self, session: Session, request: CreateNetwork) -> Target:
        """Refuse what cannot be, and take the name, the subnet and the tag."""
        _check_fields(request)
        row = NetworkRow(
            id=new_id(),
            name=request.name,
            mode=request.mode,
            vlan=request.vlan,
            bridge=request.bridge,
            subnet=str(request.subnet) if request.subnet is not None else None,
            subnet6=str(request.subnet6) if request.subnet6 is not None else None,
            gateway=request.gateway,
            dns=list(request.dns),
            ranges=list(request.ranges),
            reserved=list(request.reserved),
            dhcp=request.dhcp,
            data={},
        )
        others = session.scalars(select(NetworkRow)).all()
        if request.mode != "user":
            if not subnets_of(row) and request.bridge is None:
                row.subnet = str(_free_subnet(others))
            network_pools(row)
            if row.gateway is None and row.subnet is not None:
                row.gateway = str(ipam.gateway_of(ip_network(row.subnet), None))
        if request.mode == "bridged":
            _check_beside(row, others)
        session.add(row)
        # A name that is taken is told now.
        session.flush()
        return Target(row.id, row.name, frozenset({key("network", row.id)}))

    def plan(self, session: Session, request: CreateNetwork) -> Sequence[PlannedStep]:
        """The row, and what of the host the mode needs."""
        steps = [PlannedStep("keep", f"keep network {request.name!r}")]
        if request.mode != "user":
            steps.append(PlannedStep("host", _text(request)))
        return steps

    def withdrawn(self, session: Session, request: CreateNetwork, target: str | None) -> None:
        """It never came about, unless a machine was put on it meanwhile."""
        if target is not None and not _is_used(session, target):
            _remove(session, target)

    async def run(self, work: Work[CreateNetwork]) -> dict[str, Any]:
        """Tell of it, and make it on the host."""
        network = work.target_id
        async with work.step("keep", f"keep network {work.request.name!r}") as step:
            work.on_undo(step, lambda: work.database.write(_undo, network, work.operation_id))
            if not step.done_before:
                step.also(_tell, network, "network.created", work.operation_id)
        if work.request.mode != "user":
            async with work.step("host", _text(work.request)) as step:
                work.on_undo(step, partial(_teardown_unless_used, work, network))
                if not step.done_before:
                    await work.manager.networks.ensure(network)
        return {"network": network}


@register
class DeleteNetworkHandler(Handler[DeleteNetwork]):
    """Removes a network that no machine is on, here and from the host."""

    kind = "network.delete"

    def check(self, session: Session, request: DeleteNetwork) -> Target:
        """Refuse one that machines are on."""
        row = find_network(session, request.network)
        on = select(MachineRow.name).join(NicRow).where(NicRow.network_id == row.id).distinct()
        machines = session.scalars(on.order_by(MachineRow.name).limit(5)).all()
        if machines:
            count = session.scalar(select(func.count()).select_from(on.subquery())) or 0
            more = f" and {count - len(machines)} more" if count > len(machines) else ""
            raise Conflict(
                f"network {row.name!r} has {count} machine{'s' if count != 1 else ''} on it: "
                f"{', '.join(machines)}{more}",
                hint="delete those first",
            )
        return Target(row.id, row.name, frozenset({key("network", row.id)}), row.version)

    def plan(self, session: Session, request: DeleteNetwork) -> Sequence[PlannedStep]:
        """The row first, then the host."""
        return [
            PlannedStep("remove", f"remove network {request.network!r}"),
            PlannedStep("host", "remove what the host has of it"),
        ]

    async def run(self, work: Work[DeleteNetwork]) -> dict[str, Any]:
        """Remove it; a machine that was put on it meanwhile keeps it (Conflict)."""
        network = work.target_id
        async with work.step("remove", "remove it") as step:
            if not step.done_before:
                step.also(_tell, network, "network.deleted", work.operation_id)
                step.also(_remove, network)
        async with work.step("host", "remove what the host has of it") as step:
            if not step.done_before:
                step.data["removed"] = await work.manager.networks.teardown(network)
        return {"network": network, "removed": step.data.get("removed", [])}


def _text(request: CreateNetwork) -> str:
    if request.mode == "isolated":
        return "serve its addresses on its segment"
    tag = f" with tag {request.vlan}" if request.vlan is not None else ""
    return f"make its bridge{tag}, its packet filter and its DHCP server"


def _check_fields(request: CreateNetwork) -> None:
    """Refuse what does not go together.

    Raises:
        InvalidSpec: naming every field that cannot be so.
    """
    problems = []

    def without(fields: Iterable[str], why: str) -> None:
        for name in fields:
            if value := getattr(request, name):
                shown = [str(each) for each in value] if isinstance(value, tuple) else value
                problems.append(SpecProblem(name, _plain(shown), f"left out: {why}"))

    if request.name in _RESERVED_NAMES:
        problems.append(SpecProblem("name", request.name, 'a name but "user" and "none"'))
    if request.mode == "user":
        without(
            (*_OF_BRIDGES, *_OF_SUBNETS),
            'in the mode "user" each machine is behind a NAT of its own, with addresses of its own',
        )
    elif request.mode == "isolated":
        without(_OF_BRIDGES, 'an isolated network has no bridge; the mode "bridged" has')
    if request.bridge is not None and (
        not is_name(request.bridge) or request.bridge.startswith(names.PREFIX[:3])
    ):
        expected = f'{NAME_RULE}; not beginning with "{names.PREFIX[:3]}", as vmlab\'s own do'
        problems.append(SpecProblem("bridge", request.bridge, expected))
    if request.subnet6 is not None and request.subnet6.network_address.scope_id is not None:
        problems.append(SpecProblem("subnet6", str(request.subnet6), "a subnet without a zone"))
    for server in request.dns:
        try:
            ipam.parse_address("dns", server)
        except InvalidSpec as error:
            problems += error.problems
    if problems:
        raise InvalidSpec(problems, what="network")


def _plain(value: object) -> object:
    return value if isinstance(value, (int, list)) else str(value)


def _free_subnet(others: Iterable[NetworkRow]) -> IPv4Network:
    taken = [subnet for row in others for subnet in subnets_of(row)]
    for subnet in _OWN_SUBNETS.subnets(new_prefix=24):
        if not any(subnet.overlaps(other) for other in taken if other.version == 4):
            return subnet
    raise ResourceExhausted(
        f"no subnet is left in {_OWN_SUBNETS}", hint="name a subnet, or delete networks"
    )


def _check_beside(row: NetworkRow, others: Iterable[NetworkRow]) -> None:
    """Refuse a bridged network that another one is in the way of.

    Raises:
        Conflict: saying which one, and why.
    """
    for other in others:
        if other.mode != "bridged":
            continue
        named = row.bridge is not None and row.bridge == other.bridge
        if named and (row.vlan is None) is not (other.vlan is None):
            raise Conflict(
                f"network {other.name!r} has the bridge {row.bridge} "
                + ("without tags" if other.vlan is None else "with tags"),
                hint="name another bridge, or give both networks a VLAN",
            )
        tagged = row.vlan is not None and (row.bridge, row.vlan) == (other.bridge, other.vlan)
        if tagged or (named and row.vlan is None):
            tag = f" with tag {row.vlan}" if row.vlan is not None else ""
            raise Conflict(
                f"network {other.name!r} is on {row.bridge or 'the switch'}{tag} already",
                hint="put machines on that network, or choose another tag or bridge",
            )
        for subnet in subnets_of(row):
            for theirs in subnets_of(other):
                if subnet.version == theirs.version and subnet.overlaps(theirs):
                    raise Conflict(
                        f"{subnet} overlaps {theirs} of network {other.name!r}; "
                        "this host is on both",
                        hint="choose another subnet",
                    )


def _check_host(request: CreateNetwork) -> None:
    """Refuse a bridged network where this process may not make one, or lacks a program.

    Raises:
        OperationFailed: saying what is missing.
    """
    if not links.may_administer():
        raise OperationFailed(
            "bridged networks need root, or CAP_NET_ADMIN",
            hint='the modes "isolated" and "user" need no rights',
        )
    needed = {"nft": "nftables", "dnsmasq": "dnsmasq-base"}
    if request.vlan is not None:
        needed |= dict.fromkeys(PROGRAMS, "openvswitch-switch")
    missing = {name: package for name, package in needed.items() if shutil.which(name) is None}
    if missing:
        raise OperationFailed(
            f"bridged networks need {', '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed",
            hint=f"install {' and '.join(sorted(set(missing.values())))} (names of Debian)",
        )


def _tell(session: Session, network: str, kind: str, operation: str) -> None:
    row = session.get(NetworkRow, network)
    if row is not None:
        add_event(session, kind, subject=row.id, name=row.name, operation=operation)


def _undo(session: Session, network: str, operation: str) -> None:
    """Take back what was made, unless a machine was put on it meanwhile: it keeps the network."""
    if not _is_used(session, network):
        _tell(session, network, "network.deleted", operation)
        _remove(session, network)


async def _teardown_unless_used(work: Work[CreateNetwork], network: str) -> None:
    if not await work.database.read(_is_used, network):
        await work.manager.networks.teardown(network)


def _is_used(session: Session, network: str) -> bool:
    """Whether a machine is on a network."""
    on = select(NicRow.id).where(NicRow.network_id == network).limit(1)
    return session.scalar(on) is not None


def _remove(session: Session, network: str) -> None:
    row = session.get(NetworkRow, network)
    if row is not None:
        session.delete(row)
