"""The machine file of an engine process: TOML, one table for each part.

It says what to build, down to the sockets; what a machine should be like, and on which hypervisor,
is a MachineSpec's to say. Relative paths are seen from the file.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final

from vmlab.engine.structures import WrongData, as_json, described, structure
from vmlab.machine.errors import InvalidSpec, SpecProblem, VmlabError

_HINT: Final = "`python -m vmlab.engine --fields` prints every field with its type"
_SERIAL_BYTES: Final = {"virtio": 20, "scsi": 36}
"""What GET_ID (virtio 1.2, 5.2.6) and a SCSI disk's vital product data have room for."""


class ImageFormat(Enum):
    """How a disk lies in its file."""

    RAW = "raw"
    QCOW2 = "qcow2"


class DiskBus(Enum):
    """Which device shows a disk."""

    VIRTIO = "virtio"
    SCSI = "scsi"


class Execution(Enum):
    """Who executes the guest."""

    INTERPRETER = "interpreter"
    REFERENCE = "reference"


class SegmentKind(Enum):
    """What a NIC is plugged into."""

    NONE = "none"
    STREAM_SERVER = "stream-server"
    STREAM_CLIENT = "stream-client"
    DATAGRAM = "datagram"
    MULTICAST = "multicast"
    TAP = "tap"
    USER = "user"


@dataclass(frozen=True)
class Boot:
    """What the guest begins with; a kernel, firmware, or both."""

    kernel: str | None = None
    initrd: str | None = None
    cmdline: str = ""
    firmware: str | None = None


@dataclass(frozen=True)
class SocketPort:
    """A console or a channel: the socket that one client may come to, and a log of its output."""

    socket: str
    name: str = ""
    log: str | None = None


@dataclass(frozen=True)
class DiskFile:
    """A disk and the file that it lies in.

    Attributes:
        name: Of its block node.
        serial: What the guest finds it by; its name if left out.
        device: Id of its device; the name of the node if left out.
    """

    name: str
    file: str
    format: ImageFormat = ImageFormat.RAW
    read_only: bool = False
    serial: str = ""
    bus: DiskBus = DiskBus.VIRTIO
    device: str = ""


@dataclass(frozen=True)
class Forward:
    """A port of the host that leads into the guest, by a user network; host port 0: a free one."""

    guest: int
    host: int = 0
    address: str = "127.0.0.1"
    protocol: str = "tcp"


@dataclass(frozen=True)
class Nic:
    """A NIC and what it is plugged into.

    Attributes:
        mac: As six pairs of hexadecimal digits with colons between them.
        path: Of the segment's socket; of a multicast segment, its group ("239.1.2.3:20000"); or
            the name of a TAP device.
        peer: Of a datagram segment, the other end's socket.
        forwards: Of a user network.
    """

    name: str
    mac: str
    segment: SegmentKind = SegmentKind.NONE
    path: str = ""
    peer: str = ""
    forwards: list[Forward] = field(default_factory=list)


class TimeMode(Enum):
    """What the machine's time is made of."""

    HOST = "host"
    DETERMINISTIC = "deterministic"


class Idle(Enum):
    """What happens to deterministic time while all harts wait for an interrupt."""

    SKIP = "skip"
    WAIT = "wait"


@dataclass(frozen=True)
class Time:
    """The machine's time.

    Attributes:
        mode: The host's clock, or the number of instructions that all harts together have retired.
            What follows is for the latter.
        instructions_per_tick: Of the 10 MHz clock; 10 makes a machine of 100 million instructions
            in a second of its own.
        epoch: The time of day at power-on, in seconds since 1970-01-01 UTC.
        idle: Skip to the next event at once, or let as much of the host's time pass.
    """

    mode: TimeMode = TimeMode.HOST
    instructions_per_tick: int = 10
    epoch: int = 1_767_225_600  # 2026-01-01
    idle: Idle = Idle.SKIP


@dataclass(frozen=True)
class Gdb:
    """The socket that a debugger may come to."""

    socket: str


