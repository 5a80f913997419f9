"""The software inside a simulated machine: it boots, prints, and answers the probe channel.

The probe channel carries JSON lines: `{"id": 1, "do": "vcpus"}` is answered by
`{"id": 1, "result": 2}` or `{"id": 1, "error": "text"}`. All that the guest says of its machine it
reads from the hardware; the specification is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from vmlab.hypervisors.simulated.clock import VIRTUAL_EPOCH

if TYPE_CHECKING:
    from vmlab.hypervisors.simulated.hardware import Hardware

PROBE: Final = "vmlab.probe"
"""The channel on which the guest answers."""
ECHO: Final = "vmlab.echo"
"""The channel on which the guest sends back what it receives."""
_MAX_READ: Final = 1 << 24


class GuestError(Exception):
    """The guest could not do what was asked; the text goes into the answer."""


@dataclass(slots=True)
class GuestState:
    """What the guest's software remembers; a memory snapshot holds a copy of it."""

    hostname: str = ""
    ignores_powerdown: bool = False
    typed: bytearray = field(default_factory=bytearray)
    screen: str = ""
    pressed: list[str] = field(default_factory=list)
    clock_offset: float = 0.0
    files: dict[str, bytes] = field(default_factory=dict)

    def copy(self) -> GuestState:
        """The same, independent."""
        return replace(
            self,
            typed=bytearray(self.typed),
            pressed=list(self.pressed),
            files=dict(self.files),
        )


