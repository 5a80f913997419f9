"""Hypervisors that declare, refuse, report or carry the wrong thing."""

from __future__ import annotations

from contextlib import suppress
from itertools import count
from typing import Any, ClassVar

from mutants.base import PROFILE, BrokenHypervisor, BrokenMachine, mutant
from vmlab.hypervisors.base import Channel, Console, MachineInfo
from vmlab.hypervisors.operation import Operation
from vmlab.hypervisors.simulated.channels import SimulatedChannel, SimulatedConsole
from vmlab.machine.capabilities import Capabilities, Capability
from vmlab.machine.errors import (
    InvalidState,
    MachineExists,
    OperationFailed,
    ResourceExhausted,
    ResourceNotFound,
)
from vmlab.machine.faults import (
    At,
    Chance,
    ClockJump,
    Fault,
    FaultKind,
    KillFault,
    Nth,
)
from vmlab.machine.metrics import MachineMetrics
from vmlab.machine.sizes import GIB
from vmlab.machine.spec import MachineSpec
from vmlab.machine.states import MachineState

S = MachineState


class _Undeclares(BrokenHypervisor):
    hidden: ClassVar[Capability]

    async def capabilities(self) -> Capabilities:
        return (await super().capabilities()).without(self.hidden)


def due_without(capability: Capability) -> frozenset[Capability]:
    """What a profile lists as due, less one."""
    return PROFILE.must_declare - {capability}


@mutant("capability.required")
class DeclaresLess(_Undeclares):
    """Does not declare that it copies directories into guests."""

    hidden = Capability.SHARE_COPY


@mutant("capability.consistent")
class ChangesItsMind(BrokenHypervisor):
    """Answers a question for its capabilities differently each time."""

    async def capabilities(self) -> Capabilities:
        self.asked = getattr(self, "asked", 0) + 1
        return (await super().capabilities()).model_copy(update={"version": str(self.asked)})


class _FailsToPin(BrokenMachine):
    async def pin(self, *arguments: Any, **options: Any) -> None:
        raise OperationFailed("pinning is not possible", machine=self.name)


@mutant("capability.undeclared", must_declare=due_without(Capability.PINNING))
class FailsInsteadOfRefusing(_Undeclares):
    """Tries what it does not declare, and fails."""

    hidden = Capability.PINNING
    machine_class = _FailsToPin


@mutant("capability.unsupported-spec")
class IgnoresDevices(BrokenHypervisor):
    """Makes a machine without the GPU that was asked for."""

    async def create(self, spec: Any, **options: Any) -> Any:
        if isinstance(spec, MachineSpec) and spec.host_devices:
            spec = spec.with_changes(host_devices=())
        return await super().create(spec, **options)


@mutant("errors.invalid-spec")
class AcceptsEmptySpec(BrokenHypervisor):
    """Makes a machine of an empty specification."""

    async def create(self, spec: Any, **options: Any) -> Any:
        if spec == {}:
            spec = MachineSpec.of(name="nobody-asked")
        return await super().create(spec, **options)


@mutant("errors.unknown-machine")
class FindsTheDeleted(BrokenHypervisor):
    """Finds deleted machines by their id."""

    def forget(self, machine: Any) -> None:
        super().forget(machine)
        self.graves = {**getattr(self, "graves", {}), machine.id: machine}

    async def get(self, name: str) -> Any:
        return getattr(self, "graves", {}).get(name) or await super().get(name)


@mutant("errors.limits")
class LeavesOut(BrokenHypervisor):
    """Makes a machine with as many NICs as it can of those that were asked for."""

    async def create(self, spec: Any, **options: Any) -> Any:
        try:
            return await super().create(spec, **options)
        except ResourceExhausted:
            limit = (await self.capabilities()).limits.nics_per_machine
            if limit is None or len(spec.nics) <= limit:
                raise
            return await super().create(spec.with_changes(nics=spec.nics[:limit]), **options)


@mutant("errors.duplicate-name")
class NamesNobody(BrokenHypervisor):
    """Does not say which machine has the name."""

    async def create(self, spec: Any, **options: Any) -> Any:
        try:
            return await super().create(spec, **options)
        except MachineExists as error:
            error.machine = None
            raise


@mutant("errors.duplicate-name", only=False)
class AllowsDuplicates(BrokenHypervisor):
    """Makes several machines of one name."""

    def require_free(self, name: str, *, operation: str) -> None:
        with suppress(MachineExists):
            super().require_free(name, operation=operation)


@mutant("errors.unknown-part")
class UnplugsNothing(BrokenMachine):
    """Says that it has unplugged a disk that there never was."""

    async def unplug_disk(self, name: str, **options: Any) -> None:
        with suppress(ResourceNotFound):
            await super().unplug_disk(name, **options)


@mutant("errors.invalid-part")
class TakesAnyTime(BrokenMachine):
    """Takes a negative timeout for none."""

    async def start(self, *, timeout: float | None = None) -> None:
        await super().start(timeout=None if timeout is not None and timeout < 0 else timeout)


