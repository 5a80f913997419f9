"""One look at the store and the world: which collectors are asked for what, and what they said.

A look changes nothing. What fails to be looked at is left out of `Seen.looked`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vmlab.hypervisors.ownership import Owner, Store
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.errors import VmlabError
from vmlab.manager.observer.collect import files, guests, hypervisors, locks, networks, processes
from vmlab.manager.observer.collect.store import known_now
from vmlab.manager.observer.known import Known
from vmlab.manager.observer.seen import Seen, SeenGuest
from vmlab.manager.operator.hosts import machine_name, store_name
from vmlab.manager.store.tables import now

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["Eyes", "Scope"]

_LOG: Final = logging.getLogger(__name__)

_ANSWER_SECONDS: Final = 60.0
"""That a host has to open and to say which machines it has."""
_LOOK_SECONDS: Final = 300.0
"""That all its machines together have to answer."""
_GUESTS_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class Scope:
    """What of the world a look is at.

    Attributes:
        machines: Ids of the store's machines that it is about; None is all there is.
        ask: Names, at their hypervisors, of machines that are asked themselves; None is all.
        around: Whether processes, files, locks, networks and file systems are looked at.
        guests: Ids of the machines whose guests are asked.
        hypervisors: Whether those are looked at.
    """

    machines: frozenset[str] | None = None
    ask: frozenset[str] | None = None
    around: bool = True
    guests: frozenset[str] = field(default_factory=frozenset)
    hypervisors: bool = True


class Eyes:
    """What a manager looks with.

    Args:
        manager: Whose store, hosts, files and guests.
        guest_seconds: Time that a guest has to answer.
    """

    def __init__(self, manager: Manager, guest_seconds: float) -> None:
        self._manager = manager
        self._guest_seconds = guest_seconds

    async def know(self, scope: Scope) -> Known:
        """What the store says."""
        return await self._manager.database.read(
            known_now, machine_name, self._manager.storage.path, scope.machines
        )

    async def see(self, known: Known, scope: Scope) -> Seen:
        """What the world shows."""
        at = now()
        parts: list[Mapping[str, Any]] = []
        # Processes before machines, so that one whose machine is made meanwhile finds that.
        if scope.around:
            parts.append(await done_in_thread(self._around, known))
        if scope.hypervisors:
            parts += await asyncio.gather(
                *(self._host(host, known, scope) for host in sorted(known.hosts))
            )
        if scope.guests:
            parts.append(await self._guests(scope.guests))
        if scope.machines is None and scope.hypervisors:
            parts.append({"looked": {"store"}})
        merged: dict[str, Any] = {}
        for part in parts:
            for name, value in part.items():
                merged[name] = (
                    frozenset(merged.get(name, frozenset()) | value)
                    if isinstance(value, set | frozenset)
                    else (*merged.get(name, ()), *value)
                )
        return Seen(at=at, **merged)

    # ------------------------------------------------------------------ hypervisors

    async def _host(self, host: str, known: Known, scope: Scope) -> Mapping[str, Any]:
        """The machines of one host; nothing if it does not answer."""
        ask: Collection[str] | None = scope.ask
        if scope.machines is not None:
            ask = {machine.at for machine in known.machines if machine.host == host}
            if not ask:
                return {}
        try:
            if not await done_in_thread(self._may_have_machines, host, known):
                return {"looked": {f"host:{host}"}}
            # A host that fails again and again is left alone for a while, by everybody.
            async with self._manager.hosts.guarded(host), asyncio.timeout(_ANSWER_SECONDS):
                hypervisor = await self._manager.hosts.get(host)
                found = await hypervisors.present(
                    hypervisor, None if scope.machines is None else ask
                )
            async with asyncio.timeout(_LOOK_SECONDS):
                machines, looked = await hypervisors.seen_of(host, found, known, ask)
        except (VmlabError, OSError, TimeoutError) as error:
            _LOG.info("host %s was not looked at: %s", host, str(error) or type(error).__name__)
            return {}
        return {"machines": machines, "looked": looked}

    def _may_have_machines(self, host: str, known: Known) -> bool:
        """Whether a host can have machines at all: those that never had any are not opened."""
        hosts = self._manager.hosts
        if hosts.opened(host) is not None or any(each.host == host for each in known.machines):
            return True
        hypervisor = hosts.setting(host).hypervisor
        store = self._home / "stores" / store_name(hosts.setting(host))
        places = (store / "machines" / hypervisor, store / hypervisor)
        return any(next(place.iterdir(), None) is not None for place in places if place.is_dir())

    @property
    def owners(self) -> list[Owner]:
        """The stores whose machines this manager has: also those of hosts that it does not use."""
        hosts, home = self._manager.hosts, self._manager.settings.home
        names = {store_name(hosts.setting(name)) for name in hosts.names}
        return [
            Store.open(home, name).owner for name in sorted(names) if (home.stores / name).is_dir()
        ]

    # ------------------------------------------------------------------ what is around them

    def _around(self, known: Known) -> Mapping[str, Any]:
        directory = self._manager.settings.directory
        storage = self._manager.storage.directory
        owners = self.owners
        found: dict[str, Any] = {
            "processes": processes.processes_of(owners, directory),
            "files": files.disk_files(storage),
            "volumes": files.volumes(self._places(directory, storage)),
        }
        looked = {"processes", "files", "volumes", "leases"}
        held = locks.locks_of(owners, [directory / "manager.lock"])
        if held is not None:
            found["locks"] = held
            looked.add("locks")
        leases = networks.leases_of(networks.network_directories(directory))
        if any(network.mode == "bridged" for network in known.networks) or leases:
            interfaces = networks.interfaces_of(self._manager.networks.host.home)
        else:
            interfaces = None
        if interfaces is not None:
            found["interfaces"] = interfaces.mine
            found["every_interface"], found["joined"] = interfaces.every, interfaces.joined
            leases += networks.neighbours_of(interfaces.mine)
            looked.add("interfaces")
        found["leases"] = leases
        found["looked"] = looked
        return found

    @property
    def _home(self) -> Path:
        return self._manager.settings.home.directory

    def _places(self, directory: Path, storage: Path) -> list[Path]:
        home = self._home
        return [directory, storage, home / "stores", home / "images"]

    # ------------------------------------------------------------------ guests

    async def _guests(self, machines: Collection[str]) -> Mapping[str, Any]:
        turns = asyncio.Semaphore(_GUESTS_AT_ONCE)

        async def ask(id_: str) -> SeenGuest | None:
            async with turns:
                try:
                    machine = await self._manager.machine(id_)
                except VmlabError:
                    return None  # it was deleted, or nobody knows what it does
                return await guests.asked(
                    id_, machine, self._manager.guests.get, self._guest_seconds
                )

        told = await asyncio.gather(*map(ask, sorted(machines)))
        heard = [guest for guest in told if guest is not None]
        # Of one that could not be asked nobody can say any more that it does not answer.
        return {"guests": heard, "looked": {f"guest:{machine}" for machine in machines}}
