"""VM: one machine of a lab, for people who call without `await`.

Its life is the contract's (`vmlab.hypervisors.base`), its inside is `Guest`'s; what is added is
what a test wants done by itself: after every boot, restore and fork the guest is connected to, is
somebody of its own, and has its shares, addresses and neighbours' names.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from vmlab.guests.guest import CONNECT_TIMEOUT, Guest
from vmlab.guests.shares import unmount_shares
from vmlab.hypervisors.base import Machine, MachineInfo, Snapshot
from vmlab.lab.armed import Armed, OnFault
from vmlab.lab.bringup import reached, shared
from vmlab.lab.faulting import Action, FaultEvent, jump_clock
from vmlab.lab.given import LabDisk, Plug, as_disk, hostname_of, size_of
from vmlab.lab.inside import Inside
from vmlab.lab.networks import (
    LabNetwork,
    hosts_script,
    interface_script,
    link_script,
)
from vmlab.lab.timeline import Step, Timeline
from vmlab.lab.venue import Venue
from vmlab.machine.errors import InvalidState, UnsupportedOperation
from vmlab.machine.faults import (
    At,
    ClockJump,
    Fault,
    FaultKind,
    FaultSchedule,
    NetPartition,
    PowerCut,
)
from vmlab.machine.metrics import MachineMetrics
from vmlab.machine.spec import Disk, MachineSpec, Nic, Share
from vmlab.machine.states import MachineState
from vmlab.report import Direction

if TYPE_CHECKING:
    from vmlab.images import Image
    from vmlab.lab.laboratory import Lab

__all__ = ["VM", "Expecting", "LabDisk", "Plug", "Recording"]

T = TypeVar("T")


class Recording(Protocol):
    """Who takes a machine's measurements: an `AttemptRecorder`."""

    def metric(
        self, name: str, value: float, unit: str = "", *, direction: Direction = Direction.NONE
    ) -> None:
        """Record a measured number."""


class Expecting(Protocol):
    """Who watches a machine, and has to know what is meant: a `Watchdog`."""

    def expect(self, *kinds: str) -> AbstractContextManager[object]:
        """While it is entered, incidents of those kinds are none."""


