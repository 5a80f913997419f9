"""The hosts of a manager: each a hypervisor with its options under a name, opened once.

What fails again and again is left alone for a while (`breaker.py`). The store has a row for each,
which says what is known of it; machines belong to the store "manager" of the home, or to one of its
own for a host that is not called as its hypervisor.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from vmlab.hypervisors import registry
from vmlab.hypervisors.base import Hypervisor, Machine, Probe
from vmlab.hypervisors.ownership import Store
from vmlab.hypervisors.threads import done_in_thread
from vmlab.machine.capabilities import Capabilities
from vmlab.machine.errors import DeadlineExceeded, HypervisorUnavailable, VmlabError
from vmlab.manager.documents import HostDocument
from vmlab.manager.operator.breaker import Breaker
from vmlab.manager.settings import HostSetting
from vmlab.manager.store.changes import add_event
from vmlab.manager.store.queries import find_host, host_document
from vmlab.manager.store.tables import HostRow, MachineRow

if TYPE_CHECKING:
    from vmlab.manager.manager import Manager

__all__ = ["Hosts", "machine_name", "store_name"]

T = TypeVar("T")

_LOG: Final = logging.getLogger(__name__)
_STORE: Final = "manager"
_OPTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    # Its machines live on the clock of everybody else, and there may be many of them.
    "simulated": {"clock": "wall", "profile": "performance"},
}
"""What a hypervisor is opened with unless somebody says otherwise."""


def machine_name(machine_id: str) -> str:
    """The name that a machine has at its hypervisor: made of its id, never of the user's name."""
    return f"m-{machine_id[:12]}"


def store_name(setting: HostSetting) -> str:
    """The name of the store that a host's machines belong to."""
    return _STORE if setting.name == setting.hypervisor else f"{_STORE}-{setting.name}"


def default_hosts() -> list[HostSetting]:
    """A host for each hypervisor that is registered."""
    return [
        HostSetting(name=name, hypervisor=name, options=dict(_OPTIONS.get(name, {})))
        for name in registry.names()
    ]


class Hosts:
    """The hosts of one manager."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        configured = manager.settings.hosts
        hosts = default_hosts() if configured is None else configured
        self._settings = {host.name: host for host in hosts}
        self._breakers = {name: Breaker() for name in self._settings}
        self._opened: dict[str, Hypervisor] = {}
        self._capabilities: dict[str, Capabilities] = {}
        self._turns = {name: asyncio.Lock() for name in self._settings}
        self._told: dict[str, str] = {}
        self._probing: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------ its life

    async def start(self) -> None:
        """Have a row for each host, and find out in the background what works."""
        await self._manager.database.write(_enlist, list(self._settings.values()))
        self._probing = asyncio.create_task(self._probe())

    async def close(self) -> None:
        """Let go of all hypervisors; their machines live on."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait((self._probing,))
        for name, hypervisor in list(self._opened.items()):
            del self._opened[name]
            try:
                await hypervisor.close()
            except VmlabError as error:
                _LOG.warning("host %s cannot be let go of: %s", name, error)

    async def probed(self) -> None:
        """Wait until it is known what works."""
        if self._probing is not None:
            await asyncio.wait((self._probing,))

    async def _probe(self) -> None:
        hypervisors = sorted({host.hypervisor for host in self._settings.values()})
        registered = set(registry.names())
        probes = await _in_daemon(
            lambda: registry.probe_all(only=[name for name in hypervisors if name in registered])
        )
        found = {probe.hypervisor: probe for probe in probes}
        for name in set(hypervisors) - registered:
            found[name] = Probe(
                hypervisor=name, available=False, reason=f"there is no hypervisor {name!r}"
            )
        await self._manager.database.write(
            _note_probes, {h.name: found[h.hypervisor] for h in self._settings.values()}
        )

    # ------------------------------------------------------------------ which there are

    @property
    def names(self) -> Sequence[str]:
        """The names of all hosts, those that are preferred first."""
        return sorted(self._settings, key=lambda name: (_rank(self._settings[name]), name))

    def setting(self, name: str) -> HostSetting:
        """What a host is: its hypervisor and its options.

        Raises:
            HypervisorUnavailable: the manager has no such host.
        """
        try:
            return self._settings[name]
        except KeyError:
            raise HypervisorUnavailable(
                f"this manager has no host {name!r}",
                hint=f"its hosts are {', '.join(self.names)}",
                hypervisor=name,
            ) from None

    async def document(self, name: str) -> HostDocument:
        """A host as it is told.

        Raises:
            ResourceNotFound: there is no such host.
        """
        return await self._manager.database.read(_document, name)

    # ------------------------------------------------------------------ using them

    async def get(self, name: str) -> Hypervisor:
        """The hypervisor of a host, opened once.

        Raises:
            HypervisorUnavailable: it cannot be used here.
            InvalidSpec: its options are wrong.
        """
        setting = self.setting(name)
        async with self._turns[name]:
            if (hypervisor := self._opened.get(name)) is not None:
                return hypervisor
            hypervisor = await done_in_thread(self._open, setting)
            self._opened[name] = hypervisor
            return hypervisor

    def _open(self, setting: HostSetting) -> Hypervisor:
        home = self._manager.settings.home
        # A network is one on all hosts.
        segments = Store.open(home, _STORE).owner
        owner = replace(Store.open(home, store_name(setting)).owner, segments=segments)
        options = {**_OPTIONS.get(setting.hypervisor, {}), **setting.options}
        if "socket" in setting.options:
            # Who serves it chooses the rest.
            options = dict(setting.options)
        return registry.provider(setting.hypervisor).open(owner, options)

    def opened(self, name: str) -> Hypervisor | None:
        """The hypervisor of a host if it was opened already."""
        return self._opened.get(name)

    async def capabilities(self, name: str) -> Capabilities:
        """What a host can do; asked once.

        Raises:
            HypervisorUnavailable: it cannot be used here, or not now.
        """
        known = self._capabilities.get(name)
        if known is None:
            async with self.guarded(name):
                known = await (await self.get(name)).capabilities()
            self._capabilities[name] = known
            await self._manager.database.write(_note_limits, name, _limits(known))
        return known

    async def machine(self, name: str, machine_id: str) -> Machine:
        """A machine at its hypervisor.

        Raises:
            MachineNotFound: the hypervisor does not have it.
            HypervisorUnavailable: it cannot be used here, or not now.
        """
        return await (await self.get(name)).get(machine_name(machine_id))

    # ------------------------------------------------------------------ breakers

    def breaker(self, name: str) -> Breaker:
        """The breaker of a host."""
        self.setting(name)
        return self._breakers[name]

    @asynccontextmanager
    async def guarded(self, name: str) -> AsyncIterator[None]:
        """Use a host: what fails because of it is counted, and after some failures refused.

        Raises:
            HypervisorUnavailable: it failed again and again, and is left alone for a while.
        """
        breaker = self.breaker(name)
        if not breaker.admit():
            raise HypervisorUnavailable(
                f"host {name!r} failed {breaker.failures} times one after the other, and is left "
                f"alone for {breaker.seconds_left:.0f} s more: {breaker.reason}",
                hint="`vmlab doctor` says what is wrong with it; then try again",
                hypervisor=name,
            )
        try:
            yield
        except HypervisorUnavailable as error:
            breaker.failed(str(error))
            await self._tell(name)
            raise
        except DeadlineExceeded:
            # That of one machine's operation: it says nothing about its host.
            breaker.withdrawn()
            raise
        except OSError as error:
            breaker.failed(str(error) or type(error).__name__)
            await self._tell(name)
            raise HypervisorUnavailable(
                f"host {name!r} does not answer: {breaker.reason}",
                hint="`vmlab doctor` says what is wrong with it",
                hypervisor=name,
            ) from error
        except BaseException:
            breaker.withdrawn()
            raise
        breaker.succeeded()
        await self._tell(name)

    async def _tell(self, name: str) -> None:
        """Have the store say what a breaker does, if that has changed."""
        breaker = self._breakers[name]
        state = breaker.state
        if self._told.get(name, "closed") != state or (state == "closed" and breaker.failures):
            self._told[name] = state
            await self._manager.database.write(
                _note_breaker, name, state, breaker.failures, breaker.reason
            )


