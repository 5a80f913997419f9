"""One simulated machine's hardware: it exists and runs whether or not a hypervisor looks after it.

What a hypervisor reports (info, metrics, state) is read from here; so is all that the guest says.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Final

from vmlab.hypervisors.simulated.channels import Pipe, SimulatedChannel
from vmlab.hypervisors.simulated.disk import SimulatedDisk
from vmlab.hypervisors.simulated.guest import ECHO, PROBE, Guest, GuestError, GuestState
from vmlab.hypervisors.simulated.network import SimulatedNic, peers
from vmlab.hypervisors.simulated.sparse import Sparse
from vmlab.machine.errors import OperationFailed
from vmlab.machine.spec import MachineSpec

if TYPE_CHECKING:
    from vmlab.hypervisors.simulated.saved import SavedState
    from vmlab.hypervisors.simulated.world import World


class Power(StrEnum):
    """What the machine's power and processors do."""

    OFF = "off"
    RUNNING = "running"
    PAUSED = "paused"
    DEAD = "dead"


class Stopwatch:
    """Seconds that pass only while it runs."""

    __slots__ = ("_before", "_now", "_since")

    def __init__(self, now: Callable[[], float], seconds: float = 0.0) -> None:
        self._now = now
        self._before = seconds
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """What has passed so far."""
        running = self._now() - self._since if self._since is not None else 0.0
        return self._before + max(0.0, running)

    def run(self) -> None:
        """Go on; it may run already."""
        if self._since is None:
            self._since = self._now()

    def stand(self) -> None:
        """Stand still; it may do so already."""
        self._before, self._since = self.seconds, None

    def set(self, seconds: float) -> None:
        """Stand still at `seconds`."""
        self._before, self._since = seconds, None


BUSY: Final = 0.1
"""Share of its time that an idle simulated vCPU uses: it ticks and prints."""