@dataclass(frozen=True)
class Configuration:
    """All of a machine.

    Attributes:
        name: For messages.
        memory: Bytes; whole pages of 4096.
        qmp: The monitor's socket.
        harts: How many.
        boot: What the guest begins with.
        serial: The UART's socket and log.
        consoles: virtio consoles (hvc0 and up).
        channels: virtio ports, which guests find by name.
        disks: In the order of their slots.
        nics: In the order of their slots.
        execution: Who executes the guest.
        paused: Whether to wait for `cont` before the first instruction.
        scsi: Whether there is a SCSI host, to which disks can be plugged.
        no_reboot: Whether a restart that the guest asks for ends the process.
        no_shutdown: Whether the process stays when the guest has powered off, until it is told to
            quit.
        time: What time is made of.
        gdb: Where GDB may come to.
        seed: What all randomness that the guest is given comes from; without it, the host's, or 0
            where time is deterministic. Whoever knows it knows the guest's keys.
    """

    name: str
    memory: int
    qmp: str
    harts: int = 1
    boot: Boot = field(default_factory=Boot)
    serial: SocketPort | None = None
    consoles: list[SocketPort] = field(default_factory=list)
    channels: list[SocketPort] = field(default_factory=list)
    disks: list[DiskFile] = field(default_factory=list)
    nics: list[Nic] = field(default_factory=list)
    execution: Execution = Execution.INTERPRETER
    paused: bool = False
    scsi: bool = True
    no_reboot: bool = False
    no_shutdown: bool = False
    time: Time = field(default_factory=Time)
    seed: int | None = None
    gdb: Gdb | None = None