async def _in_daemon(work: Callable[[], T]) -> T:
    """Run `work` in a thread that keeps nobody from ending: a probe may hang."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if not answer.done():
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(cast("T", result))

    def run() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody wants to know
            loop.call_soon_threadsafe(tell, result, failure)

    threading.Thread(target=run, name="probe", daemon=True).start()
    return await answer


def _rank(host: HostSetting) -> int:
    """Hosts of guests that are real before those of guests that are not."""
    ranks = {"embedded": 0, "qemu": 1, "simulated": 9}
    return ranks.get(host.hypervisor, 5)


def _limits(capabilities: Capabilities) -> dict[str, int | None]:
    limits = capabilities.limits
    return {
        "machines": limits.machines,
        "vcpus": limits.vcpus,
        "memory": limits.memory,
        "disk": limits.disk_space,
    }


# ------------------------------------------------------------------------ transactions


def _enlist(session: Session, settings: Sequence[HostSetting]) -> None:
    """Have a row for each host; those that are no more go, unless they have machines."""
    known = {row.name: row for row in session.scalars(select(HostRow))}
    for setting in settings:
        row = known.pop(setting.name, None)
        if row is None:
            row = HostRow(name=setting.name, hypervisor=setting.hypervisor)
            session.add(row)
        row.hypervisor, row.options = setting.hypervisor, dict(setting.options)
        row.breaker, row.failures = "closed", 0
    for row in known.values():
        machines = session.scalar(
            select(func.count()).select_from(MachineRow).where(MachineRow.host == row.name)
        )
        if machines:
            row.available, row.reason = False, "it is not among the manager's hosts any more"
        else:
            session.delete(row)


def _note_probes(session: Session, probes: Mapping[str, Probe]) -> None:
    for name, probe in probes.items():
        row = session.get(HostRow, name)
        if row is None or (row.available, row.reason) == (probe.available, probe.reason):
            continue
        if row.available != probe.available:
            _tell_host(session, row, "host.back" if probe.available else "host.lost", probe.reason)
        row.available, row.reason = probe.available, probe.reason


def _note_limits(session: Session, name: str, limits: dict[str, Any]) -> None:
    row = session.get(HostRow, name)
    if row is not None and row.limits != limits:
        row.limits = limits


def _note_breaker(session: Session, name: str, state: str, failures: int, reason: str) -> None:
    row = session.get(HostRow, name)
    if row is None:
        return
    before = row.breaker
    row.breaker, row.failures = state, failures
    if before != state:
        _tell_host(session, row, "host.breaker", reason, state=state, before=before)
    if before == "closed" and state != "closed":
        _tell_host(session, row, "host.lost", reason)
    if before != "closed" and state == "closed":
        _tell_host(session, row, "host.back", "")


def _tell_host(session: Session, row: HostRow, kind: str, reason: str, **data: str) -> None:
    add_event(session, kind, subject=row.name, name=row.name, data={**data, "reason": reason})


def _document(session: Session, name: str) -> HostDocument:
    return host_document(session, find_host(session, name))