class Hardware:
    """A machine as it stands in the simulated host.

    Args:
        world: The host.
        id_: The machine's id.
        spec: What it is built from; it is kept only to be handed to a hypervisor that adopts it.
    """

    def __init__(self, world: World, id_: str, spec: MachineSpec) -> None:
        self.world = world
        self.now = world.now
        self.id = id_
        self.spec = spec
        self.name = spec.name
        self.architecture = spec.architecture
        self.deterministic = spec.deterministic
        self.cmdline = spec.boot.cmdline
        self.seed = spec.seed
        self.vcpus = spec.cpus.count
        self.ram = Sparse(spec.memory.size)
        self.nodes = tuple((node.memory, node.cpus) for node in spec.memory.nodes)
        self.pinning = dict(spec.cpus.pinning)
        self.disks: dict[str, SimulatedDisk] = {}
        self.nics: dict[str, SimulatedNic] = {}
        self.consoles: dict[str, bytearray] = {
            console.name: bytearray() for console in spec.consoles
        }
        self.listeners: dict[str, list[Pipe]] = {name: [] for name in self.consoles}
        self.channels = tuple(spec.channels)
        self.snapshots: dict[str, SavedState] = {}
        self.power = Power.OFF
        self.cause = ""
        self.boots = 0
        self.booted_at = 0.0
        self.restored = False
        self.guest_time = Stopwatch(self.now)
        self.cpu_time = Stopwatch(self.now)
        self.stalled: dict[int, float] = {}
        self.stalled_seconds: dict[int, float] = {}
        self.balloon: int | None = None
        self.generation = 0
        self.draws = 0
        self.powerdown_asked = False
        self.disk_delay = 0.0
        self.guest = Guest(self)
        self.operations = 0
        self._open: list[SimulatedChannel] = []
        self._held: list[tuple[SimulatedChannel, bytes]] = []
        self._off_waiters: list[asyncio.Future[None]] = []
        self._deliveries: set[asyncio.TimerHandle] = set()

    # Power.

    @property
    def has_power(self) -> bool:
        """Whether it is on, running or paused."""
        return self.power in (Power.RUNNING, Power.PAUSED)

    @property
    def runs(self) -> bool:
        """Whether guest code runs: it is not paused, and the first vCPU is not stalled."""
        return self.power is Power.RUNNING and 0 not in self.stalled

    def boot(self, files: dict[str, bytes] | None = None) -> None:
        """Power on and come up, with empty memory; `files` are those of its shares."""
        self._forget_guest()
        self.ram.pages.clear()
        self.boots += 1
        self.booted_at = self.now()
        self.guest_time.set(0.0)
        self.cpu_time.set(0.0)
        self.stalled.clear()
        self.stalled_seconds.clear()
        self.generation += 1
        for disk in self.disks.values():
            disk.reset_counters()
        for nic in self.nics.values():
            nic.reset_counters()
            nic.inbox.clear()
        self.guest = Guest(self, GuestState(hostname=self.name, files=dict(files or {})))
        self.power, self.cause = Power.RUNNING, ""
        self._run()
        self.guest.boot()

    def pause(self) -> None:
        """Stop the vCPUs; nothing happens to one that is not running."""
        if self.power is Power.RUNNING:
            self.power = Power.PAUSED
            self._stand()

    def resume(self) -> None:
        """Let the vCPUs run on and answer what was asked meanwhile."""
        if self.power is Power.PAUSED:
            self.power = Power.RUNNING
            self._run()
            if self.powerdown_asked:
                self.ask_power_down()
            self.answer_held()

    def turn_off(self) -> None:
        """Off: memory is lost, but not what the guest wrote to its disks: the host has that."""
        self._end(Power.OFF, "")

    def power_off_soon(self) -> None:
        """The guest shuts itself down, as soon as it has answered."""
        asyncio.get_running_loop().call_soon(self._power_off_by_guest)

    def _power_off_by_guest(self) -> None:
        if self.has_power:
            self.print("\nreboot: Power down\n")
            self.turn_off()
            self.world.notice(self, "guest-shutdown", "the guest powered off")

    def die(self, event: str, reason: str) -> None:
        """The machine dies of itself or of a fault; its hypervisor notices unless it is down."""
        if self.has_power:
            self._end(Power.DEAD, reason)
            self.world.notice(self, event, reason)

    def cut_power(self, *, restart: bool) -> None:
        """Lose power: what was not flushed is gone."""
        if not self.has_power:
            return
        for disk in self.disks.values():
            disk.lose_power()
        if restart:
            files = self.guest.state.files
            self._end(Power.OFF, "")
            self.boot(files)
            self.world.notice(self, "guest-reset", "power cut")
        else:
            self.die("crashed", "power cut")

    def _end(self, power: Power, cause: str) -> None:
        self._stand()
        self.power, self.cause = power, cause
        self.powerdown_asked = False
        self.ram.pages.clear()
        for disk in self.disks.values():
            disk.flush_quietly()
        self.balloon = None
        self._forget_guest()
        for waiter in self._off_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._off_waiters.clear()

    def _run(self) -> None:
        self.guest_time.run()
        self.cpu_time.run()

    def _stand(self) -> None:
        self.guest_time.stand()
        self.cpu_time.stand()

    def ask_power_down(self) -> None:
        """Press the power button: a guest that runs shuts down, unless it ignores that."""
        self.powerdown_asked = True
        if self.power is Power.RUNNING and not self.guest.state.ignores_powerdown:
            self.print("\nreboot: Power down\n")
            self.turn_off()

    def withdraw_power_down(self) -> None:
        """Whoever pressed the button has given up; a guest that has not reacted never will."""
        self.powerdown_asked = False

    async def until_off(self) -> None:
        """Return when the machine has no power any more."""
        while self.has_power:
            waiter = asyncio.get_running_loop().create_future()
            self._off_waiters.append(waiter)
            await waiter

    # The guest's ends of things.

    def print(self, text: str, console: str | None = None) -> None:
        """The guest prints on a console, the first one unless named."""
        if not self.consoles:
            return
        name = console if console is not None else next(iter(self.consoles))
        data = text.encode()
        self.consoles[name] += data
        for pipe in self.listeners[name]:
            pipe.feed(data)
        self.world.printed(self, text)

    def type_on_console(self, name: str, data: bytes) -> None:
        """Somebody types; a running guest echoes it."""
        self.guest.state.typed += data
        self.print(data.decode("utf-8", "replace"), name)
        self.world.changed(self)

    def press(self, keys: Sequence[tuple[str, ...]]) -> None:
        """Somebody presses keys of the keyboard, each item's together."""
        self.guest.state.pressed += ["-".join(chord) for chord in keys]
        self.world.changed(self)

    def open_channel(self, name: str) -> SimulatedChannel:
        """A new connection to one of the channels of a machine that is on."""
        channel = SimulatedChannel(name, self.name, self._asked, self._closed)
        self._open.append(channel)
        return channel

    def _closed(self, channel: SimulatedChannel) -> None:
        if channel in self._open:
            self._open.remove(channel)

    def _asked(self, channel: SimulatedChannel, data: bytes) -> None:
        """Bytes arrive on a channel; on the probe's, each full line is a request."""
        if channel.name == ECHO:
            self._held.append((channel, data))
            self.answer_held()
        if channel.name != PROBE:
            return
        *lines, channel.unfinished = (channel.unfinished + data).split(b"\n")
        self._held.extend((channel, line) for line in lines if line.strip())
        self.answer_held()

    def answer_held(self) -> None:
        """Answer what was asked, in its order, as long as guest code runs."""
        while self._held and self.runs:
            channel, line = self._held.pop(0)
            if channel.name == ECHO:
                channel.pipe.feed(line)
                continue
            answer = self.guest.answer(line)
            if answer is None:
                continue
            reply, delay = answer
            if delay > 0:
                self._later(delay, partial(channel.pipe.feed, reply))
            else:
                channel.pipe.feed(reply)

    def _later(self, delay: float, action: Callable[[], None]) -> None:
        def due() -> None:
            self._deliveries.discard(handle)
            action()

        handle = asyncio.get_running_loop().call_later(delay, due)
        self._deliveries.add(handle)

    def _forget_guest(self) -> None:
        """The guest is gone: its channels end, what was asked of it is not answered."""
        self._held.clear()
        for handle in self._deliveries:
            handle.cancel()
        self._deliveries.clear()
        for channel in self._open:
            channel.pipe.end()
        self._open.clear()

    def drop_requests(self) -> None:
        """The guest is another one now (restored): what was asked of the old one is void."""
        self._held.clear()

    def retire(self) -> None:
        """The machine is gone from this host: all that is open ends."""
        self._end(Power.OFF, "")
        for pipes in self.listeners.values():
            for pipe in pipes:
                pipe.end()
            pipes.clear()

    def entropy(self, length: int) -> bytes:
        """Random bytes that no other machine and no other generation of this one gets."""
        self.draws += 1
        return self.world.chances.raw(
            length, "entropy", self.seed, self.id, self.generation, self.draws
        )

    def become_itself(self) -> None:
        """A copy of a running machine learns that it is another one: its name is its own."""
        if self.has_power:
            self.guest.state.hostname = self.name
            self.print(f"\nclone: this is {self.name} now\n")

    # Memory, disks, NICs.

    @property
    def visible_memory(self) -> int:
        """Bytes that the guest has: less when a balloon is inflated."""
        return self.ram.size if self.balloon is None else min(self.balloon, self.ram.size)

    def disk(self, name: str) -> SimulatedDisk:
        """The disk of that name, for the guest (GuestError)."""
        disk = self.disks.get(name)
        if disk is None:
            raise GuestError(f"no disk {name!r}; there are {', '.join(self.disks) or 'none'}")
        return disk

    def nic(self, name: str) -> SimulatedNic:
        """The NIC of that name, for the guest (GuestError)."""
        nic = self.nics.get(name)
        if nic is None:
            raise GuestError(f"no NIC {name!r}; there are {', '.join(self.nics) or 'none'}")
        return nic

    def read_disk(self, name: str, offset: int, length: int) -> bytes:
        """A read request of the guest's."""
        disk = self.disk(name)
        self._meet_disk_faults(disk, "read")
        return disk.read(offset, length)

    def write_disk(self, name: str, offset: int, data: bytes) -> None:
        """A write request of the guest's."""
        disk = self.disk(name)
        if disk.readonly:
            raise GuestError(f"{_errno_text('EROFS')}: disk {name!r} is read-only")
        keep = self._meet_disk_faults(disk, "write")
        disk.write(offset, data, keep)

    def flush_disk(self, name: str) -> None:
        """A flush request of the guest's."""
        disk = self.disk(name)
        self._meet_disk_faults(disk, "flush")
        disk.flush()

    def _meet_disk_faults(self, disk: SimulatedDisk, operation: str) -> int | None:
        """What faults make of a request: an error, a delay, or a torn write's bytes."""
        mishap = self.world.faults.disk_request(self, disk.name, operation)
        self.disk_delay += mishap.delay
        if mishap.errno is not None:
            disk.errors += 1
            raise GuestError(f"{_errno_text(mishap.errno)}: {operation} of disk {disk.name!r}")
        return mishap.keep

    def send(self, name: str, frame: bytes) -> int:
        """The guest sends a frame; returns how many NICs it was sent to."""
        nic = self.nic(name)
        if not nic.link:
            nic.dropped_packets += 1
            return 0
        nic.sent_packets += 1
        nic.sent_bytes += len(frame)
        reached = 0
        out = self.world.faults.packet(self, nic.name)
        if out.lost:
            nic.dropped_packets += 1
            return 0
        for machine, other in peers(self.world.powered, self, nic):
            into = self.world.faults.packet(machine, other.name)
            if into.lost:
                other.dropped_packets += 1
                continue
            reached += 1
            delay = out.delay + into.delay
            if delay > 0:
                machine._later(delay, partial(other.deliver, frame))
            else:
                other.deliver(frame)
        return reached

    def stall(self, vcpu: int) -> None:
        """One vCPU stands still."""
        self.stalled.setdefault(vcpu, self.cpu_time.seconds)

    def unstall(self, vcpu: int) -> None:
        """A vCPU runs on."""
        since = self.stalled.pop(vcpu, None)
        if since is not None:
            lost = self.cpu_time.seconds - since
            self.stalled_seconds[vcpu] = self.stalled_seconds.get(vcpu, 0.0) + lost
            self.answer_held()

    def vcpu_seconds(self, vcpu: int) -> float:
        """CPU time of one vCPU since the machine was started."""
        ran = self.cpu_time.seconds
        still = self.stalled_seconds.get(vcpu, 0.0)
        if vcpu in self.stalled:
            still += ran - self.stalled[vcpu]
        return max(0.0, ran - still) * BUSY

    def require_shares_read(self) -> dict[str, bytes]:
        """The files of the directories that are copied into the guest at start, by guest path.

        Raises:
            OperationFailed: one of them cannot be read.
        """
        files: dict[str, bytes] = {}
        for share in self.spec.shares:
            if not share.source.is_dir():
                raise OperationFailed(
                    f"shares.{share.tag}.source = {str(share.source)!r} is not a directory",
                    hint="make the directory, or correct the path",
                    machine=self.name,
                )
            for path in sorted(share.source.rglob("*")):
                if path.is_file():
                    inside = path.relative_to(share.source).as_posix()
                    files[f"{share.target.rstrip('/')}/{inside}"] = path.read_bytes()
        return files


def _errno_text(name: str) -> str:
    return f"{name} ({os.strerror(getattr(errno, name))})"
