"""A simulated hypervisor that another process serves, through the same contract.

The machinery of operations runs there; here calls become messages and answers become results or
the errors that a hypervisor in this process would raise.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

from pydantic import ValidationError

from vmlab.hypervisors.base import (
    Channel,
    Console,
    DiskInfo,
    Hypervisor,
    Machine,
    MachineInfo,
    MachineStatus,
    NicInfo,
    Probe,
    Progress,
    Snapshot,
)
from vmlab.hypervisors.simulated.link import Link
from vmlab.hypervisors.simulated.wire import (
    HYPERVISOR_METHODS,
    LIMIT,
    MACHINE_METHODS,
    VERSION,
    Hello,
    Line,
    MachineFacts,
    Message,
    Target,
    Welcome,
    decode,
    encode,
    garbled,
)
from vmlab.machine.capabilities import Capabilities
from vmlab.machine.errors import (
    HypervisorUnavailable,
    InvalidSpec,
    SpecProblem,
    from_record,
)
from vmlab.machine.events import Event
from vmlab.machine.faults import Fault
from vmlab.machine.metrics import MachineMetrics
from vmlab.machine.spec import Disk, MachineSpec, Nic
from vmlab.machine.states import MachineState

if TYPE_CHECKING:
    from vmlab.hypervisors.ownership import Owner

T = TypeVar("T")


class RemoteChannel(Channel):
    """A guest channel of a machine in another process."""

    def __init__(self, link: Link, opened: Message) -> None:
        self.name = str(opened["name"])
        self._link = link
        self._of = {"stream": opened["stream"]}
        self._pipe = link.pipe(opened["stream"])

    async def read(self, size: int = 65536) -> bytes:
        return await self._pipe.read(size)

    async def write(self, data: bytes) -> None:
        await self._link.call("write", self._of, {"data": encode(data)})

    async def close(self) -> None:
        self._pipe.discard()
        if self._link.lost is None and self._of["stream"] in self._link.streams:
            await self._link.call("close", self._of)
            # Not before: what was still on its way has come by now.
            self._link.streams.pop(self._of["stream"], None)


class RemoteConsole(RemoteChannel, Console):
    """A console of a machine in another process."""

    async def log(self) -> bytes:
        return decode(await self._link.call("log", self._of))

    async def history(self, size: int) -> bytes:
        return decode(await self._link.call("history", self._of, {"size": size}))


class RemoteMachine(Machine):
    """A machine in another process."""

    def __init__(self, hypervisor: RemoteSimulatedHypervisor, facts: MachineFacts) -> None:
        self.id = facts.id
        self.name = facts.name
        self.facts = facts
        self._hypervisor = hypervisor

    @property
    def spec(self) -> MachineSpec:
        return self.facts.spec

    @property
    def state(self) -> MachineState:
        lost = self._hypervisor.is_lost and self.facts.state is not MachineState.DELETED
        return MachineState.UNKNOWN if lost else self.facts.state

    @property
    def hypervisor(self) -> Hypervisor:
        return self._hypervisor

    async def _call(self, call: str, progress: Progress | None = None, **arguments: Any) -> Any:
        link = await self._hypervisor.link()
        method = MACHINE_METHODS[call]
        result = await link.call(
            call, {"machine": self.id}, arguments, progress, makes=call == "fork"
        )
        return method.result.validate_python(result) if method.result is not None else result

    async def start(self, *, timeout: float | None = None) -> None:
        await self._call("start", timeout=timeout)

    async def stop(
        self, *, graceful: bool = True, kill: bool = True, timeout: float | None = None
    ) -> None:
        await self._call("stop", graceful=graceful, kill=kill, timeout=timeout)

    async def kill(self, *, timeout: float | None = None) -> None:
        await self._call("kill", timeout=timeout)

    async def pause(self, *, timeout: float | None = None) -> None:
        await self._call("pause", timeout=timeout)

    async def resume(self, *, timeout: float | None = None) -> None:
        await self._call("resume", timeout=timeout)

    async def restart(self, *, graceful: bool = True, timeout: float | None = None) -> None:
        await self._call("restart", graceful=graceful, timeout=timeout)

    async def delete(self, *, force: bool = False, timeout: float | None = None) -> None:
        await self._call("delete", force=force, timeout=timeout)

    async def status(self, *, timeout: float | None = None) -> MachineStatus:
        status: MachineStatus = await self._call("status", timeout=timeout)
        return status

    async def info(self, *, timeout: float | None = None) -> MachineInfo:
        info: MachineInfo = await self._call("info", timeout=timeout)
        return info

    async def metrics(self, *, timeout: float | None = None) -> MachineMetrics:
        metrics: MachineMetrics = await self._call("metrics", timeout=timeout)
        return metrics

    async def console(self, name: str = "serial", *, timeout: float | None = None) -> Console:
        link = await self._hypervisor.link()
        return RemoteConsole(link, await self._call("console", name=name, timeout=timeout))

    async def channel(self, name: str, *, timeout: float | None = None) -> Channel:
        link = await self._hypervisor.link()
        return RemoteChannel(link, await self._call("channel", name=name, timeout=timeout))

    async def screenshot(self, *, timeout: float | None = None) -> bytes:
        picture: bytes = await self._call("screenshot", timeout=timeout)
        return picture

    async def send_keys(self, keys: Sequence[str], *, timeout: float | None = None) -> None:
        await self._call("send_keys", keys=keys, timeout=timeout)

    async def snapshot(
        self, name: str, *, memory: bool | None = None, timeout: float | None = None
    ) -> Snapshot:
        taken: Snapshot = await self._call("snapshot", name=name, memory=memory, timeout=timeout)
        return taken

    async def snapshots(self, *, timeout: float | None = None) -> list[Snapshot]:
        kept: list[Snapshot] = await self._call("snapshots", timeout=timeout)
        return kept

    async def delete_snapshot(self, name: str, *, timeout: float | None = None) -> None:
        await self._call("delete_snapshot", name=name, timeout=timeout)

    async def restore(self, name: str, *, timeout: float | None = None) -> None:
        await self._call("restore", name=name, timeout=timeout)

    async def fork(self, name: str, *, timeout: float | None = None) -> Machine:
        return self._hypervisor.machine(await self._call("fork", name=name, timeout=timeout))

    async def migrate(
        self,
        target: Hypervisor,
        *,
        live: bool | None = None,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Machine:
        if not isinstance(target, RemoteSimulatedHypervisor) or target is self._hypervisor:
            expected = f"another hypervisor of the kind {self._hypervisor.name!r}"
            raise InvalidSpec(
                [SpecProblem("target", getattr(target, "name", target), expected)],
                machine=self.name,
                hypervisor=self._hypervisor.name,
                operation="migrate",
                what="migrate",
                hint="open a second one, for another owner",
            )
        await self._call(
            "migrate", progress, target=await target.address(), live=live, timeout=timeout
        )
        return await target.get(self.id)

    async def plug_disk(self, disk: Disk, *, timeout: float | None = None) -> DiskInfo:
        plugged: DiskInfo = await self._call("plug_disk", disk=disk, timeout=timeout)
        return plugged

    async def unplug_disk(self, name: str, *, timeout: float | None = None) -> None:
        await self._call("unplug_disk", name=name, timeout=timeout)

    async def resize_disk(self, name: str, size: int, *, timeout: float | None = None) -> DiskInfo:
        resized: DiskInfo = await self._call("resize_disk", name=name, size=size, timeout=timeout)
        return resized

    async def plug_nic(self, nic: Nic, *, timeout: float | None = None) -> NicInfo:
        plugged: NicInfo = await self._call("plug_nic", nic=nic, timeout=timeout)
        return plugged

    async def unplug_nic(self, name: str, *, timeout: float | None = None) -> None:
        await self._call("unplug_nic", name=name, timeout=timeout)

    async def resize(
        self,
        *,
        vcpus: int | None = None,
        memory: int | None = None,
        timeout: float | None = None,
    ) -> MachineInfo:
        has: MachineInfo = await self._call("resize", vcpus=vcpus, memory=memory, timeout=timeout)
        return has

    async def pin(
        self, pinning: Mapping[int, tuple[int, ...]], *, timeout: float | None = None
    ) -> None:
        await self._call("pin", pinning=pinning, timeout=timeout)

    async def inject(self, fault: Fault, *, timeout: float | None = None) -> str:
        identity: str = await self._call("inject", fault=fault, timeout=timeout)
        return identity

    async def clear_fault(self, fault: str, *, timeout: float | None = None) -> None:
        await self._call("clear_fault", fault=fault, timeout=timeout)


class RemoteSimulatedHypervisor(Hypervisor):
    """A simulated hypervisor in another process.

    Args:
        owner: Whose machines these are; a run's die when its connection ends.
        socket: Where a `vmlab simulate` listens.
        seed: Source of its randomness, where this is the first client of its owner.
    """

    name: ClassVar[str] = "simulated"

    def __init__(self, owner: Owner, socket: Path, *, seed: int | None = None) -> None:
        self._owner = owner
        self._seed = seed
        self._socket = socket
        self._link: Link | None = None
        self._connecting: asyncio.Lock | None = None
        self._machines: dict[str, RemoteMachine] = {}
        self._welcome: Welcome | None = None
        self._closed = False

    @property
    def owner(self) -> Owner:
        return self._owner

    @property
    def is_lost(self) -> bool:
        """Whether there was a connection, and it ended."""
        return self._link is not None and self._link.lost is not None

    async def link(self) -> Link:
        """The connection; it is made when it is first needed, and anew after it was lost.

        Raises:
            HypervisorUnavailable: nobody answers there, or it was closed.
        """
        if self._closed:
            self._refuse("the hypervisor was closed", "open it again")
        if self._connecting is None:
            self._connecting = asyncio.Lock()
        async with self._connecting:
            if self._link is None or self._link.lost is not None:
                if self._link is not None:
                    await self._link.close()
                self._link = await self._connect()
        return self._link

    async def _connect(self) -> Link:
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._socket), limit=LIMIT)
        except OSError as error:
            self._refuse(
                f"nobody answers on {self._socket}: {error.strerror or error}",
                "start one: `vmlab simulate --socket PATH`",
            )
        line = Line(reader, writer)
        hello = Hello(version=VERSION, kind=self._owner.kind, owner=self._owner.id, seed=self._seed)
        line.send({"hello": hello.model_dump()})
        try:
            answer = await line.receive() or {}
            if "error" in answer:
                raise from_record(answer["error"])
            try:
                self._welcome = Welcome.model_validate(answer.get("welcome"))
            except ValidationError as error:
                raise garbled("there is no welcome") from error
        except BaseException:
            await line.close()
            raise
        return Link(line, self._news)

    def _refuse(self, what: str, hint: str) -> NoReturn:
        raise HypervisorUnavailable(what, hint=hint, hypervisor=self.name)

    def _news(self, facts: Message) -> None:
        read = MachineFacts.model_validate(facts)
        machine = self._machines.get(read.id)
        if machine is not None:
            machine.facts = read
            if read.state is MachineState.DELETED:
                del self._machines[read.id]

    def machine(self, facts: Message) -> RemoteMachine:
        """The machine that the server tells of."""
        read = MachineFacts.model_validate(facts)
        machine = self._machines.get(read.id)
        if machine is None:
            machine = self._machines[read.id] = RemoteMachine(self, read)
        machine.facts = read
        return machine

    async def address(self) -> Target:
        """Where machines migrate to that come here."""
        await self.link()
        assert self._welcome is not None, "a link begins with a welcome"
        return Target(
            server=self._welcome.server,
            socket=str(self._socket),
            kind=self._owner.kind,
            owner=self._owner.id,
        )

    async def _call(self, call: str, **arguments: Any) -> Any:
        method = HYPERVISOR_METHODS[call]
        makes = call in ("create", "create_from")
        result = await (await self.link()).call(call, None, arguments, makes=makes)
        return method.result.validate_python(result) if method.result is not None else result

    async def probe(self) -> Probe:
        probe: Probe = await self._call("probe")
        return probe

    async def capabilities(self) -> Capabilities:
        capabilities: Capabilities = await self._call("capabilities")
        return capabilities

    async def create(self, spec: MachineSpec, *, timeout: float | None = None) -> Machine:
        if not isinstance(spec, MachineSpec):
            raise InvalidSpec([SpecProblem("spec", spec, "a MachineSpec")], hypervisor=self.name)
        return self.machine(await self._call("create", spec=spec, timeout=timeout))

    async def create_from(
        self, snapshot: Snapshot, name: str, *, timeout: float | None = None
    ) -> Machine:
        return self.machine(
            await self._call("create_from", snapshot=snapshot, name=name, timeout=timeout)
        )

    async def get(self, name: str) -> Machine:
        return self.machine(await self._call("get", name=name))

    async def list(self) -> Sequence[Machine]:
        return [self.machine(facts) for facts in await self._call("list")]

    async def events(self, since: int = 0) -> Sequence[Event]:
        events: Sequence[Event] = await self._call("events", since=since)
        return events

    def subscribe(self, since: int | None = None) -> AsyncIterator[Event]:
        begun = None
        if self._link is not None and self._link.lost is None:
            # "From now on" is from this call on, not from the first look.
            begun = (self._link, self._link.begin("subscribe", None, {"since": since})[1])
        return self._follow(since, begun)

    async def _follow(
        self, since: int | None, begun: tuple[Link, asyncio.Future[Any]] | None
    ) -> AsyncIterator[Event]:
        if begun is None:
            link = await self.link()
            opened = await link.call("subscribe", None, {"since": since})
        else:
            link, opened = begun[0], await begun[1]
        number = opened["stream"]
        queue = link.queue(number)
        try:
            while "end" not in (message := await queue.get()):
                if "error" in message:
                    raise from_record(message["error"])
                yield Event.model_validate(message["event"])
        finally:
            link.events.pop(number, None)
            if link.lost is None:
                link.tell("close", {"stream": number})

    # What only a simulation can do.

    async def trace(self) -> str:
        """The trace, as `SimulatedHypervisor.trace` has it."""
        return str(await (await self.link()).call("trace"))

    async def crash(self, *, restart_after: float | None = None) -> None:
        """Crash the simulated hypervisor; the process that serves it lives."""
        await (await self.link()).call("crash", None, {"restart_after": restart_after})

    async def restart(self) -> None:
        """Bring a crashed one back."""
        await (await self.link()).call("restart")

    async def close(self) -> None:
        """Let go of it: a run's machines are gone when this returns, unless others hold it too."""
        if self._closed:
            return
        self._closed = True
        link = self._link
        if link is None:
            return
        try:
            if link.lost is None:
                await link.call("leave")
        finally:
            await link.close()
