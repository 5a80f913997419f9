"""A simulated hypervisor in a process of its own: it serves the contract over a unix socket.

Each owner has a hypervisor with a host of its own here. A run's machines die when the last
connection of that run ends, however it ends; a store's live on, and with a journal they outlive
this process too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import stat
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from vmlab.hypervisors.base import Channel, Console, Machine
from vmlab.hypervisors.ownership import Owner
from vmlab.hypervisors.simulated.chances import Chances
from vmlab.hypervisors.simulated.clock import VirtualClockLoop
from vmlab.hypervisors.simulated.hypervisor import ClockKind, SimulatedHypervisor
from vmlab.hypervisors.simulated.profile import SimulationProfile
from vmlab.hypervisors.simulated.wire import (
    HYPERVISOR_METHODS,
    LIMIT,
    MACHINE_METHODS,
    VERSION,
    Hello,
    Line,
    MachineFacts,
    Message,
    Method,
    Target,
    Welcome,
    decode,
    encode,
    garbled,
    read_arguments,
    unknown_call,
)
from vmlab.machine.errors import (
    HypervisorUnavailable,
    InvalidSpec,
    MachineNotFound,
    ResourceNotFound,
    SpecProblem,
    UnsupportedOperation,
    VmlabError,
)
from vmlab.machine.events import Event
from vmlab.machine.states import MachineState

_PATH_LIMIT: Final = 107
"""Bytes of the path of a unix socket (sockaddr_un(7) on Linux; other systems have fewer)."""


class Tenant:
    """One owner's hypervisor, and who is connected to it."""

    def __init__(self, hypervisor: SimulatedHypervisor) -> None:
        self.hypervisor = hypervisor
        self.sessions: set[Session] = set()


class SimulationServer:
    """Serves simulated hypervisors.

    Args:
        profile: What they are like.
        seed: Source of all randomness; None draws one.
        clock: "wall", or "virtual" where all latencies pass at once.
        store: Directory that stores are kept in; None keeps them in memory alone.
    """

    def __init__(
        self,
        profile: SimulationProfile,
        *,
        seed: int | None = None,
        clock: ClockKind = "wall",
        store: Path | None = None,
    ) -> None:
        self.profile = profile
        self.seed = secrets.randbits(32) if seed is None else seed
        self.clock: ClockKind = clock
        self.id = secrets.token_hex(8)
        self._store = store
        self._tenants: dict[tuple[str, str], Tenant] = {}
        self._count = 0
        self._sessions: set[asyncio.Task[None]] = set()

    def loop_factory(self) -> Callable[[], asyncio.AbstractEventLoop]:
        """What makes the event loop that `serve` runs on."""
        return VirtualClockLoop if self.clock == "virtual" else asyncio.new_event_loop

    def tenant(self, kind: Literal["run", "store"], owner: str, seed: int | None = None) -> Tenant:
        """The hypervisor of an owner, made when it is first asked for: with `seed`, or its own."""
        key = (kind, owner)
        found = self._tenants.get(key)
        if found is None:
            # The first owner's luck is the seed's own; others have luck of their own.
            if seed is None:
                seed = self.seed
                if self._count:
                    seed = int.from_bytes(Chances(self.seed).raw(8, "owner", self._count), "big")
                self._count += 1
            directory = self._store / f"{kind}-{owner}" if self._store is not None else Path()
            hypervisor = SimulatedHypervisor(
                Owner(kind, owner, directory),
                self.profile,
                seed=seed,
                clock=self.clock,
                store=directory if self._store is not None and kind == "store" else None,
            )
            found = self._tenants[key] = Tenant(hypervisor)
        return found

    def known(self, target: Target) -> SimulatedHypervisor | None:
        """The hypervisor that a machine is to migrate to, if it is one of this server's."""
        found = self._tenants.get((target.kind, target.owner))
        return found.hypervisor if found is not None and target.server == self.id else None

    async def left(self, session: Session) -> None:
        """A connection has ended; with a run's last one its machines go."""
        tenant = session.tenant
        tenant.sessions.discard(session)
        owner = tenant.hypervisor.owner
        held = self._tenants.get((owner.kind, owner.id)) is tenant
        if owner.kind == "run" and held and not tenant.sessions:
            del self._tenants[owner.kind, owner.id]
            await tenant.hypervisor.close()

    async def serve(self, path: Path, ready: Callable[[], None]) -> None:
        """Serve on a socket until cancelled; then everything is cleared away or kept.

        Args:
            path: The socket; one that nobody listens on any more is replaced.
            ready: Called when clients can connect.

        Raises:
            HypervisorUnavailable: somebody listens there, or it cannot be made.
            InvalidSpec: the path is too long for a socket, or something else stands there.
        """
        listener, inode = listen(path)
        server = await asyncio.start_unix_server(self._connected, sock=listener, limit=LIMIT)
        try:
            async with server:
                ready()
                await server.serve_forever()
        finally:
            # A socket that another process has put there meanwhile is not ours to remove.
            _remove(path, inode)
            await self._close()

    async def _close(self) -> None:
        for task in self._sessions:
            task.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)
        for tenant in list(self._tenants.values()):
            await tenant.hypervisor.close()
        self._tenants.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "a connection is served by a task"
        self._sessions.add(task)
        line = Line(reader, writer)
        try:
            await self._serve(line)
        except VmlabError as error:
            line.send({"error": error.to_record()})
        except asyncio.CancelledError:
            # The server ends; it waits for this task and for nothing else of it.
            return
        finally:
            self._sessions.discard(task)
            await line.close()

    async def _serve(self, line: Line) -> None:
        message = await line.receive()
        if message is None:
            return
        try:
            hello = Hello.model_validate(message.get("hello"))
        except ValidationError as error:
            raise garbled("the first message is no hello") from error
        if hello.version != VERSION:
            raise HypervisorUnavailable(
                f"the client speaks version {hello.version} of the protocol, not {VERSION}",
                hint="use the same version of vmlab on both sides",
                hypervisor="simulated",
            )
        tenant = self.tenant(hello.kind, hello.owner, hello.seed)
        session = Session(self, tenant, line)
        tenant.sessions.add(session)
        line.send(
            {
                "welcome": Welcome(
                    version=VERSION,
                    server=self.id,
                    pid=os.getpid(),
                    profile=self.profile.name,
                    seed=tenant.hypervisor.seed,
                    clock=self.clock,
                ).model_dump()
            }
        )
        try:
            await session.run()
        finally:
            await session.end()
            await self.left(session)