class Guest:
    """The guest of one machine, while it is on."""

    def __init__(self, hardware: Hardware, state: GuestState | None = None) -> None:
        self.hardware = hardware
        self.state = state if state is not None else GuestState(hostname=hardware.name)

    def boot(self) -> None:
        """Come up: print what a kernel prints, and leave a mark in memory."""
        hardware = self.hardware
        boot = hardware.boots
        hardware.print(
            f"[    0.000000] Linux version 6.12.0-sim ({hardware.architecture}) boot {boot}\n"
            f"[    0.000000] Command line: console={hardware.architecture.console}"
            f"{' ' + hardware.cmdline if hardware.cmdline else ''}\n"
            f"[    0.000000] Memory: {hardware.ram.size // 1024}K\n"
            f"[    0.004000] smp: Brought up 1 node, {hardware.vcpus} CPUs\n"
            + "".join(
                f"[    0.008000] {disk.bus}: disk {disk.name}: {disk.size} bytes"
                f"{', read-only' if disk.readonly else ''}\n"
                for disk in hardware.disks.values()
            )
            + "".join(
                f"[    0.012000] net: {nic.name}: {nic.mac}, link {'up' if nic.link else 'down'}\n"
                for nic in hardware.nics.values()
            )
            + f"\n{self.state.hostname} login: "
        )
        # In the last page, out of the way of what tests write: a mixed-up memory shows.
        mark = f"{self.state.hostname}/{boot}/{hardware.id}".encode()
        hardware.ram.write(hardware.ram.size - len(mark), mark)

    def answer(self, line: bytes) -> tuple[bytes, float] | None:
        """The reply to one request and the seconds that it takes, or None where none comes."""
        identity: object = None
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise GuestError("a request is a JSON object")
            identity = request.get("id")
            do = _DO.get(str(request.get("do")))
            if do is None:
                raise GuestError(f"unknown request {request.get('do')!r}")
            before = self.hardware.disk_delay
            reply = {"id": identity, "result": do(self, request)}
            if do in _CHANGES:
                self.hardware.world.changed(self.hardware)
            delay = self.hardware.disk_delay - before
        except _Died:
            return None
        except (GuestError, ValueError, LookupError, TypeError) as error:
            text = f"no such thing: {error}" if isinstance(error, KeyError) else str(error)
            reply, delay = {"id": identity, "error": text}, 0.0
        return json.dumps(reply).encode() + b"\n", delay

    # The requests, one method each; `_DO` names them.

    def vcpus(self, _request: Mapping[str, Any]) -> int:
        return self.hardware.vcpus

    def memory(self, _request: Mapping[str, Any]) -> int:
        return self.hardware.visible_memory

    def architecture(self, _request: Mapping[str, Any]) -> str:
        return self.hardware.architecture.value

    def hostname(self, _request: Mapping[str, Any]) -> str:
        return self.state.hostname

    def disks(self, _request: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [
            {"name": disk.name, "size": disk.size, "readonly": disk.readonly, "bus": disk.bus}
            for disk in self.hardware.disks.values()
        ]

    def nics(self, _request: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [
            {"name": nic.name, "mac": nic.mac, "link": nic.link, "network": nic.network}
            for nic in self.hardware.nics.values()
        ]

    def nodes(self, _request: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"memory": memory, "cpus": list(cpus)} for memory, cpus in self.hardware.nodes]

    def pinning(self, _request: Mapping[str, Any]) -> dict[str, list[int]]:
        return {str(vcpu): list(cpus) for vcpu, cpus in sorted(self.hardware.pinning.items())}

    def read_memory(self, request: Mapping[str, Any]) -> str:
        length = _number(request, "length")
        return self.hardware.ram.read(_number(request, "offset"), length).hex()

    def write_memory(self, request: Mapping[str, Any]) -> bool:
        self.hardware.ram.write(_number(request, "offset"), _data(request))
        return True

    def read_disk(self, request: Mapping[str, Any]) -> str:
        length = _number(request, "length")
        return self.hardware.read_disk(
            str(request["disk"]), _number(request, "offset"), length
        ).hex()

    def write_disk(self, request: Mapping[str, Any]) -> bool:
        self.hardware.write_disk(str(request["disk"]), _number(request, "offset"), _data(request))
        return True

    def flush(self, request: Mapping[str, Any]) -> bool:
        self.hardware.flush_disk(str(request["disk"]))
        return True

    def ticks(self, _request: Mapping[str, Any]) -> int:
        return int(self.hardware.guest_time.seconds * 1000)

    def clock(self, _request: Mapping[str, Any]) -> float:
        hardware = self.hardware
        if hardware.deterministic:
            return VIRTUAL_EPOCH + hardware.guest_time.seconds + self.state.clock_offset
        return hardware.now() + self.state.clock_offset

    def entropy(self, _request: Mapping[str, Any]) -> str:
        return self.hardware.entropy(16).hex()

    def print(self, request: Mapping[str, Any]) -> bool:
        self.hardware.print(str(request["text"]))
        return True

    def typed(self, _request: Mapping[str, Any]) -> str:
        return self.state.typed.decode("utf-8", "replace")

    def show(self, request: Mapping[str, Any]) -> bool:
        if not self.hardware.spec.display:
            raise GuestError("the machine has no display")
        self.state.screen = str(request["text"])
        return True

    def pressed(self, _request: Mapping[str, Any]) -> list[str]:
        return list(self.state.pressed)

    def read_file(self, request: Mapping[str, Any]) -> str:
        return self.state.files[str(request["path"])].hex()

    def files(self, _request: Mapping[str, Any]) -> list[str]:
        return sorted(self.state.files)

    def poweroff(self, _request: Mapping[str, Any]) -> bool:
        self.hardware.power_off_soon()
        return True

    def panic(self, request: Mapping[str, Any]) -> bool:
        message = str(request.get("message", "asked to"))
        self.hardware.print(f"\nKernel panic - not syncing: {message}\n")
        self.hardware.die("guest-panic", f"Kernel panic - not syncing: {message}")
        raise _Died

    def ignore_powerdown(self, request: Mapping[str, Any]) -> bool:
        self.state.ignores_powerdown = bool(request.get("on", True))
        return True

    def send(self, request: Mapping[str, Any]) -> int:
        return self.hardware.send(str(request["nic"]), _data(request))

    def received(self, request: Mapping[str, Any]) -> list[str]:
        nic = self.hardware.nic(str(request["nic"]))
        frames = [frame.hex() for frame in nic.inbox]
        nic.inbox.clear()
        return frames


class _Died(Exception):
    """The guest died of the request and answers nothing."""


def _number(request: Mapping[str, Any], name: str) -> int:
    value = request[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise GuestError(f"{name} has to be a number from 0, not {value!r}")
    if name == "length" and value > _MAX_READ:
        raise GuestError(f"length has to be at most {_MAX_READ}, not {value!r}")
    return value


def _data(request: Mapping[str, Any]) -> bytes:
    try:
        return bytes.fromhex(str(request["data"]))
    except ValueError:
        raise GuestError("data has to be hexadecimal") from None


_DO: Final[Mapping[str, Callable[[Guest, Mapping[str, Any]], Any]]] = {
    handler.__name__: handler
    for handler in (
        Guest.vcpus,
        Guest.memory,
        Guest.architecture,
        Guest.hostname,
        Guest.disks,
        Guest.nics,
        Guest.nodes,
        Guest.pinning,
        Guest.read_memory,
        Guest.write_memory,
        Guest.read_disk,
        Guest.write_disk,
        Guest.flush,
        Guest.ticks,
        Guest.clock,
        Guest.entropy,
        Guest.print,
        Guest.typed,
        Guest.show,
        Guest.pressed,
        Guest.read_file,
        Guest.files,
        Guest.poweroff,
        Guest.panic,
        Guest.ignore_powerdown,
        Guest.send,
        Guest.received,
    )
}
_CHANGES: Final = frozenset(
    {
        Guest.write_memory,
        Guest.write_disk,
        Guest.flush,
        Guest.print,
        Guest.show,
        Guest.ignore_powerdown,
        Guest.send,
        Guest.received,
    }
)
"""Requests after which the machine is not what it was."""
