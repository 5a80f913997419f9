"""What only the engine has to tell in its own way: streams, NICs, executors, what is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from vmlab.hypervisors.base import NicInfo
from vmlab.hypervisors.monitored import readback
from vmlab.hypervisors.monitored.emulator import Emulator
from vmlab.hypervisors.monitored.names import nic_device
from vmlab.hypervisors.monitored.streams import channel_socket, console_socket
from vmlab.machine.metrics import MachineMetrics, NicMetrics
from vmlab.machine.spec import Nic


async def streams(emulator: Emulator) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the consoles and of the channels, each in the order of their names."""
    consoles, channels = [], []
    for chardev in await emulator.execute("query-chardev"):
        label, socket = chardev["label"], PurePath(chardev["filename"]).name
        if socket == console_socket(label):
            consoles.append(label)
        elif socket == channel_socket(label):
            channels.append(label)
    return tuple(sorted(consoles)), tuple(sorted(channels))


async def nics(emulator: Emulator, specified: Sequence[Nic]) -> list[NicInfo]:
    """The NICs that are there, with the ports that lead to them."""
    found = {each["name"]: each for each in await emulator.execute("x-query-networks")}
    return [
        NicInfo(
            name=nic.name,
            network=nic.network,
            mac=told["mac"],
            link=told["link"],
            forwards=tuple(
                (forward["protocol"], forward["host"], forward["guest"])
                for forward in told["forwards"]
            ),
        )
        for nic in specified
        if (told := found.get(nic_device(nic.name))) is not None
    ]


async def executor(emulator: Emulator) -> str:
    """Who executes the guest."""
    return str((await emulator.execute("x-query-execution"))["executor"])


async def metrics(emulator: Emulator, now: float) -> MachineMetrics:
    """What the machine uses."""
    used = await readback.metrics(emulator, now)
    execution = await emulator.execute("x-query-execution")
    networks = await emulator.execute("x-query-networks")
    cpu = used.cpu.model_copy(update={"instructions": execution["retired"]})
    return used.model_copy(
        update={
            "cpu": cpu,
            "nics": tuple(
                NicMetrics(
                    name=each["name"].removeprefix(nic_device("")),
                    received_bytes=each["received-bytes"],
                    sent_bytes=each["sent-bytes"],
                    received_packets=each["received"],
                    sent_packets=each["sent"],
                    dropped_packets=each["dropped"],
                )
                for each in networks
            ),
        }
    )