def _remove(path: Path, inode: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_ino == inode:
            path.unlink()


def listen(path: Path) -> tuple[socket.socket, int]:
    """A listening unix socket at `path` that only its user can open, and its inode.

    Raises:
        HypervisorUnavailable: somebody listens there already, or it cannot be made.
        InvalidSpec: the path is too long, or something that is no socket stands there.
    """
    if len(os.fsencode(path)) > _PATH_LIMIT:
        problem = SpecProblem("socket", str(path), f"a path of at most {_PATH_LIMIT} bytes")
        raise InvalidSpec([problem], what="options", hint="use a shorter directory, as in /run")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.stat().st_mode):
            problem = SpecProblem("socket", str(path), "a path where nothing else stands")
            raise InvalidSpec([problem], what="options", hint="choose another path")
        _replace_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise HypervisorUnavailable(
            f"cannot listen on {path}: {error.strerror}",
            hint="choose a path in a directory that you can write",
            hypervisor="simulated",
        ) from error
    finally:
        os.umask(before)
    return listener, path.stat().st_ino


def _replace_stale(path: Path) -> None:
    """Remove a socket that nobody listens on (HypervisorUnavailable: somebody does)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
        try:
            attempt.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise HypervisorUnavailable(
                f"cannot tell whether anybody listens on {path}: {error.strerror}",
                hint="choose another path",
                hypervisor="simulated",
            ) from error
    raise HypervisorUnavailable(
        f"another process listens on {path}",
        hint="use that one, or choose another path",
        hypervisor="simulated",
    )


class Session:
    """One connection of a client."""

    def __init__(self, server: SimulationServer, tenant: Tenant, line: Line) -> None:
        self.tenant = tenant
        self._server = server
        self._line = line
        self._hypervisor = tenant.hypervisor
        # Those that the client has heard of, also the deleted ones.
        self._machines: dict[str, Machine] = {}
        self._told: dict[str, tuple[MachineState, int]] = {}
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._streams: dict[int, Channel | None] = {}
        self._pumps: dict[int, asyncio.Task[None]] = {}
        self._next_stream = 1

    async def run(self) -> None:
        """Do what the client asks until it goes."""
        watch = asyncio.ensure_future(self._watch())
        try:
            while (message := await self._line.receive()) is not None:
                if "cancel" in message:
                    call = self._calls.get(message["cancel"])
                    if call is not None:
                        call.cancel()
                elif isinstance(message.get("id"), int):
                    if message["id"] in self._calls:
                        raise garbled(f"two calls have the number {message['id']}")
                    self._begin(message["id"], message)
                else:
                    raise garbled(f"neither a call nor a cancellation: {sorted(message)}")
                await self._line.drained()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def end(self) -> None:
        """The client is gone: what it asked for is cancelled, what it opened is closed."""
        tasks = [*self._calls.values(), *self._pumps.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in self._streams.values():
            if stream is not None:
                await stream.close()
        self._streams.clear()

    def _begin(self, number: int, message: Message) -> None:
        task = asyncio.ensure_future(self._answer(number, message))
        self._calls[number] = task

        def over(_: asyncio.Task[None]) -> None:
            del self._calls[number]
            if task.cancelled():
                # Also one that was cancelled before it took its first step.
                self._line.send({"id": number, "cancelled": True})

        task.add_done_callback(over)

    async def _answer(self, number: int, message: Message) -> None:
        try:
            result = await self._perform(number, message)
        except VmlabError as error:
            self._tell_of(message)
            self._line.send({"id": number, "error": error.to_record()})
        except Exception as error:
            # A mistake in vmlab: the client gets an answer, and the server goes on for the others.
            traceback.print_exc(file=sys.stderr)
            mistake = VmlabError(
                f"the server made a mistake: {type(error).__name__}: {error}",
                hint="the traceback is in its stderr; please report it",
                hypervisor="simulated",
            )
            self._line.send({"id": number, "error": mistake.to_record()})
        else:
            self._tell_of(message)
            self._line.send({"id": number, "result": result})

    async def _perform(self, number: int, message: Message) -> Any:
        call, of = message.get("call"), message.get("of") or {}
        arguments = message.get("arguments") or {}
        if "stream" in of:
            return await self._on_stream(of["stream"], str(call), arguments)
        if "machine" in of:
            method = MACHINE_METHODS.get(str(call))
            if method is None:
                raise unknown_call(call)
            read = read_arguments(method, arguments)
            if method.name == "migrate":
                read = self._with_target(number, read)
            machine = await self._machine(of["machine"])
            return await self._result(method, getattr(machine, method.name)(**read))
        extra = _EXTRA.get(str(call))
        if extra is not None:
            return await extra(self, arguments)
        method = HYPERVISOR_METHODS.get(str(call))
        if method is None:
            raise unknown_call(call)
        read = read_arguments(method, arguments)
        return await self._result(method, getattr(self._hypervisor, method.name)(**read))

    async def _machine(self, id_: str) -> Machine:
        known = self._machines.get(id_)
        if known is not None and known.state is not MachineState.DELETED:
            return known
        try:
            machine = await self._hypervisor.get(id_)
        except MachineNotFound:
            if known is None:
                raise
            return known
        self._machines[id_] = machine
        return machine

    async def _result(self, method: Method, work: Coroutine[Any, Any, Any]) -> Any:
        result = await work
        if method.name == "migrate":
            # It is another owner's now; whoever looks after that asks for it there.
            return None
        if method.returns == "machine":
            return self._facts(result)
        if method.returns == "machines":
            return [self._facts(machine) for machine in result]
        if method.returns == "stream":
            return self._open(result)
        if method.result is not None:
            return method.result.dump_python(result, mode="json")
        return None

    def _with_target(self, number: int, arguments: dict[str, Any]) -> dict[str, Any]:
        target: Target = arguments["target"]
        there = self._server.known(target)
        if there is None:
            raise UnsupportedOperation(
                "migration between servers",
                hypervisor=self._hypervisor.name,
                operation="migrate",
                hint="migrate between owners of one `vmlab simulate`, or within one process",
            )

        def progress(transferred: int, total: int) -> None:
            self._line.send({"id": number, "progress": [transferred, total]})

        return {**arguments, "target": there, "progress": progress}

    # What the client knows of machines.

    def _facts(self, machine: Machine) -> dict[str, Any]:
        self._machines[machine.id] = machine
        self._told[machine.id] = (machine.state, id(machine.spec))
        return MachineFacts(
            id=machine.id, name=machine.name, state=machine.state, spec=machine.spec
        ).model_dump(mode="json")

    def _tell_of(self, message: Message) -> None:
        """Tell what has become of the machine that a call was about."""
        of = message.get("of") or {}
        machine = self._machines.get(of.get("machine", ""))
        if machine is not None:
            self._tell(machine)

    def _tell(self, machine: Machine) -> None:
        if self._told.get(machine.id) != (machine.state, id(machine.spec)):
            self._line.send({"machine": self._facts(machine)})

    async def _watch(self) -> None:
        """Tell of changes that the client did not ask for."""
        async for event in self._hypervisor.log.follow():
            machine = self._machines.get(event.machine or "")
            if machine is not None:
                self._tell(machine)

    # Streams.

    def _number(self) -> int:
        self._next_stream += 1
        return self._next_stream

    def _open(self, channel: Channel) -> dict[str, Any]:
        number = self._number()
        self._streams[number] = channel
        self._pumps[number] = asyncio.ensure_future(self._pump(number, channel))
        return {"stream": number, "name": channel.name}

    async def _pump(self, number: int, channel: Channel) -> None:
        while data := await channel.read():
            self._line.send({"stream": number, "data": encode(data)})
            await self._line.drained()
        self._line.send({"stream": number, "eof": True})

    async def _on_stream(self, number: int, call: str, arguments: Message) -> Any:
        stream = self._streams.get(number)
        if call == "close":
            pump = self._pumps.pop(number, None)
            if pump is not None:
                pump.cancel()
                await asyncio.gather(pump, return_exceptions=True)
            self._streams.pop(number, None)
            if stream is not None:
                await stream.close()
            return None
        if stream is None:
            raise ResourceNotFound(f"there is no stream {number}", hypervisor="simulated")
        if call == "write":
            await stream.write(decode(arguments.get("data")))
            return None
        if call == "log" and isinstance(stream, Console):
            return encode(await stream.log())
        if call == "history" and isinstance(stream, Console):
            return encode(await stream.history(_whole(arguments, "size") or 0))
        raise unknown_call(call)

    async def _subscribe(self, arguments: Message) -> dict[str, Any]:
        number = self._number()
        events = self._hypervisor.subscribe(_whole(arguments, "since"))
        self._streams[number] = None
        self._pumps[number] = asyncio.ensure_future(self._pump_events(number, events))
        return {"stream": number}

    async def _pump_events(self, number: int, events: AsyncIterator[Event]) -> None:
        try:
            async for event in events:
                self._line.send({"stream": number, "event": event.model_dump(mode="json")})
                await self._line.drained()
        except VmlabError as error:
            self._line.send({"stream": number, "error": error.to_record()})
        self._line.send({"stream": number, "end": True})

    async def _leave(self, _arguments: Message) -> None:
        await self._server.left(self)

    # What only the simulation can do.

    async def _trace(self, _arguments: Message) -> str:
        return self._hypervisor.trace()

    async def _crash(self, arguments: Message) -> None:
        self._hypervisor.crash(restart_after=arguments.get("restart_after"))

    async def _restart(self, _arguments: Message) -> None:
        self._hypervisor.restart()


def _whole(arguments: Message, name: str) -> int | None:
    value = arguments.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise InvalidSpec(
            [SpecProblem(name, value, "a whole number, or nothing")], what="subscribe"
        )
    return value


_EXTRA: Final[dict[str, Callable[[Session, Message], Coroutine[Any, Any, Any]]]] = {
    "subscribe": Session._subscribe,
    "leave": Session._leave,
    "trace": Session._trace,
    "crash": Session._crash,
    "restart": Session._restart,
}
