"""Networks on this host: made, looked at, and removed without a trace; knows no store.

What is made for a network is written down in a directory of its own before it is made, and that
directory goes last: whatever ends a manager, the next one finds what there may be. Interfaces say
by their alias which home and which network they are for. Everything can be called again.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from vmlab.hypervisors.monitored.networks import port_alias, segment_group
from vmlab.hypervisors.ownership import Owner
from vmlab.machine.errors import OperationFailed
from vmlab.manager.networks import dnsmasq, links, names, nat, segment_server
from vmlab.manager.networks.daemons import Daemon
from vmlab.manager.networks.layout import Layout, Lease, Record
from vmlab.manager.networks.switch import Switch
from vmlab.report import write_atomically

__all__ = ["HostNetworks"]

_FORWARDING: Final = "forwarding.json"


class HostNetworks:
    """The networks of one home on this host.

    Args:
        directory: Where the state of each is, in a directory that bears its id.
        machines: Whose machines are on isolated networks.
    """

    def __init__(self, directory: Path, machines: Owner) -> None:
        self.directory = directory
        self.home = names.digest(directory)
        self.switch = Switch(directory / names.SWITCH)
        self._machines = machines
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        # What networks share: the switch, forwarding.
        self._shared = asyncio.Lock()

    # ------------------------------------------------------------- making

    async def ensure(
        self,
        layout: Layout,
        leases: Sequence[Lease] = (),
    ) -> Layout:
        """Have all of a network there; what is there already stays as it is.

        Args:
            layout: The network.
            leases: Who is told which addresses.

        Returns:
            The layout, which says now whether its bridge is the host's own.

        Raises:
            OperationFailed: a program, a right or something of the kernel's is missing, or the
                host has something else under the same name or addresses.
        """
        async with self._locks[layout.network]:
            if layout.mode == "user":
                return layout
            directory = self.path(layout.network)
            record = await asyncio.to_thread(Record.read, directory)
            if record is not None and not record.here:
                # Of another boot or namespace: its programs serve nobody here.
                await self._end_daemons(layout.network)
                record = None
            if layout.mode == "bridged":
                if record is not None:
                    layout = replace(layout, foreign=record.layout.foreign)
                else:
                    layout = await asyncio.to_thread(self._claim, layout)
            if record is None or record.layout != layout:
                await asyncio.to_thread(_write_down, layout, directory)
            if layout.mode == "isolated":
                await self._serve_segment(layout, leases)
            else:
                await self._raise(layout, leases)
            return layout

    def _claim(self, layout: Layout) -> Layout:
        """Find out whether the bridge can be ours, before it is written down as such."""
        there = links.links()
        # The bridge of a network with a tag is ours by its name; the switch may have another's.
        found = there.get(layout.switch or layout.bridge)
        mine = found is not None and names.of_alias(self.home, found.alias) in {
            layout.network,
            names.SWITCH,
        }
        foreign = found is not None and not mine
        if found is not None and not mine and (layout.switch or found.kind != "bridge"):
            raise OperationFailed(
                f"the host has an interface {found.name} already"
                + (" that is no bridge" if found.kind != "bridge" else ""),
                hint="name another bridge; a network with a VLAN needs one of its own",
            )
        if not foreign:
            own = {name for name, link in there.items() if self._is_of(link, layout.network)}
            for name, address in links.addresses():
                for subnet in layout.subnets:
                    if name in own or address.version != subnet.version:
                        continue
                    if subnet.overlaps(address.network):
                        raise OperationFailed(
                            f"{subnet} overlaps {address}, which the host has on {name}",
                            hint="give the network another subnet",
                        )
        return replace(layout, foreign=foreign)

    def _is_of(self, link: links.Link, network: str) -> bool:
        return names.of_alias(self.home, link.alias) == network

    async def _raise(self, layout: Layout, leases: Sequence[Lease]) -> None:
        if layout.foreign:
            await self._gather(layout.bridge)
            return  # the host's own: whoever made it serves it
        alias = names.alias(self.home, layout.network)
        await asyncio.to_thread(links.make_bridge, layout.bridge, alias)
        await asyncio.to_thread(nat.hear_no_routers, layout.bridge)
        await self._gather(layout.bridge)
        if layout.vlan is not None:
            async with self._shared:
                await self._join_switch(layout, layout.vlan, alias)
        await asyncio.to_thread(links.add_addresses, layout.bridge, layout.gateways)
        if layout.gateways:
            label = names.interface("metadata", layout.network)
            address = f"{nat.METADATA_ADDRESS}/32"
            await asyncio.to_thread(links.add_addresses, layout.bridge, [address], label=label)
        await asyncio.to_thread(nat.apply, layout)
        if layout.gateways:
            async with self._shared:
                await asyncio.to_thread(self._forward, layout)
        await self._serve_bridge(layout, leases)

    async def _gather(self, bridge: str) -> None:
        """Have machines that were on a bridge that somebody removed on the one of its name."""
        for port in await asyncio.to_thread(_strays, bridge):
            await asyncio.to_thread(links.join, port, bridge)

    async def _join_switch(self, layout: Layout, tag: int, alias: str) -> None:
        await self.switch.up()
        await self.switch.add_bridge(layout.switch)
        shared = names.alias(self.home, names.SWITCH)
        await asyncio.to_thread(links.set_alias, layout.switch, shared)
        await self.switch.add_port(layout.switch, layout.port, tag)
        await asyncio.to_thread(links.set_alias, layout.port, alias)
        await asyncio.to_thread(links.join, layout.port, layout.bridge)

    async def _serve_bridge(self, layout: Layout, leases: Sequence[Lease]) -> None:
        if not layout.gateways:
            return
        link = (await asyncio.to_thread(links.links))[layout.bridge]
        directory = self.path(layout.network)
        text = dnsmasq.configuration(layout, leases, index=link.index, directory=directory)
        await self._dnsmasq(layout.network).keep(text, dnsmasq.command, ready=dnsmasq.READY)

    async def _serve_segment(self, layout: Layout, leases: Sequence[Lease]) -> None:
        group = segment_group(self._machines, names.segment(layout.network))
        text = segment_server.configuration(layout, leases, group)
        server = self._segment_server(layout.network)
        if text:
            await server.keep(
                text, segment_server.command, ready=segment_server.READY, rereads=True
            )
        else:
            await server.end()

    def _forward(self, layout: Layout) -> None:
        """Have the kernel forward a network's packets, and write down first what it said before.

        Its packet filter is there already: by that, another home knows that this one needs it.
        """
        with links.alone():
            told = nat.forwarding(layout)
            if not told:
                return
            record = {str(path): value for path in told if (value := nat.said(path))}
            # What an earlier network found comes first: that is how it was.
            before = {str(path): value for path, value in self._before().items()}
            data = {"namespace": links.namespace(), "before": {**record, **before}}
            write_atomically(self.directory / _FORWARDING, json.dumps(data).encode())
            nat.set_kernel(told)

    def _before(self) -> dict[Path, str]:
        """What the kernel said before networks were made in this namespace."""
        try:
            record = json.loads((self.directory / _FORWARDING).read_bytes())
            if record["namespace"] != links.namespace():
                return {}
            before = {Path(path): str(value) for path, value in record["before"].items()}
            return {path: before[path] for path in before if path.is_relative_to(nat.SETTINGS)}
        except (FileNotFoundError, ValueError, LookupError, AttributeError):
            return {}

    # ------------------------------------------------------------- removing

    async def remove(self, network: str) -> list[str]:
        """Remove all that was made for a network; again does nothing.

        Returns:
            What was removed, for a person.
        """
        async with self._locks[network]:
            directory = self.path(network)
            record = await asyncio.to_thread(Record.read, directory)
            removed = await self._end_daemons(network)
            if record is not None and record.here and record.layout.mode == "bridged":
                removed += await self._lower(record.layout)
            if directory.exists():
                await asyncio.to_thread(shutil.rmtree, directory)
        await self._clear_shared()
        return removed

    async def _lower(self, layout: Layout) -> list[str]:
        removed: list[str] = []
        if layout.foreign:
            return removed
        if await asyncio.to_thread(nat.remove, layout.table):
            removed.append(f"packet filter {layout.table}")
        if layout.vlan is not None:
            await self.switch.remove_port(layout.port)
            removed.append(f"port {layout.port}")
        if await asyncio.to_thread(links.remove, layout.bridge):
            removed.append(f"bridge {layout.bridge}")
        return removed

    async def _clear_shared(self) -> list[str]:
        """Remove what no network needs any more that several could: the switch, forwarding.

        What a network needs is written down before it is made, so one that is about to be counts.
        """
        async with self._shared:
            layouts = [each.layout for each in self.recorded().values() if each.here]
            if not any(each.mode == "bridged" and each.gateways for each in layouts):
                await asyncio.to_thread(self._forward_as_before)
            switches = {each.switch for each in layouts if each.switch}
            # Its daemon's own, and those that it left if it was killed: by their alias and name.
            there = await asyncio.to_thread(links.links)
            left = {
                name
                for name, link in there.items()
                if names.of_alias(self.home, link.alias) == names.SWITCH
                or name == names.interface("switch", self.home)
            }
            for name in {*await self.switch.bridges(), *left} - switches:
                await self.switch.remove_bridge(name)
            if switches or not self.switch.directory.exists():
                return []
            await self.switch.down()
            return ["switch"]

    def _forward_as_before(self) -> None:
        """Have the kernel say what it said before, unless another home's networks need it.

        What it said is still known then, and is looked at again when this is called again.
        """
        if before := self._before():
            with links.alone():
                own = names.tables(self.home)
                others = {each for each in nat.tables() if not each.startswith(own)}
                if any(each.startswith(names.TABLES) for each in others):
                    return
                nat.set_back(before)
        (self.directory / _FORWARDING).unlink(missing_ok=True)

    async def _end_daemons(self, network: str) -> list[str]:
        removed = []
        for daemon in (self._dnsmasq(network), self._segment_server(network)):
            pids = daemon.pids()
            await daemon.end()
            removed += [f"process {pid} ({daemon.name})" for pid in pids]
        return removed

    # ------------------------------------------------------------- looking

    def path(self, network: str) -> Path:
        """The directory of a network, by its id."""
        assert network.isalnum(), "an id that the manager made"
        return self.directory / network

    def recorded(self) -> dict[str, Record]:
        """What was written down, by network."""
        found = {}
        with suppress(FileNotFoundError):
            for path in sorted(self.directory.iterdir()):
                if path.is_dir() and (record := Record.read(path)) is not None:
                    found[path.name] = record
        return found

    async def missing(self, layout: Layout) -> list[str]:
        """What of a network is not there and should be, for a person; nothing is changed.

        Args:
            layout: The network; it was made once.
        """
        lost = []
        if layout.mode == "bridged":
            there = await asyncio.to_thread(links.links)
            bridge, port = there.get(layout.bridge), there.get(layout.port)
            if bridge is None or not bridge.up:
                lost.append(f"bridge {layout.bridge}")
            lost += [f"tap {name}" for name in await asyncio.to_thread(_strays, layout.bridge)]
            if layout.vlan is not None:
                if port is None or not port.up or bridge is None or port.master != bridge.index:
                    lost.append(f"port {layout.port}")
                if not self.switch.works:
                    lost.append("switch")
            if not layout.foreign:
                if layout.table not in await asyncio.to_thread(nat.tables):
                    lost.append(f"packet filter {layout.table}")
                if layout.gateways and self._dnsmasq(layout.network).running() is None:
                    lost.append("dnsmasq")
        elif layout.mode == "isolated":
            served = segment_server.configuration(layout, (), ("", 0))
            if served and self._segment_server(layout.network).running() is None:
                lost.append("DHCP server")
        return lost

    def leftovers(self, known: Collection[str]) -> dict[str, list[str]]:
        """What is on the host of networks that are none of those; names by network."""
        found: dict[str, list[str]] = {}
        for network in self.recorded():
            if network not in known:
                found[network] = [f"directory {self.path(network)}"]
        for name, link in links.links().items():
            its = names.of_alias(self.home, link.alias)
            if its is not None and its != names.SWITCH and its not in known:
                found.setdefault(its, []).append(f"interface {name}")
        return found

    async def sweep(self, known: Collection[str]) -> list[str]:
        """Remove what is on the host of networks that are none of those.

        Returns:
            What was removed, for a person.
        """
        removed = []
        for network in sorted(await asyncio.to_thread(self.leftovers, known)):
            removed += await self.remove(network)
        # What no directory tells of any more is still told by its alias.
        there = await asyncio.to_thread(links.links)
        for name, link in there.items():
            its = names.of_alias(self.home, link.alias)
            if its is not None and its != names.SWITCH and its not in known:
                await asyncio.to_thread(links.remove, name)
                removed.append(f"interface {name}")
        own = names.tables(self.home)
        if shutil.which("nft") is not None and links.may_administer():
            for table in sorted(await asyncio.to_thread(nat.tables)):
                if table.startswith(own) and table.removeprefix(own) not in known:
                    await asyncio.to_thread(nat.remove, table)
                    removed.append(f"packet filter {table}")
        return removed + await self._clear_shared()

    def _dnsmasq(self, network: str) -> Daemon:
        return Daemon(self.path(network), "dnsmasq")

    def _segment_server(self, network: str) -> Daemon:
        return Daemon(self.path(network), "segment")


def _strays(bridge: str) -> list[str]:
    """Taps of machines that are to be on a bridge and are on none of that name."""
    there = links.links()
    found = there.get(bridge)
    index = found.index if found is not None else None
    wanted = port_alias(bridge)
    return [
        link.name
        for link in there.values()
        if link.alias == wanted and (index is None or link.master != index)
    ]


def _write_down(layout: Layout, directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    Record.now(layout).write(directory)