@mutant("errors.tell")
class GivesNoHint(BrokenMachine):
    """Gives no hint when a stop is refused."""

    async def stop(self, **options: Any) -> None:
        try:
            await super().stop(**options)
        except InvalidState as error:
            error.hint = None
            raise


class MadeLarge(BrokenMachine):
    """Knows whether it was made with much memory, rather than given it later."""

    large = False

    async def _do_create(self, operation: Operation) -> None:
        await super()._do_create(operation)
        self.large = self.spec.memory.size >= GIB


@mutant("configuration.info")
class RoundsDown(MadeLarge):
    """Tells of a machine made large that it has less memory than it has."""

    async def _do_info(self) -> MachineInfo:
        told = await super()._do_info()
        less = told.memory - (told.memory >> 4)
        return told.model_copy(update={"memory": less}) if self.large else told


@mutant("configuration.guest")
class TellsTheSpecification(MadeLarge):
    """Gives machines made large a vCPU less, and answers info from the specification."""

    async def _do_start(self, operation: Operation) -> None:
        await super()._do_start(operation)
        if self.large:
            self.hardware.vcpus = max(1, self.spec.cpus.count - 1)

    async def info(self, **options: Any) -> MachineInfo:
        told = await super().info(**options)
        return told.model_copy(update={"vcpus": self.spec.cpus.count})


@mutant("configuration.given-mac")
class InventsAddresses(BrokenMachine):
    """Does not give a NIC the MAC address that was asked for."""

    async def _do_create(self, operation: Operation) -> None:
        await super()._do_create(operation)
        for nic in self.spec.nics:
            if nic.mac is not None:
                self.hardware.nics[nic.name].mac = "52:54:00:00:00:02"


@mutant("configuration.read-only")
class WritesReadOnly(BrokenMachine):
    """Lets the guest write to a disk that is read-only."""

    async def _do_start(self, operation: Operation) -> None:
        await super()._do_start(operation)
        for disk in self.hardware.disks.values():
            disk.readonly = False


@mutant("configuration.numa")
class SwapsNodes(BrokenMachine):
    """Mixes up the NUMA nodes."""

    async def _do_create(self, operation: Operation) -> None:
        await super()._do_create(operation)
        self.hardware.nodes = self.hardware.nodes[::-1]


@mutant("configuration.pinning")
class PinsForEver(BrokenMachine):
    """Does not let vCPUs float again."""

    async def _do_pin(self, operation: Operation, pinning: Any) -> None:
        if pinning:
            await super()._do_pin(operation, pinning)


class _DeafConsole(SimulatedConsole):
    async def write(self, data: bytes) -> None:
        await super().write(data.decode().encode("ascii", "ignore"))


@mutant("console.input")
class AsciiOnly(BrokenMachine):
    """Leaves out of what is typed all that is no ASCII."""

    async def _do_console(self, name: str) -> Console:
        console = await super()._do_console(name)
        console.__class__ = _DeafConsole
        return console


@mutant("console.live")
class SilentConsole(BrokenMachine):
    """Opens consoles on which nothing appears."""

    async def _do_console(self, name: str) -> Console:
        console = await super()._do_console(name)
        assert isinstance(console, SimulatedConsole)
        self.hardware.listeners[name].remove(console.pipe)
        return console


@mutant("console.log")
class ForgetsLog(BrokenMachine):
    """Forgets what was printed when a machine is restarted."""

    async def restart(self, **options: Any) -> None:
        await super().restart(**options)
        for text in self.hardware.consoles.values():
            text.clear()


class _TextChannel(SimulatedChannel):
    async def write(self, data: bytes) -> None:
        await super().write(data.replace(b"\r\n", b"\n"))


class _EndlessChannel(SimulatedChannel):
    async def write(self, data: bytes) -> None:
        if not self.pipe.ended:
            await super().write(data)


@mutant("channel.bytes")
class TextChannels(BrokenMachine):
    """Changes the ends of lines on channels."""

    async def _do_channel(self, name: str) -> Channel:
        channel = await super()._do_channel(name)
        channel.__class__ = _TextChannel
        return channel


@mutant("channel.end")
class EndlessChannels(BrokenMachine):
    """Takes what is written to a guest that is gone."""

    async def _do_channel(self, name: str) -> Channel:
        channel = await super()._do_channel(name)
        channel.__class__ = _EndlessChannel
        return channel


@mutant("events.follow")
class SkipsForFollowers(BrokenHypervisor):
    """Does not give some events to those who follow from now on."""

    def subscribe(self, since: int | None = None) -> Any:
        every = super().subscribe(since)

        async def some() -> Any:
            async for event in every:
                if since is not None or event.sequence % 5:
                    yield event

        return some()


@mutant("metrics.present")
class MeasuresNoNetwork(BrokenMachine):
    """Has no metrics of NICs."""

    async def metrics(self, **options: Any) -> MachineMetrics:
        return (await super().metrics(**options)).model_copy(update={"nics": ()})


