"""MachineSpec: what a machine is made of, the same for every hypervisor.

Read from TOML, JSON or Python. A specification says what is wanted; what a hypervisor cannot do
with it is found by `vmlab.machine.fit` before anything is created.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from vmlab.machine.architecture import Architecture, host_architecture, parse_architecture
from vmlab.machine.documents import build, parse_document, read_document
from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.sizes import MIB, Size, format_size

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
NAME_RULE = "1 to 63 letters, digits, '.', '_' or '-', the first one a letter or a digit"
NAME = re.compile(NAME_PATTERN)
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def is_name(value: object) -> bool:
    """Whether `value` is a name as NAME_RULE says."""
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _check_name(value: object) -> object:
    if not is_name(value):
        raise ValueError(NAME_RULE)
    return value


Name = Annotated[
    str,
    BeforeValidator(_check_name),
    WithJsonSchema({"type": "string", "pattern": NAME_PATTERN}),
]
"""A name of a machine or of one of its parts: safe in a path, a host name and a QEMU id."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cpus(_Part):
    """The vCPUs: `cpus = 2` is short for `cpus.count = 2`."""

    count: int = Field(1, ge=1, le=4096, description="vCPUs")
    sockets: int | None = Field(None, ge=1)
    cores: int | None = Field(None, ge=1, description="cores of each socket")
    threads: int | None = Field(None, ge=1, description="threads of each core")
    maximum: int | None = Field(None, ge=1, description="vCPUs that hot-plug may reach")
    model: str | None = Field(
        None, min_length=1, description="CPU model, in the hypervisor's words"
    )
    pinning: dict[int, tuple[int, ...]] = Field(
        default_factory=dict, description="vCPU -> the CPUs of the host that it may run on"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sockets or self.cores or self.threads:
            product = (self.sockets or 1) * (self.cores or 1) * (self.threads or 1)
            if product != self.count:
                raise ValueError(
                    f"sockets x cores x threads is {product}, but count is {self.count}: "
                    "make them equal or leave the topology out"
                )
        if self.maximum is not None and self.maximum < self.count:
            raise ValueError(f"maximum {self.maximum} is less than count {self.count}")
        for vcpu, hosts in self.pinning.items():
            if not 0 <= vcpu < (self.maximum or self.count):
                raise ValueError(f"pinning.{vcpu}: there are vCPUs 0 to {self.count - 1}")
            if not hosts or min(hosts) < 0:
                raise ValueError(f"pinning.{vcpu}: a list of CPU numbers of the host, from 0")
        return self


class NumaNode(_Part):
    """One NUMA node as the guest sees it."""

    memory: Size = Field(description="memory of the node")
    cpus: tuple[int, ...] = Field(description="vCPUs of the node")
    host_node: int | None = Field(None, ge=0, description="node of the host that backs it")


class Memory(_Part):
    """The memory: `memory = "512M"` is short for `memory.size = "512M"`."""

    size: Size = Field(512 * MIB, description="memory of the guest")
    maximum: Size | None = Field(None, description="memory that hot-plug may reach")
    nodes: tuple[NumaNode, ...] = Field((), description="NUMA nodes; none is one node")
    shared: bool = Field(False, description="backed by a shared file (virtiofs needs it)")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.size < MIB:
            raise ValueError(f'size {format_size(self.size)}: at least "1M"')
        if self.size % 4096:
            raise ValueError(f"size {self.size}: a multiple of the page size, 4096")
        if self.maximum is not None and self.maximum < self.size:
            raise ValueError("maximum is less than size")
        if self.nodes and sum(node.memory for node in self.nodes) != self.size:
            raise ValueError(
                f"nodes have {format_size(sum(node.memory for node in self.nodes))} together, "
                f"but size is {format_size(self.size)}"
            )
        return self


class Boot(_Part):
    """What runs first: an image by name, a kernel, a firmware, or the first disk."""

    image: str | None = Field(None, min_length=1, description="image of the store, by name")
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = Field("", description="kernel command line; an image's own comes before it")
    firmware: Path | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.image is not None and self.kernel is not None:
            raise ValueError("image and kernel exclude each other: an image brings its kernel")
        if self.initrd is not None and self.kernel is None:
            raise ValueError("initrd needs kernel")
        for field in ("cmdline", "image"):
            value = getattr(self, field)
            if value and ("\0" in value or "\n" in value):
                raise ValueError(f"{field}: one line of text without NUL")
        return self


class Disk(_Part):
    """One disk: empty of a size, or on top of an image that it does not change."""

    name: Name
    size: Size | None = Field(None, description="size; that of `source` if left out")
    source: Path | None = Field(None, description="image to start from; it is never written to")
    format: Literal["raw", "qcow2"] | None = Field(None, description="format of `source`")
    bus: Literal["virtio", "scsi"] = "virtio"
    readonly: bool = False
    serial: str | None = Field(None, max_length=20, pattern=r"^[A-Za-z0-9_.+-]+$")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.size is None and self.source is None:
            raise ValueError('size or source has to be given, such as size = "1G"')
        if self.size is not None and (self.size == 0 or self.size % 512):
            raise ValueError(f"size {self.size}: a positive multiple of 512 bytes")
        return self


class Forward(_Part):
    """A port of the host that leads into the guest; host port 0 is any free one."""

    guest: int = Field(ge=1, le=65535)
    host: int = Field(0, ge=0, le=65535)
    protocol: Literal["tcp", "udp"] = "tcp"


class Nic(_Part):
    """One network interface."""

    name: Name
    network: str = Field(
        "user",
        min_length=1,
        description='"user" (NAT without root), "segment:NAME" (machine to machine without root), '
        '"bridge:NAME" or "tap:NAME" (root), "none" (no link)',
    )
    mac: str | None = Field(None, description="MAC address; made from the seed if left out")
    forwards: tuple[Forward, ...] = ()

    @field_validator("network")
    @classmethod
    def _known_network(cls, value: str) -> str:
        kind, separator, name = value.partition(":")
        named = kind in {"segment", "bridge", "tap"}
        if named != bool(separator) or kind not in {"user", "none", "segment", "bridge", "tap"}:
            raise ValueError('"user", "none", "segment:NAME", "bridge:NAME" or "tap:NAME"')
        if named:
            _check_name(name)
        return value

    @field_validator("mac", mode="before")
    @classmethod
    def _known_mac(cls, value: object) -> object:
        if value is None:
            return None
        text = value.lower() if isinstance(value, str) else ""
        if not _MAC.fullmatch(text) or int(text[:2], 16) & 1:
            raise ValueError('a unicast MAC address such as "52:54:00:12:34:56"')
        return text

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.forwards and self.network != "user":
            raise ValueError('forwards need network = "user"')
        return self


class ShareKind(StrEnum):
    """How a directory gets into the guest; `auto` takes the first that works."""

    AUTO = "auto"
    P9 = "9p"
    VIRTIOFS = "virtiofs"
    COPY = "copy"


class Share(_Part):
    """A directory of the host's inside the guest."""

    tag: Name
    source: Path
    target: str = Field(pattern=r"^/", description="absolute path in the guest")
    readonly: bool = True
    kind: ShareKind = ShareKind.AUTO


class Console(_Part):
    """A terminal: the serial port, or a port of virtio-console."""

    name: Name = "serial"
    kind: Literal["serial", "virtio"] = "serial"


DEFAULT_CONSOLES = (Console(),)
DEFAULT_CHANNELS = ("vmlab.agent",)
"""What a machine has unless its specification says otherwise."""


class HostDevice(_Part):
    """A device of the host's given to the guest."""

    name: Name
    kind: Literal["gpu", "sriov"]
    address: str = Field(
        pattern=r"^([0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$",
        description='PCI address such as "0000:01:00.0"',
    )


def _architecture(value: object) -> object:
    return value if isinstance(value, Architecture) else parse_architecture(value)


def _from_scalar(field: str) -> Any:
    """Accept a bare value where a table with one important field may stand."""

    def widen(value: object) -> object:
        return {field: value} if isinstance(value, int | str) else value

    return BeforeValidator(widen)


class MachineSpec(_Part):
    """A machine as its author wants it."""

    name: Name
    architecture: Annotated[Architecture, BeforeValidator(_architecture)] = Field(
        default_factory=lambda: host_architecture() or Architecture.X86_64,
        description="the guest's architecture; the host's if left out",
    )
    cpus: Annotated[Cpus, _from_scalar("count")] = Field(default_factory=Cpus)
    memory: Annotated[Memory, _from_scalar("size")] = Field(default_factory=Memory)
    boot: Annotated[Boot, _from_scalar("image")] = Field(default_factory=Boot)
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    shares: tuple[Share, ...] = ()
    consoles: tuple[Console, ...] = DEFAULT_CONSOLES
    channels: tuple[Name, ...] = Field(
        DEFAULT_CHANNELS, description="byte channels between host and guest"
    )
    host_devices: tuple[HostDevice, ...] = ()
    display: bool = Field(False, description="a display, for screenshots and keys")
    accelerator: str | None = Field(
        None, min_length=1, description="accelerator that is required; None is the best that works"
    )
    deterministic: bool = Field(False, description="the same seed has to give the same run")
    seed: int = Field(0, ge=0, lt=1 << 64, description="source of everything random about it")
    labels: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        parts: dict[str, list[str]] = {
            "disks": [disk.name for disk in self.disks],
            "nics": [nic.name for nic in self.nics],
            "shares": [share.tag for share in self.shares],
            "consoles": [console.name for console in self.consoles],
            "channels": list(self.channels),
            "host_devices": [device.name for device in self.host_devices],
        }
        for field, names in parts.items():
            for position, name in enumerate(names):
                if name in names[:position]:
                    raise ValueError(f"{field}.{position}: the name {name!r} is used twice")
        macs = [nic.mac for nic in self.nics if nic.mac is not None]
        if len(set(macs)) != len(macs):
            raise ValueError("nics: two of them have the same MAC address")
        vcpus = [cpu for node in self.memory.nodes for cpu in node.cpus]
        if self.memory.nodes and sorted(vcpus) != list(range(self.cpus.count)):
            raise ValueError(
                f"memory.nodes: each of the vCPUs 0 to {self.cpus.count - 1} belongs to one node"
            )
        return self

    @classmethod
    def load(cls, source: Path) -> MachineSpec:
        """Read a specification from a TOML file, or from JSON where the name ends in `.json`.

        Raises:
            InvalidSpec: naming file, field, value and what would be right.
        """
        return read_document(cls, source)

    @classmethod
    def parse(cls, text: str, *, form: str = "toml", source: str | None = None) -> MachineSpec:
        """Read a specification from text in `form` "toml" or "json".

        Raises:
            InvalidSpec: naming field, value and what would be right.
        """
        return parse_document(cls, text, form=form, source=source)

    @classmethod
    def of(cls, **fields: Any) -> MachineSpec:
        """A specification from Python: `MachineSpec.of(name="a", cpus=2, memory="512M")`.

        Raises:
            InvalidSpec: naming field, value and what would be right.
        """
        return build(cls, fields)

    def with_changes(self, **fields: Any) -> MachineSpec:
        """The same specification with some fields replaced, checked as a whole again.

        Raises:
            InvalidSpec: naming field, value and what would be right.
        """
        return build(MachineSpec, {**self.model_dump(), **fields})

    def renamed(self, name: str) -> MachineSpec:
        """The same specification for another machine: its own name, and MAC addresses of its own.

        Raises:
            InvalidSpec: the name is not one.
        """
        if not is_name(name):
            raise InvalidSpec([SpecProblem("name", name, NAME_RULE)], hint="choose another name")
        # Nothing else can become wrong by this, so nothing else is checked again.
        nics = tuple(nic.model_copy(update={"mac": None}) for nic in self.nics)
        return self.model_copy(update={"name": name, "nics": nics})

    def disk(self, name: str) -> Disk | None:
        """The disk of that name, if there is one."""
        return next((disk for disk in self.disks if disk.name == name), None)

    def nic(self, name: str) -> Nic | None:
        """The NIC of that name, if there is one."""
        return next((nic for nic in self.nics if nic.name == name), None)