class VM(Inside):
    """One machine of a lab; `Lab.vm` makes them.

    Attributes:
        lab: Whose it is.
        name: Its name, which is its hostname too.
        machine: The machine as the contract has it, for asynchronous code (see `run`).
        image: What it boots; None on a simulated hypervisor.
        guest: Its inside; None while no guest answers.
        timeline: Where the time went.
        recorder: Who takes what `record` is given, if anybody.
        watchdog: Who watches it, if anybody; is told what is meant to happen.
        forked: Whether it is a fork of another machine, or of a template.
        on_fault: Told what becomes of each fault that is injected, if anybody is.
    """

    def __init__(
        self,
        lab: Lab,
        venue: Venue,
        machine: Machine,
        *,
        image: Image | None,
        copies: Sequence[Share] = (),
        shares: Sequence[Share] | None = None,
        plugs: Sequence[Plug] = (),
        machine_id: str,
        patience: float | None = None,
        origin: Mapping[str, str] | None = None,
    ) -> None:
        self.lab = lab
        self.name = machine.name
        self.machine = machine
        self.image = image
        self.guest: Guest | None = None
        self.recorder: Recording | None = None
        self.watchdog: Expecting | None = None
        self.on_fault: OnFault | None = None
        self._injected: dict[str, Fault] = {}
        self.timeline = Timeline(told=self._told)
        self.machine_id = machine_id
        self.plugs = list(plugs)
        self.venue = venue
        self._shares = tuple(machine.spec.shares if shares is None else shares)
        self._copies = tuple(copies)
        self._patience = CONNECT_TIMEOUT if patience is None else patience
        # The MAC addresses that its guest remembers, by NIC, while it is a fork that has yet to
        # become somebody.
        self._origin = origin
        self.forked = origin is not None

    def __repr__(self) -> str:
        return f"<VM {self.name!r} on {self.hypervisor}: {self.state.value}>"

    # What it is.

    @property
    def hypervisor(self) -> str:
        """The name of the hypervisor that runs it."""
        return self.venue.name

    @property
    def spec(self) -> MachineSpec:
        """What it is to be now."""
        return self.machine.spec

    @property
    def state(self) -> MachineState:
        """Its state as last known."""
        return self.machine.state

    @property
    def alive(self) -> bool:
        """Whether its guest runs or could go on running."""
        return self.state.is_live

    @property
    def hostname(self) -> str:
        """Its name, as a name of hosts may be (RFC 1123, 2.1)."""
        return hostname_of(self.name)

    @property
    def addresses(self) -> Mapping[str, str]:
        """Its addresses in the lab's private networks, by the network's name."""
        return {plug.network.name: plug.address.ip for plug in self.plugs}

    def info(self) -> MachineInfo:
        """What it is made of, read back from the hypervisor."""
        return self.run(self.machine.info())

    def metrics(self) -> MachineMetrics:
        """What it uses; it has to be live."""
        return self.run(self.machine.metrics())

    def record(
        self,
        name: str,
        value: float,
        unit: str = "",
        direction: Direction = Direction.NONE,
    ) -> None:
        """Record a measured number with the test that the machine is for, if there is one."""
        if self.recorder is not None:
            self.recorder.metric(name, value, unit, direction=direction)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on the lab's event loop, where its machine and guest live.

        Raises:
            DeadlineExceeded: it took longer than `timeout` seconds.
        """
        return self.venue.loop.run(coroutine, timeout)

    def inside(self, operation: str) -> Guest:
        if self.guest is not None:
            return self.guest
        if not self.venue.has_guests:
            raise UnsupportedOperation(
                "commands in guests",
                hypervisor=self.hypervisor,
                machine=self.name,
                operation=operation,
                hint="its guests are simulated and have no shell; run this test on another one",
            )
        raise InvalidState(
            operation,
            expected=("running, with its guest connected",),
            actual=self.state.value,
            machine=self.name,
            hypervisor=self.hypervisor,
            hint="start() boots it and connects to its guest; after kill() or crash() it is needed",
        )

    # Its life.

    def start(self, *, timeout: float | None = None) -> None:
        """Boot it and connect to its guest.

        Args:
            timeout: Seconds that the guest has to answer.
        """
        self.run(self.booted(timeout))

    def stop(self, graceful: bool = True, *, timeout: float | None = None) -> None:
        """Shut it down; the guest is asked to, unless not `graceful`."""
        self._ends("stop", lambda: self.machine.stop(graceful=graceful, timeout=timeout))

    def shutdown(self, *, timeout: float | None = None) -> None:
        """Power the guest down and wait until the machine is off."""
        self.stop(timeout=timeout)

    def kill(self) -> None:
        """End it at once and unasked."""
        self._ends("kill", self.machine.kill)

    def pause(self) -> None:
        """Stop its vCPUs."""
        with self._marking("pause"):
            self.run(self.machine.pause())

    def resume(self) -> None:
        """Let its vCPUs run on."""
        with self._marking("resume"):
            # A fork of a machine that stood still has yet to become somebody.
            self.run(self.machine.resume() if self._origin is None else self.booted(None))

    def restart(self, *, graceful: bool = True, timeout: float | None = None) -> None:
        """Boot it again, by the button unless `graceful`, and connect to its guest."""

        async def work() -> None:
            await self._forsake()
            await self.machine.restart(graceful=graceful, timeout=timeout)
            await self.greeted()

        with self._expecting(*_ENDS), self._marking("restart"):
            self.run(work())

    def reboot(self, *, timeout: float = CONNECT_TIMEOUT) -> None:
        """Reboot from inside, and wait until the guest answers again."""
        guest = self.inside("reboot")

        async def work() -> None:
            await guest.reboot(timeout=timeout)
            await self._settled(guest)

        with self._expecting(*_ENDS), self._marking("reboot"):
            self.run(work())

    def crash(self) -> None:
        """Make the guest's kernel panic at once, without syncing its disks."""
        guest = self.inside("crash")
        with self._expecting("panic", *_ENDS), self._marking("crash"):
            self.run(guest.crash())

    def power_cut(self, *, restart: bool = True) -> None:
        """Cut its power: every write to a disk without a completed flush is lost.

        Args:
            restart: Boot it again, and connect to its guest.

        Raises:
            UnsupportedOperation: its hypervisor cannot.
        """

        fault = PowerCut()

        async def work() -> None:
            id_ = await self.machine.inject(fault)
            self._faulted(id_, fault, "injected")
            await self._forsake()
            if restart:
                await self.booted(None)

        with self._expecting(*_ENDS), self._marking("power-cut"):
            try:
                self.run(work())
            except UnsupportedOperation as error:
                self._faulted(fault.kind.value, fault, "refused", str(error))
                raise

    def delete(self) -> None:
        """Remove it with its disks and snapshots; again does nothing."""
        self.lab.remove(self)

    # Saving and copying.

    def snapshot(self, name: str, *, memory: bool | None = None) -> Snapshot:
        """Save its disks, and with `memory` (None: if it is live and can be) all of it.

        Shares that are mounted are taken away meanwhile, since their devices cannot be saved.
        """

        async def work() -> Snapshot:
            async with self._without_shares():
                return await self.machine.snapshot(name, memory=memory)

        with self._marking("snapshot", name):
            return self.run(work())

    def restore(self, name: str) -> None:
        """Bring back a snapshot; its guest has the time and random numbers of now."""

        async def work() -> None:
            await self._forsake()
            await self.machine.restore(name)
            if self.machine.state is MachineState.RUNNING:
                await self.greeted(step="connect", refresh=True)

        with self._expecting(*_ENDS), self._marking("restore", name):
            self.run(work())

    def fork(self, name: str | None = None) -> VM:
        """An independent copy, somebody of its own: name, addresses, clock and random numbers.

        Raises:
            UnsupportedOperation: its hypervisor has no forks.
        """
        return self.lab.fork_of(self, name)

    # Devices.

    def plug_disk(self, disk: LabDisk | Disk | str, name: str | None = None) -> str:
        """Add a disk, which may be a size such as "1G"; returns its name."""
        taken = {each.name for each in self.spec.disks}
        free = name or next(f"disk{number}" for number in range(1 << 16)
                            if f"disk{number}" not in taken)  # fmt: skip
        # One that comes while the machine runs is served by nobody else.
        plugged = as_disk(disk, free).model_copy(update={"breakable": False})
        with self._marking("plug-disk", plugged.name):
            self.run(self.machine.plug_disk(plugged))
        return plugged.name

    def unplug_disk(self, name: str) -> None:
        """Remove a disk with its contents."""
        with self._marking("unplug-disk", name):
            self.run(self.machine.unplug_disk(name))

    def plug_nic(self, network: LabNetwork | Nic | str, name: str | None = None) -> str:
        """Add a network interface; on a network of the lab's it has an address. Returns its name.

        Args:
            network: A network of the lab's, what a specification's `network` may be, or a NIC.
            name: The NIC's.
        """
        taken = {each.name for each in self.spec.nics}
        free = name or next(f"net{number}" for number in range(1 << 16)
                            if f"net{number}" not in taken)  # fmt: skip
        if isinstance(network, Nic):
            nic = network
        elif isinstance(network, LabNetwork):
            nic = Nic(name=free, network=network.segment)
        else:
            nic = Nic(name=free, network=network)

        async def work() -> None:
            await self.machine.plug_nic(nic)
            if isinstance(network, LabNetwork):
                self.plugs.append(Plug(nic.name, network, network.join(self.hostname)))
            if self.guest is not None:
                await self._settled(self.guest, shares=False)

        with self._marking("plug-nic", nic.name):
            self.run(work())
        self.lab.introduce(self)
        return nic.name

    def unplug_nic(self, name: str) -> None:
        """Remove a network interface."""
        with self._marking("unplug-nic", name):
            self.run(self.machine.unplug_nic(name))
        for plug in [plug for plug in self.plugs if plug.nic == name]:
            plug.network.leave(self.hostname)
            self.plugs.remove(plug)

    def resize(self, *, vcpus: int | None = None, memory: int | str | None = None) -> MachineInfo:
        """Change the number of vCPUs and the memory, in bytes or as "512M"."""
        size = size_of("memory", memory) if memory is not None else None
        if size is not None:
            self.lab.admit_growth(self, size)
        with self._marking("resize"):
            return self.run(self.machine.resize(vcpus=vcpus, memory=size))

    # Breaking it.

    def inject(self, fault: Fault) -> str:
        """Break something, as the fault says; returns the fault's id.

        Raises:
            UnsupportedOperation: its hypervisor cannot inject faults of that kind.
        """
        expected = _ENDS if isinstance(fault, PowerCut) or fault.kind.value == "kill" else ()
        with self._expecting(*expected), self._marking("fault", fault.kind.value):
            try:
                id_ = self.run(self._inject(fault))
            except UnsupportedOperation as error:
                self._faulted(fault.id or fault.kind.value, fault, "refused", str(error))
                raise
        self._faulted(id_, fault, "injected")
        self._injected[id_] = fault
        return id_

    def clear_fault(self, id_: str) -> None:
        """End a fault by its id."""
        with self._marking("fault-cleared", id_):
            self.run(self.machine.clear_fault(id_))
        if (fault := self._injected.pop(id_, None)) is not None:
            self._faulted(id_, fault, "cleared")

    def arm(self, schedule: FaultSchedule) -> Armed:
        """Break things as a schedule says, from now on; its `disarm` ends that.

        Raises:
            UnsupportedOperation: naming each fault that the hypervisor cannot inject.
            InvalidSpec: a fault names something that is not there.
        """
        return Armed([self], schedule)

    async def _inject(self, fault: Fault) -> str:
        if isinstance(fault, ClockJump) and fault.when == At(seconds=0):
            capabilities = await self.machine.hypervisor.capabilities()
            if fault.kind not in capabilities.faults and self.venue.has_guests:
                await jump_clock(self.inside("inject"), fault)
                return fault.id or fault.kind.value
        return await self.machine.inject(fault)

    def _faulted(self, id_: str, fault: Fault, action: Action, reason: str = "") -> None:
        if self.on_fault is not None:
            event = FaultEvent(id_, fault.kind.value, self.name, action, 0.0, reason)
            self.on_fault(event, fault)

    # Looking at it.

    def console_text(self, name: str = "serial") -> str:
        """All that a console has printed since the machine was made."""

        async def work() -> bytes:
            async with await self.machine.console(name) as console:
                return await console.log()

        return self.run(work()).decode("utf-8", "replace")

    def wait_for_console_text(
        self, text: str, *, console: str = "serial", timeout: float | None = None
    ) -> None:
        """Wait until the console has printed `text`, from boot on."""
        # No command: a machine whose guest does not answer has a console too.
        guest = self.guest or Guest(self.machine, _no_channel(self.machine))
        self.run(guest.wait_for_console_text(text, console=console, timeout=timeout))

    def screenshot(self) -> bytes:
        """What its display shows, as a PNG image."""
        return self.run(self.machine.screenshot())

    def send_keys(self, *keys: str) -> None:
        """Press keys of its keyboard, one after the other; held together: "ctrl-alt-f2"."""
        self.run(self.machine.send_keys(keys))

    # On the loop.

    async def booted(self, timeout: float | None) -> None:
        """Start it, or wake it where it is a fork, and connect to its guest."""
        origin, self._origin = self._origin, None
        if origin is None:
            with self.timeline.step("start"):
                await self.machine.start()
            await self.greeted(timeout=timeout)
            return
        after = {nic.name: nic.mac for nic in (await self.machine.info()).nics}
        cut = await self._cut_off()
        with self.timeline.step("resume"):
            await self.machine.resume()
        macs = {origin[nic]: mac for nic, mac in after.items()}
        await self.greeted(step="connect", timeout=timeout, refresh=True, macs=macs)
        if cut:
            with self.timeline.step("link"):
                for fault in cut:
                    await self.machine.clear_fault(fault)
                if self.guest is not None:
                    links = [link_script(after[plug.nic]) for plug in self.plugs]
                    await self.guest.succeed("\n".join(links), timeout=self._patience)

    async def _cut_off(self) -> list[str]:
        """Take it off its networks, where it would have its origin's addresses for a moment."""
        if FaultKind.NET_PARTITION not in self.venue.capabilities.faults:
            return []
        return [await self.machine.inject(NetPartition(nic=plug.nic)) for plug in self.plugs]

    async def greeted(
        self,
        *,
        step: str = "boot",
        timeout: float | None = None,
        refresh: bool = False,
        macs: Mapping[str, str] | None = None,
    ) -> None:
        """Connect to the guest that boots or runs, and have it be who it is.

        Args:
            step: What the wait is called in the timeline.
            timeout: Seconds that the guest has to answer.
            refresh: Whether it remembers another time, and maybe another machine.
            macs: The MAC addresses that it remembers -> those that it has.
        """
        await self._forsake()
        if not self.venue.has_guests:
            return
        patience = self._patience if timeout is None else timeout
        guest = await reached(self.machine, self.timeline, patience, step)
        try:
            if refresh:
                with self.timeline.step("refresh"):
                    await guest.refresh(
                        hostname=self.hostname if macs is not None else None,
                        machine_id=self.machine_id if macs is not None else None,
                        macs=macs,
                    )
            await self._settled(guest, named=macs is not None)
        except BaseException:
            await guest.close()
            raise
        self.guest = guest

    async def _settled(self, guest: Guest, *, shares: bool = True, named: bool = False) -> None:
        """Have the guest have its shares, its id unless it is `named`, addresses and neighbours."""
        if shares:
            await shared(guest, await self._absent(guest), self.timeline)
        # One that made its own at its first boot, as systemd does, keeps it.
        known = f"[ -s /etc/machine-id ] || echo {self.machine_id} >/etc/machine-id"
        script = [] if named else [known]
        if self.plugs:
            found = {nic.name: nic.mac for nic in (await self.machine.info()).nics}
            script += [interface_script(found[plug.nic], plug.address) for plug in self.plugs]
            script.append(hosts_script(self._neighbours()))
        if script:
            with self.timeline.step("settle"):
                await guest.succeed("\n".join(script), timeout=self._patience)

    async def _absent(self, guest: Guest) -> list[Share]:
        """The shares that the guest has to be given: what was copied to its disk is there still."""
        wanted = list(self._shares)
        for share in self._copies:
            if not (await guest.execute(["test", "-e", share.target])).ok:
                wanted.append(share)
        return wanted

    async def meet(self) -> None:
        """Tell the guest the names of those that are on its networks now."""
        if self.guest is not None and self.plugs:
            await self.guest.succeed(hosts_script(self._neighbours()), timeout=self._patience)

    def _neighbours(self) -> dict[str, str]:
        """Names and addresses of all that are on its networks, itself too."""
        hosts: dict[str, str] = {}
        for plug in reversed(self.plugs):
            hosts |= {name: address.ip for name, address in plug.network.members.items()}
        return hosts

    async def _forsake(self) -> None:
        """Let go of the guest, which is not the one that it was."""
        guest, self.guest = self.guest, None
        if guest is not None:
            await guest.close()

    def _without_shares(self) -> _Unmounted:
        # One that stands still cannot; its hypervisor says what that means.
        running = self.machine.state is MachineState.RUNNING
        return _Unmounted(self.guest if running else None, self._shares, self.timeline)

    async def removed(self) -> None:
        """Delete the machine, whatever its state."""
        await self._forsake()
        await self.machine.delete(force=True)

    async def left(self) -> None:
        """Let go of the guest; the machine stays as it is."""
        await self._forsake()

    async def copied(self, name: str) -> Machine:
        """A fork of the machine, as the contract has it, which stands still."""
        async with self._without_shares():
            with self.timeline.step("fork"):
                if self.machine.state is not MachineState.RUNNING:
                    return await self.machine.fork(name)
                await self.machine.pause()
                try:
                    return await self.machine.fork(name)
                finally:
                    await self.machine.resume()

    def successor(
        self,
        machine: Machine,
        *,
        plugs: Sequence[Plug],
        machine_id: str,
        origin: Mapping[str, str],
    ) -> VM:
        """The VM of a fork, whose guest remembers those MAC addresses."""
        return VM(
            self.lab,
            self.venue,
            machine,
            image=self.image,
            shares=self._shares,
            copies=self._copies,
            plugs=plugs,
            machine_id=machine_id,
            patience=self._patience,
            origin=origin,
        )

    # Telling.

    def mark(self, kind: str, text: str = "", duration_s: float | None = None) -> None:
        """Tell the lab's observers what happened, and how many seconds it took."""
        for observer in tuple(self.lab.observers):
            observer.marked(self, kind, text, duration_s)

    def _told(self, step: Step) -> None:
        self.mark(step.name, "", step.seconds)

    @contextmanager
    def _marking(self, kind: str, text: str = "") -> Iterator[None]:
        timeline = Timeline(told=lambda step: self.mark(kind, text, step.seconds))
        with timeline.step(kind):
            yield

    def _expecting(self, *kinds: str) -> AbstractContextManager[object]:
        if self.watchdog is None or not kinds:
            return nullcontext()
        return self.watchdog.expect(*kinds)

    def _ends(self, kind: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run what ends the machine."""

        async def ended() -> None:
            await self._forsake()
            await work()

        with self._expecting(*_ENDS), self._marking(kind):
            self.run(ended())


_ENDS: Final = ("unexpected-exit", "unexpected-reboot")
"""The incidents (`IncidentKind`) that the end of a boot is, if nobody meant it."""


class _Unmounted:
    """While it is entered, a guest has its shares not mounted."""

    def __init__(self, guest: Guest | None, shares: Sequence[Share], timeline: Timeline) -> None:
        self._guest = guest
        self._shares = shares
        self._timeline = timeline

    async def __aenter__(self) -> None:
        if self._guest is not None and self._shares:
            await unmount_shares(self._guest, self._shares)

    async def __aexit__(self, *_: object) -> None:
        if self._guest is not None:
            await shared(self._guest, self._shares, self._timeline)


def _no_channel(machine: Machine) -> Any:
    from vmlab.lab.ways import channel_into

    return channel_into(machine)