def load(path: Path) -> Configuration:
    """Read a machine file.

    Raises:
        InvalidSpec: it cannot be read, is no TOML, or something in it is wrong.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        made = structure(Configuration, data)
    except (OSError, UnicodeDecodeError) as error:
        problem = SpecProblem("file", str(path), f"a text file that can be read ({error})")
        raise InvalidSpec([problem], source=str(path), hint="check the path") from None
    except tomllib.TOMLDecodeError as error:
        problem = SpecProblem("document", str(path), f"valid TOML ({error})")
        raise InvalidSpec([problem], source=str(path), hint="mend the TOML") from None
    except WrongData as error:
        problem = SpecProblem(error.path, error.value, error.expected)
        raise InvalidSpec([problem], source=str(path), hint=_HINT) from None
    if problems := list(problems_of(made)):
        raise InvalidSpec(problems, source=str(path), hint=_HINT)
    return _seen_from(path.absolute().parent, made)


def problems_of(made: Configuration) -> Iterator[SpecProblem]:
    """What cannot work in a configuration whose types are right."""
    for name, value, least in (("memory", made.memory, 1 << 20), ("harts", made.harts, 1)):
        if value < least:
            yield SpecProblem(name, value, f"at least {least}")
    if made.memory % 4096:
        yield SpecProblem("memory", made.memory, "a multiple of 4096 bytes")
    for name, value, least, limit in (
        ("time.instructions-per-tick", made.time.instructions_per_tick, 1, 1 << 20),
        ("time.epoch", made.time.epoch, 0, 1 << 33),
        ("seed", made.seed or 0, 0, 1 << 64),
    ):
        if not least <= value < limit:
            yield SpecProblem(name, value, f"from {least} to {limit - 1}")
    if not made.qmp:
        yield SpecProblem("qmp", made.qmp, "the path of a socket")
    for kind, names in (
        ("disks", [disk.name for disk in made.disks]),
        ("nics", [nic.name for nic in made.nics]),
        ("channels", [channel.name for channel in made.channels]),
    ):
        yield from _wrong_names(kind, names)
    for index, disk in enumerate(made.disks):
        room = _SERIAL_BYTES[disk.bus.value]
        if len(disk.serial.encode()) > room:
            yield SpecProblem(f"disks[{index}].serial", disk.serial, f"at most {room} bytes")
    for index, nic in enumerate(made.nics):
        yield from _wrong_with(nic, f"nics[{index}].")


def _wrong_names(kind: str, names: Iterable[str]) -> Iterator[SpecProblem]:
    for name, count in Counter(names).items():
        if not name:
            yield SpecProblem(f"{kind}.name", name, "a name")
        elif count > 1:
            yield SpecProblem(
                f"{kind}.name", name, f"a name of its own for each; {count} have this one"
            )


def _wrong_with(nic: Nic, place: str) -> Iterator[SpecProblem]:
    """What a NIC lacks, or has without a use for it."""
    kind = nic.segment
    if kind not in (SegmentKind.NONE, SegmentKind.USER) and not nic.path:
        yield SpecProblem(
            f"{place}path",
            nic.path,
            f"what a {kind.value} segment is found by: a path, a group or a tap",
        )
    if kind is SegmentKind.DATAGRAM and not nic.peer:
        yield SpecProblem(f"{place}peer", nic.peer, "the socket of a datagram segment's other end")
    if nic.forwards and kind is not SegmentKind.USER:
        ports = [forward.guest for forward in nic.forwards]
        yield SpecProblem(f"{place}forwards", ports, "none: only a user network has forwards")


def fields_text() -> str:
    """Every field of a machine file with its type, one a line."""
    return "\n".join(described(Configuration))


def text_of(made: Configuration) -> str:
    """The machine file that `load` reads as this configuration.

    Raises:
        UnicodeEncodeError: a path is no text.
    """
    lines: list[str] = []
    _add_table(lines, "", as_json(made))
    text = "\n".join(lines) + "\n"
    text.encode()
    return text


def _add_table(lines: list[str], path: str, table: Mapping[str, Any]) -> None:
    """The values of a table, and then the tables in it (TOML 1.0)."""
    inner = {key: value for key, value in table.items() if _holds_tables(value)}
    lines += [f"{key} = {_value(value)}" for key, value in table.items() if key not in inner]
    for key, value in inner.items():
        name = f"{path}{key}"
        for each in value if isinstance(value, list) else [value]:
            lines += ["", f"[[{name}]]" if isinstance(value, list) else f"[{name}]"]
            _add_table(lines, f"{name}.", each)


def _holds_tables(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value))


def _value(value: object) -> str:
    # What JSON escapes TOML reads the same, but for DEL, which it does not allow as it stands.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _seen_from(folder: Path, made: Configuration) -> Configuration:
    """The same with all paths absolute."""

    def at(path: str | None) -> str | None:
        return str(folder / path) if path else None

    def port(one: SocketPort) -> SocketPort:
        return replace(one, socket=str(folder / one.socket), log=at(one.log))

    boot = made.boot
    boot = replace(boot, kernel=at(boot.kernel), initrd=at(boot.initrd), firmware=at(boot.firmware))
    elsewhere = (SegmentKind.TAP, SegmentKind.MULTICAST)
    return replace(
        made,
        qmp=str(folder / made.qmp),
        boot=boot,
        serial=port(made.serial) if made.serial is not None else None,
        gdb=Gdb(str(folder / made.gdb.socket)) if made.gdb is not None else None,
        consoles=[port(one) for one in made.consoles],
        channels=[port(one) for one in made.channels],
        disks=[replace(one, file=str(folder / one.file)) for one in made.disks],
        nics=[
            one
            if one.segment in elsewhere
            else replace(one, path=at(one.path) or "", peer=at(one.peer) or "")
            for one in made.nics
        ],
    )


def mac_address(nic: Nic) -> bytes:
    """The six bytes of a NIC's address.

    Raises:
        VmlabError: it is none.
    """
    try:
        address = bytes.fromhex(nic.mac.replace(":", ""))
    except ValueError:
        address = b""
    if len(address) != 6 or address[0] & 1:
        raise VmlabError(
            f"{nic.mac!r} is no address for the NIC {nic.name!r}",
            hint='six bytes such as "52:54:00:12:34:56", the first one even',
        )
    return address