@mutant("metrics.rise")
class MeasuresInBlocks(BrokenMachine):
    """Counts what is written in blocks and calls them bytes."""

    async def metrics(self, **options: Any) -> MachineMetrics:
        usage = await super().metrics(**options)
        disks = tuple(
            disk.model_copy(update={"written_bytes": disk.written_bytes // 512})
            for disk in usage.disks
        )
        return usage.model_copy(update={"disks": disks})


@mutant("metrics.paused")
class BurnsWhilePaused(BrokenMachine):
    """Counts CPU time of a paused machine as if it ran."""

    async def metrics(self, **options: Any) -> MachineMetrics:
        usage = await super().metrics(**options)
        if self.state is not S.PAUSED:
            return usage
        cpu = usage.cpu.model_copy(update={"seconds": usage.uptime_seconds})
        return usage.model_copy(update={"cpu": cpu})


@mutant("share.seen")
class ChangesFiles(BrokenMachine):
    """Changes bytes of shared files."""

    async def _do_start(self, operation: Operation) -> None:
        await super()._do_start(operation)
        files = self.hardware.guest.state.files
        for path, data in files.items():
            files[path] = data.replace(b"\0", b" ")


class _IgnoresFault(BrokenMachine):
    kind: ClassVar[FaultKind]
    numbers: ClassVar[Any] = count(1)

    async def _do_inject(self, operation: Operation, fault: Fault) -> str:
        if fault.kind is self.kind:
            return f"ignored-{next(self.numbers)}"
        return await super()._do_inject(operation, fault)

    async def _do_clear_fault(self, operation: Operation, fault: str) -> None:
        if not fault.startswith("ignored-"):
            await super()._do_clear_fault(operation, fault)


@mutant("fault.disks")
class CorruptsNothing(_IgnoresFault):
    """Takes an order to corrupt a disk, and does not."""

    kind = FaultKind.DISK_CORRUPT


@mutant("fault.disks")
class TearsNothing(_IgnoresFault):
    """Takes an order to tear writes, and does not."""

    kind = FaultKind.DISK_TORN_WRITE


@mutant("fault.disks")
class SlowsNothing(_IgnoresFault):
    """Takes an order to slow a disk down, and does not."""

    kind = FaultKind.DISK_SLOW


@mutant("fault.network")
class LosesNothing(_IgnoresFault):
    """Takes an order to lose packets, and does not."""

    kind = FaultKind.NET_LOSS


@mutant("fault.machine")
class KeepsWhatWasNotFlushed(BrokenMachine):
    """Cuts the power of a machine whose disks have lost nothing."""

    async def _do_inject(self, operation: Operation, fault: Fault) -> str:
        if fault.kind is FaultKind.POWER_CUT:
            fault = KillFault()
        return await super()._do_inject(operation, fault)


@mutant("fault.guest")
class StallsNothing(_IgnoresFault):
    """Takes an order to stall a vCPU, and does not."""

    kind = FaultKind.CPU_STALL


@mutant("fault.network")
class DelaysNothing(_IgnoresFault):
    """Takes an order to delay packets, and does not."""

    kind = FaultKind.NET_DELAY


@mutant("fault.machine")
class CutsNoPower(_IgnoresFault):
    """Takes an order to cut the power, and does not."""

    kind = FaultKind.POWER_CUT


@mutant("fault.guest")
class TurnsNoClock(_IgnoresFault):
    """Takes an order to set the guest's clock, and does not."""

    kind = FaultKind.CLOCK_JUMP


@mutant("fault.operations")
class HangsNothing(_IgnoresFault):
    """Takes an order to let an operation hang, and does not."""

    kind = FaultKind.OPERATION_HANG


@mutant("fault.hypervisor")
class AnswersTheTruth(_IgnoresFault):
    """Takes an order to give stale answers, and does not."""

    kind = FaultKind.STALE_STATUS


@mutant("fault.triggers")
class StrikesEarly(BrokenMachine):
    """Lets a fault strike one occasion too early."""

    async def _do_inject(self, operation: Operation, fault: Fault) -> str:
        if isinstance(fault.when, Nth) and fault.when.n > 1:
            fault = fault.model_copy(update={"when": Nth(n=fault.when.n - 1)})
        return await super()._do_inject(operation, fault)


@mutant("fault.triggers")
class LeavesNothingToChance(BrokenMachine):
    """Has each occasion struck where some of them should be."""

    async def _do_inject(self, operation: Operation, fault: Fault) -> str:
        if isinstance(fault.when, Chance):
            fault = fault.model_copy(update={"when": At(seconds=0)})
        return await super()._do_inject(operation, fault)


class _InjectsAnyway(BrokenMachine):
    async def inject(self, fault: Fault, **options: Any) -> str:
        if isinstance(fault, ClockJump):
            return "clock-jump"
        return await super().inject(fault, **options)


@mutant("fault.undeclared")
class InjectsUndeclared(BrokenHypervisor):
    """Takes a fault of a kind that it does not declare."""

    machine_class = _InjectsAnyway

    async def capabilities(self) -> Capabilities:
        declared = await super().capabilities()
        return declared.model_copy(update={"faults": declared.faults - {FaultKind.CLOCK_JUMP}})
