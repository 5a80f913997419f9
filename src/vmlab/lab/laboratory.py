"""Lab: machines for tests, made, named, connected and cleared away; for people without `await`.

    with Lab(image="debian-13-riscv64-tiny") as lab:
        vm = lab.vm()
        vm.succeed("uname -a")

A lab owns a run, so whatever happens to its process its machines end with it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

from vmlab.guests.guest import CONNECT_TIMEOUT
from vmlab.hypervisors import registry
from vmlab.hypervisors.base import Machine
from vmlab.hypervisors.ownership import Home, Owner, Run
from vmlab.images import Image, ImageStore, Progress
from vmlab.images.progress import ProgressEvent, silent
from vmlab.lab import boot
from vmlab.lab.admission import OVERHEAD, Admission, Claim
from vmlab.lab.boot import Bootable, Wish, specification
from vmlab.lab.given import LabDisk, Plug, as_disk, hostname_of, made_machine_id, size_of
from vmlab.lab.loop import LoopThread
from vmlab.lab.networks import LabNetwork, Networks
from vmlab.lab.preference import EMBEDDED, Preference, preference
from vmlab.lab.promises import Promises
from vmlab.lab.templates import Fork, Templates
from vmlab.lab.timeline import Step
from vmlab.lab.venue import Venue
from vmlab.lab.vm import VM
from vmlab.machine.capabilities import Capability
from vmlab.machine.errors import InvalidSpec, OperationFailed, SpecProblem
from vmlab.machine.fields import NAME_RULE, is_name
from vmlab.machine.sizes import format_size
from vmlab.machine.spec import Disk, Nic, Share
from vmlab.machine.states import MachineState

__all__ = ["Lab", "Observer"]

_LOG: Final = logging.getLogger(__name__)

DEFAULT_MEMORY: Final = "512M"


class Observer(Protocol):
    """Who is told of a lab's machines: a report, a progress display, a watchdog.

    `marked` is called in any thread, and must not wait for the lab.
    """

    def machine_made(self, vm: VM) -> None:
        """A machine exists, and has not run yet as this one."""

    def marked(self, vm: VM, kind: str, text: str, duration_s: float | None) -> None:
        """Something happened to it, and took so many seconds."""

    def machine_gone(self, vm: VM) -> None:
        """It is about to be removed; it can still be looked at."""


@dataclass(frozen=True, slots=True)
class _Order:
    """A machine that somebody wants: checked, and nothing made of it yet."""

    venue: Venue
    wanted: Bootable | None
    wish: Wish
    plugs: tuple[tuple[str, LabNetwork], ...]
    image: Image | None
    template: bool
    timeout: float | None

    @property
    def name(self) -> str:
        return self.wish.name

    @property
    def memory(self) -> int:
        """Bytes that its guest may come to use."""
        return size_of("memory", self.wish.memory)


class Lab:
    """A place for machines, which ends with its process or when it is closed.

    Args:
        hypervisor: The one that runs machines for which none is named; None is the embedded
            engine where it can, else QEMU.
        image: What machines boot for which none is named; None is a tiny Debian.
        seed: Source of what is random about machines: addresses, ids; None draws one.
        owner: Whose the machines are; None is a run of the lab's own.
        shared: Directory that labs in other processes have as well, for templates.
        admission: Whether machines wait until the host has memory for them.
        terminal: Whether machines have a console to be used as a terminal (`lab.terminal`).

    Attributes:
        observers: Who is told of the machines.
        seed: The seed.
        owner: The owner.
        progress: Told how far images are that have to be fetched or built.
        templates: The templates, by hypervisor.
        tell: Told, in a sentence, which machine waits for what.
    """

    def __init__(
        self,
        *,
        hypervisor: str | None = None,
        image: str | None = None,
        seed: int | None = None,
        owner: Owner | None = None,
        shared: Path | None = None,
        admission: bool = True,
        progress: Progress = silent,
        terminal: bool = False,
    ) -> None:
        self.observers: list[Observer] = []
        self.hypervisor = hypervisor
        self.image = image
        self.seed = secrets.randbits(32) if seed is None else seed
        self.shared = shared
        self.progress = progress
        self.tell: Callable[[str], None] = _LOG.warning
        self.terminal = terminal
        self.networks = Networks()
        self._stack = ExitStack()
        self._venues: dict[str, Venue] = {}
        self.templates: dict[str, Templates] = {}
        self._images: dict[str, Image] = {}
        self._machines: dict[str, VM] = {}
        self._made: dict[str, int] = {}
        self._grown: dict[str, int] = {}
        self._lock = threading.RLock()
        self._closed = False
        self.lease: Run | None = None
        if owner is None:
            self.lease = Run.begin()
            self._stack.enter_context(self.lease)
            owner = self.lease.owner
        self.owner = owner
        ledger: Admission | None = None
        if admission:
            home = self.lease.home.directory if self.lease is not None else Home.path()
            ledger = Admission(home / "admission", tell=self._say)
        self._promises = Promises(ledger)
        self._stack.callback(self._promises.close)

    def __repr__(self) -> str:
        return f"<Lab {self.owner}: {', '.join(self._machines) or 'no machines'}>"

    @property
    def machines(self) -> list[VM]:
        """The machines that there are, in the order in which they were made."""
        with self._lock:
            return list(self._machines.values())

    # Machines.

    def vm(
        self,
        *,
        name: str | None = None,
        image: str | None = None,
        memory: int | str | None = None,
        cpus: int | None = None,
        disks: Sequence[LabDisk | Disk | str] = (),
        nics: Sequence[Nic] = (),
        networks: Sequence[LabNetwork | str] = (),
        shares: Sequence[Share | str] = (),
        hypervisor: str | None = None,
        boot: bool = True,
        template: bool = True,
        timeout: float | None = None,
    ) -> VM:
        """A machine, booted and ready for commands.

        Args:
            name: Its name and hostname; None is the first free one of "vm", "vm2", ...
            image: What it boots, by name.
            memory: Bytes, or a size such as "512M".
            cpus: Number of vCPUs.
            disks: Disks of its own: of the lab's, sizes of empty ones, or as specified.
            nics: Network interfaces, as specified.
            networks: Networks that it is on: of the lab's, by name too; "user" is NAT.
            shares: Directories, "HOST:GUEST[:ro|rw]" or as specified.
            hypervisor: What runs it.
            boot: Whether it is booted, or left at rest.
            template: Whether it may be a fork of a machine that was booted before, where its
                hypervisor can fork; else it boots anew.
            timeout: Seconds that its guest has to boot and answer.

        Raises:
            InvalidSpec: naming what is wrong with the wish.
            VmlabError: it cannot be had; nothing of it is left.
        """
        order = self._order(
            name=name, image=image, memory=memory, cpus=cpus, disks=disks, nics=nics,
            networks=networks, shares=shares, hypervisor=hypervisor, template=template,
            timeout=timeout, taken=(),
        )  # fmt: skip
        return self._made_of([order], boot=boot)[0]

    def vms(
        self,
        machines: int | Sequence[str],
        *,
        network: LabNetwork | None = None,
        image: str | Sequence[str | None] | None = None,
        hypervisor: str | Sequence[str | None] | None = None,
        memory: int | str | None = None,
        cpus: int | None = None,
        disks: Sequence[LabDisk | Disk | str] = (),
        shares: Sequence[Share | str] = (),
        boot: bool = True,
        template: bool = True,
        timeout: float | None = None,
    ) -> list[VM]:
        """Several machines on a private network, where each knows the others by name.

        Args:
            machines: How many, or their names.
            network: The network; None is a new one.
            image: What they boot, or one for each.
            hypervisor: What runs them, or one for each.
            memory: Of each; the rest as for `vm`.

        Raises:
            InvalidSpec: naming what is wrong with the wish.
            VmlabError: one of them cannot be had; nothing of any is left.
        """
        names = _names(machines)
        images = _for_each("image", image, len(names))
        hypervisors = _for_each("hypervisor", hypervisor, len(names))
        joined = network or self.network()
        orders: list[_Order] = []
        for position, name in enumerate(names):
            orders.append(
                self._order(
                    name=name, image=images[position], memory=memory, cpus=cpus, disks=disks,
                    nics=(), networks=(joined,), shares=shares, template=template,
                    hypervisor=hypervisors[position], timeout=timeout,
                    taken=[order.name for order in orders],
                )
            )  # fmt: skip
        return self._made_of(orders, boot=boot)

    def fork_of(self, vm: VM, name: str | None = None) -> VM:
        """See `VM.fork`."""
        name = self._free_name(name, f"{vm.name}-fork", ())
        vm.venue.capabilities.require(Capability.FORK, machine=vm.name, operation="fork")
        if vm.venue.has_guests:
            self._admit({name: Claim(name, vm.spec.memory.size + OVERHEAD)})
        try:
            before = {nic.name: nic.mac for nic in vm.info().nics}
            machine = vm.run(vm.copied(name))
        except BaseException:
            self._promises.give_back(name)
            raise
        child = self._enlist(
            vm.successor(
                machine,
                plugs=[
                    Plug(plug.nic, plug.network, plug.network.join(hostname_of(name)))
                    for plug in vm.plugs
                ],
                machine_id=self._machine_id(name),
                origin=before,
            )
        )
        try:
            if vm.state is MachineState.RUNNING:
                child.run(child.booted(None))
        except BaseException:
            self.remove(child)
            raise
        self._began(child)
        self.introduce(child)
        return child

    def remove(self, vm: VM) -> None:
        """Remove a machine with its disks and snapshots; again does nothing."""
        with self._lock:
            if self._machines.get(vm.name) is not vm:
                return
        for observer in tuple(self.observers):
            observer.machine_gone(vm)
        try:
            vm.run(vm.removed())
        finally:
            with self._lock:
                self._machines.pop(vm.name, None)
            grown = range(1, self._grown.pop(vm.name, 0) + 1)
            self._promises.give_back(vm.name, *(_growth(vm.name, number) for number in grown))
            for plug in vm.plugs:
                plug.network.leave(vm.hostname)
                self.networks.release(plug.network)

    def leave(self, vm: VM) -> None:
        """Let go of a machine as it is: the lab does not remove it any more, its owner has it.

        With a store for an owner (`owner=`) it stays when this process ends.
        """
        with self._lock:
            if self._machines.get(vm.name) is not vm:
                return
            del self._machines[vm.name]
        vm.run(vm.left())

    # What machines are given.

    def disk(
        self,
        size: int | str | None = None,
        *,
        name: str | None = None,
        source: str | Path | None = None,
        breakable: bool = True,
    ) -> LabDisk:
        """A disk for machines of this lab; each that gets it has a copy of its own.

        Args:
            size: Bytes, or as "1G"; None is that of `source`.
            name: By which it is found in the guest, as its serial number.
            source: An image to start from, which is never written to.
            breakable: Whether every fault can strike it, a power cut among them; one that is not
                is faster on QEMU.

        Raises:
            InvalidSpec: it can be none.
        """
        if size is None and source is None:
            raise InvalidSpec([SpecProblem("size", None, "a size such as '1G', or a source")])
        return LabDisk(
            Disk(
                name=name or "disk",
                size=None if size is None else size_of("size", size),
                source=None if source is None else Path(source).absolute(),
                breakable=breakable,
            ),
            named=name is not None,
        )

    def network(self, name: str | None = None, *, subnet: str | None = None) -> LabNetwork:
        """A private network for machines of this lab.

        Args:
            name: Its name; None is the first free one.
            subnet: Its addresses, as "10.9.8.0/24"; None is a free one.
        """
        return self.networks.make(name, subnet)

    # The end.

    def close(self) -> None:
        """Remove all machines and what the lab made; closing it again does nothing.

        Raises:
            VmlabError: something could not be removed; all the rest is.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with self._stack:
            for vm in self.machines:
                # The last one first, and each whatever becomes of the others.
                self._stack.callback(self.remove, vm)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # From a wish to an order.

    def _order(
        self,
        *,
        name: str | None,
        image: str | None,
        memory: int | str | None,
        cpus: int | None,
        disks: Sequence[LabDisk | Disk | str],
        nics: Sequence[Nic],
        networks: Sequence[LabNetwork | str],
        shares: Sequence[Share | str],
        hypervisor: str | None,
        template: bool,
        timeout: float | None,
        taken: Iterable[str],
    ) -> _Order:
        if self._closed:
            raise OperationFailed("the lab was closed", hint="make another one")
        name = self._free_name(name, "vm", taken)
        user, plugged = False, list[tuple[str, LabNetwork]]()
        for network in networks:
            if network == "user":
                user = True
            else:
                joined = self.networks.get(network) if isinstance(network, str) else network
                plugged.append((f"lab{len(plugged)}", joined))
        size = size_of("memory", DEFAULT_MEMORY if memory is None else memory)
        wish = Wish(
            name=name,
            image=image or self.image,
            memory=format_size(size),
            cpus=1 if cpus is None else cpus,
            shares=tuple(shares),
            disks=tuple(as_disk(disk, f"disk{at}") for at, disk in enumerate(disks)),
            nics=(
                *nics,
                *(Nic(name=nic, network=network.segment) for nic, network in plugged),
            ),
            network=user,
            terminal=self.terminal,
            seed=self.seed,
        )
        chosen = preference(wish, hypervisor or self.hypervisor)
        venue, wish, found = self._found(wish, chosen, hypervisor or self.hypervisor)
        return _Order(
            venue=venue,
            wanted=None if found is None else boot.booted_by(wish, found),
            wish=wish,
            plugs=tuple(plugged),
            image=found,
            template=template,
            timeout=timeout,
        )

    def _found(
        self, wish: Wish, chosen: Preference, named: str | None
    ) -> tuple[Venue, Wish, Image | None]:
        """Where it is to run, and the image that it boots, fetched or built if need be."""
        if chosen.hypervisor == "simulated":
            boot.check(replace(wish, image=None))
            return self.venue(chosen.hypervisor), wish, None
        engine = chosen.hypervisor == EMBEDDED
        wish = replace(wish, image=wish.image or chosen.tiny_image, engine=engine)
        boot.check(wish)
        image = self._image(wish)
        chosen = chosen.for_image(image, named)
        return self.venue(chosen.hypervisor), wish, image

    def _image(self, wish: Wish) -> Image:
        """The image of a wish, which nobody removes while the lab has it."""
        assert wish.image is not None
        with self._lock:
            if wish.image not in self._images:
                progress = self._announced(wish.image)
                image = boot.find_image(wish, ImageStore(), progress=progress)
                self._stack.enter_context(image.hold())
                self._images[wish.image] = image
            return self._images[wish.image]

    def _announced(self, image: str) -> Progress:
        """Progress whose beginning is told in a sentence as well: that is what a test waits for."""
        announced = False

        def told(event: ProgressEvent) -> None:
            nonlocal announced
            if not announced:
                announced = True
                self._say(f"the image {image} is made ready first: {event.step}")
            self.progress(event)

        return told

    def venue(self, hypervisor: str) -> Venue:
        """A hypervisor of that name, opened for this lab.

        Raises:
            HypervisorUnavailable: it cannot be used here.
        """
        with self._lock:
            if hypervisor not in self._venues:
                options = {"seed": str(self.seed)} if hypervisor == "simulated" else {}
                opened = registry.provider(hypervisor).open(self.owner, options)
                factory = opened.loop_factory()
                if factory is asyncio.new_event_loop:
                    loop = LoopThread.shared()
                else:
                    loop = LoopThread(factory, f"vmlab-{hypervisor}")
                    self._stack.callback(loop.close)
                self._stack.callback(_closed, loop, opened.close)
                capabilities = loop.run(opened.capabilities())
                venue = Venue(opened, capabilities, loop)
                self._venues[hypervisor] = venue
                self.templates[hypervisor] = Templates(
                    venue, self.shared, gone=self._promises.give_back
                )
            return self._venues[hypervisor]

    def _free_name(self, name: str | None, stem: str, taken: Iterable[str]) -> str:
        """The name that is wished for, or one that nobody has."""
        present = {*self._machines, *taken}
        if name is None:
            numbers = (stem if number == 1 else f"{stem}{number}" for number in range(1, 1 << 16))
            return next(free for free in numbers if free not in present)
        if not is_name(name):
            raise InvalidSpec([SpecProblem("name", name, NAME_RULE)])
        if name in present:
            raise InvalidSpec([SpecProblem("name", name, "a name that no machine of the lab has")])
        return name

    def _machine_id(self, name: str) -> str:
        with self._lock:
            number = self._made[name] = self._made.get(name, 0) + 1
        return made_machine_id(self.seed, name, number)

    # From an order to a machine.

    def _made_of(self, orders: Sequence[_Order], *, boot: bool) -> list[VM]:
        """The machines that were ordered: all of them, or nothing is left of any."""
        made: list[VM] = []
        keys = {
            self.templates[order.venue.name].key(order.wanted)
            for order in orders
            if order.wanted is not None
        }
        self._admit(self._claims(orders, boot=boot), keys)
        try:
            for order in orders:
                made.append(self._enlist(self._create(order, boot=boot)))
            if boot:
                self._boot(made)
        except BaseException:
            with ExitStack() as clearing:
                clearing.callback(self._promises.give_back, *(order.name for order in orders))
                for vm in made:
                    clearing.callback(self.remove, vm)
            raise
        return made

    # Memory.

    def _say(self, text: str) -> None:
        self.tell(text)

    def _claims(self, orders: Sequence[_Order], *, boot: bool) -> dict[str, Claim]:
        """What the host has to have for orders, by what it is given back under."""
        claims: dict[str, Claim] = {}
        for order in orders:
            size = order.memory + OVERHEAD
            if not order.venue.has_guests:
                continue
            claims[order.name] = Claim(order.name, size)
            if boot and order.template and order.wanted is not None:
                key = self.templates[order.venue.name].lacks(order.wanted)
                if key is not None:
                    claims[key] = Claim(f"a template for {order.name}", size)
        return claims

    def _admit(self, claims: Mapping[str, Claim], needed: Container[str] = ()) -> None:
        """Wait for memory; templates that are idle and not needed are given up for it."""

        def free_up() -> None:
            for venue in tuple(self._venues.values()):
                venue.loop.run(self.templates[venue.name].discard(needed))

        self._promises.ask(claims, free_up)

    def admit_growth(self, vm: VM, size: int) -> None:
        """Wait until the host has memory for a machine to grow to so many bytes."""
        if vm.venue.has_guests and (more := size - vm.spec.memory.size) > 0:
            self._grown[vm.name] = self._grown.get(vm.name, 0) + 1
            name = _growth(vm.name, self._grown[vm.name])
            self._admit({name: Claim(f"{vm.name}, which grows", more)})

    def _began(self, vm: VM) -> None:
        """Note which process has a machine's memory, now that it runs."""
        if vm.venue.has_guests:
            self._promises.began(vm.name, vm.info().pid, forked=vm.forked)

    def _create(self, order: _Order, *, boot: bool) -> VM:
        machine, origin, steps = order.venue.loop.run(self._machine_of(order, boot=boot))
        vm = VM(
            self,
            order.venue,
            machine,
            image=order.image,
            copies=order.wanted.copies.shares if order.wanted is not None else (),
            plugs=[Plug(nic, net, net.join(hostname_of(order.name))) for nic, net in order.plugs],
            machine_id=self._machine_id(order.name),
            patience=order.timeout,
            origin=origin,
        )
        vm.timeline.steps += steps
        return vm

    async def _machine_of(
        self, order: _Order, *, boot: bool
    ) -> tuple[Machine, Mapping[str, str] | None, tuple[Step, ...]]:
        """The machine of an order, what it remembers if it is a fork, and what it took."""
        wanted = order.wanted
        if boot and order.template and wanted is not None:
            templates = self.templates[order.venue.name]
            patience = CONNECT_TIMEOUT if order.timeout is None else order.timeout
            found = await templates.fork(wanted, patience=patience)
            if isinstance(found, Fork):
                return found.machine, found.macs, found.steps
            _LOG.debug("machine %r is booted by itself: %s", order.name, found)
        spec = specification(order.wish, "") if wanted is None else wanted.spec
        return await order.venue.hypervisor.create(spec), None, ()

    def _enlist(self, vm: VM) -> VM:
        with self._lock:
            self._machines[vm.name] = vm
        for observer in tuple(self.observers):
            observer.machine_made(vm)
        for step in vm.timeline.steps:
            vm.mark(step.name, "", step.seconds)
        return vm

    def _boot(self, machines: Sequence[VM]) -> None:
        """Boot machines, those of one hypervisor at the same time."""
        for loop in {id(vm.venue.loop): vm.venue.loop for vm in machines}.values():
            ours = [vm for vm in machines if vm.venue.loop is loop]
            loop.run(_all(vm.booted(None) for vm in ours))
        for vm in machines:
            self._began(vm)
            self.introduce(vm, but=machines)

    def introduce(self, vm: VM, but: Sequence[VM] = ()) -> None:
        """Tell all that are on a machine's networks its name, but for those that know it."""
        ours = {plug.network.name for plug in vm.plugs}
        for other in self.machines:
            theirs = {plug.network.name for plug in other.plugs}
            if other is not vm and other not in but and ours & theirs:
                other.run(other.meet())


def _growth(name: str, number: int) -> str:
    """The name of a promise: of the memory that a machine grew by at its growth of that number."""
    return f"{name} grown {number}"


async def _all(work: Iterable[Any]) -> None:
    """Do all of it at the same time; when one fails the others are cancelled, and it is raised."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _closed(loop: LoopThread, close: Callable[[], Any]) -> None:
    loop.run(close())


def _names(machines: int | Sequence[str]) -> list[str | None]:
    if isinstance(machines, int):
        if machines < 1:
            raise InvalidSpec([SpecProblem("machines", machines, "a number from 1, or names")])
        return [None] * machines
    return list(machines)


def _for_each(field: str, value: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    """One value for each machine, or a value for all."""
    if value is None or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise InvalidSpec(
            [SpecProblem(field, list(value), f"one for all, or one for each of {count}")]
        )
    return list(value)
