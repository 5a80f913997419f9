"""MachineSpec: what a machine is made of, the same for every hypervisor.

Read from TOML, JSON or Python. A specification says what is wanted; what a hypervisor cannot do
with it is found by `vmlab.machine.fit` before anything is created.
"""

from __future__ import annotations

from collections.abc import Iterable
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

from vmlab.machine.architecture import (
    SPELLINGS,
    Architecture,
    host_architecture,
    parse_architecture,
)
from vmlab.machine.documents import build, parse_document, read_document
from vmlab.machine.errors import InvalidSpec, SpecProblem
from vmlab.machine.fields import (
    NAME,
    NAME_PATTERN,
    NAME_RULE,
    Flag,
    HostPath,
    Name,
    Shorthand,
    Text,
    Whole,
    Wrong,
    is_name,
)
from vmlab.machine.sizes import MIB, SIZE_SCHEMA, Size, format_size

__all__ = [
    "Boot",
    "Console",
    "Cpus",
    "DEFAULT_CHANNELS",
    "DEFAULT_CONSOLES",
    "Disk",
    "Forward",
    "HostDevice",
    "MOST_VCPUS",
    "MachineSpec",
    "Memory",
    "NAME",
    "NAME_PATTERN",
    "NAME_RULE",
    "Name",
    "Nic",
    "NumaNode",
    "Share",
    "ShareKind",
    "is_name",
]

MOST_VCPUS = 4096
"""vCPUs that a specification may ask for: QEMU 9's most for any machine type, "pc-q35"."""

_MOST_HOST_CPUS = 1 << 20
_PAGE = 4096
_SECTOR = 512


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cpus(_Part):
    """The vCPUs: `cpus = 2` is short for `cpus.count = 2`."""

    count: Whole = Field(1, ge=1, le=MOST_VCPUS, description="vCPUs")
    sockets: Whole | None = Field(None, ge=1, le=MOST_VCPUS, description="sockets")
    cores: Whole | None = Field(None, ge=1, le=MOST_VCPUS, description="cores of each socket")
    threads: Whole | None = Field(None, ge=1, le=MOST_VCPUS, description="threads of each core")
    maximum: Whole | None = Field(
        None, ge=1, le=MOST_VCPUS, description="vCPUs that hot-plug may reach"
    )
    model: str | None = Field(
        None, min_length=1, description="CPU model, in the hypervisor's words"
    )
    pinning: dict[int, tuple[Whole, ...]] = Field(
        default_factory=dict, description="vCPU -> the CPUs of the host that it may run on"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sockets or self.cores or self.threads:
            product = (self.sockets or 1) * (self.cores or 1) * (self.threads or 1)
            if product != self.count:
                raise Wrong(
                    "count",
                    self.count,
                    f"sockets x cores x threads, which is {product}; or leave the topology out",
                )
        if self.maximum is not None and self.maximum < self.count:
            raise Wrong("maximum", self.maximum, f"at least count, which is {self.count}")
        last = (self.maximum or self.count) - 1
        for vcpu, hosts in self.pinning.items():
            if not 0 <= vcpu <= last:
                there_are = f"vCPUs 0 to {last}" if last else "vCPU 0 alone"
                raise Wrong(f"pinning.{vcpu}", list(hosts), f"no such vCPU; there is {there_are}")
            if not hosts or min(hosts) < 0 or max(hosts) > _MOST_HOST_CPUS:
                raise Wrong(
                    f"pinning.{vcpu}", list(hosts), "a list of CPU numbers of the host, from 0 on"
                )
        return self


class NumaNode(_Part):
    """One NUMA node as the guest sees it."""

    memory: Size = Field(description="memory of the node")
    cpus: tuple[Whole, ...] = Field(description="vCPUs of the node")
    host_node: Whole | None = Field(
        None, ge=0, le=_MOST_HOST_CPUS, description="node of the host that backs it"
    )


class Memory(_Part):
    """The memory: `memory = "512M"` is short for `memory.size = "512M"`."""

    size: Size = Field(512 * MIB, description="memory of the guest")
    maximum: Size | None = Field(None, description="memory that hot-plug may reach")
    nodes: tuple[NumaNode, ...] = Field((), description="NUMA nodes; none is one node")
    shared: Flag = Field(False, description="backed by a shared file (virtiofs needs it)")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.size < MIB:
            raise Wrong("size", format_size(self.size), 'at least "1M"')
        if self.size % _PAGE:
            raise Wrong("size", self.size, f"a multiple of the page size, {_PAGE}")
        if self.maximum is not None and self.maximum < self.size:
            raise Wrong(
                "maximum",
                format_size(self.maximum),
                f"at least size, which is {format_size(self.size)}",
            )
        total = sum(node.memory for node in self.nodes)
        if self.nodes and total != self.size:
            raise Wrong(
                "nodes",
                [format_size(node.memory) for node in self.nodes],
                f"memory that adds up to size, which is {format_size(self.size)}",
            )
        return self


class Boot(_Part):
    """What runs first: an image by name, a kernel, a firmware, or the first disk.

    `boot = "debian"` is short for `boot.image = "debian"`.
    """

    image: str | None = Field(None, min_length=1, description="image of the store, by name")
    kernel: HostPath | None = Field(None, description="kernel that the hypervisor loads itself")
    initrd: HostPath | None = Field(None, description="initial RAM disk for `kernel`")
    cmdline: str = Field("", description="kernel command line; an image's own comes before it")
    firmware: HostPath | None = Field(
        None, description="firmware; the hypervisor's own if left out"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.image is not None and self.kernel is not None:
            raise Wrong("kernel", self.kernel, "nothing beside image, which brings its kernel")
        if self.initrd is not None and self.kernel is None:
            raise Wrong("initrd", self.initrd, "a kernel beside it")
        for field in ("cmdline", "image"):
            value = getattr(self, field)
            if value and ("\0" in value or "\n" in value):
                raise Wrong(field, value, "one line of text without NUL")
        return self


class Disk(_Part):
    """One disk: empty of a size, on top of an image that it does not change, or an image itself."""

    name: Name = Field(description="name of the disk, one of its kind in the machine")
    size: Size | None = Field(None, description="size; that of `source` or `file` if left out")
    source: HostPath | None = Field(None, description="image to start from; it is never written to")
    file: HostPath | None = Field(
        None,
        description="image that is the disk: it is written to where it is, and kept when the disk "
        "or its machine goes",
    )
    format: Literal["raw", "qcow2"] | None = Field(
        None, description="format of `source`, found out if left out, or of `file`"
    )
    bus: Literal["virtio", "scsi"] = Field("virtio", description="how the guest sees it")
    readonly: Flag = Field(False, description="whether the guest cannot write to it")
    serial: (
        Annotated[
            str, Text(r"^[A-Za-z0-9_.+-]{1,20}$", "1 to 20 letters, digits, '_', '.', '+' or '-'")
        ]
        | None
    ) = Field(None, description="serial number that the guest reads")
    breakable: Flag = Field(
        False,
        description="whether every fault can strike it, at the cost of speed; where a hypervisor "
        "can break all disks, it makes no difference",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.size is None and self.source is None and self.file is None:
            raise Wrong("size", None, 'size or source has to be given, such as size = "1G"')
        if self.file is not None and self.source is not None:
            raise Wrong("source", self.source, "nothing beside file, which is the disk itself")
        if self.file is not None and self.format is None:
            # A guest that can write its first bytes could make any format of a raw image.
            raise Wrong("format", None, '"raw" or "qcow2", because it has a file')
        if self.size is not None and (self.size == 0 or self.size % _SECTOR):
            raise Wrong("size", self.size, f"a positive multiple of {_SECTOR} bytes")
        return self

    @property
    def in_place(self) -> bool:
        """Whether the guest writes to a file that is not the machine's own."""
        return self.file is not None and not self.readonly


class Forward(_Part):
    """A port of the host that leads into the guest; host port 0 is any free one."""

    guest: Whole = Field(ge=1, le=65535, description="port of the guest")
    host: Whole = Field(0, ge=0, le=65535, description="port of the host; 0 is any free one")
    protocol: Literal["tcp", "udp"] = Field("tcp", description="protocol")


_MAC_PATTERN = "^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$"
_MAC = Text(_MAC_PATTERN, 'a unicast MAC address such as "52:54:00:12:34:56"')
_NETWORK = '"user", "none", "segment:NAME", "bridge:NAME" or "tap:NAME"'


class Nic(_Part):
    """One network interface."""

    name: Name = Field(description="name of the NIC, one of its kind in the machine")
    network: str = Field(
        "user",
        min_length=1,
        description='"user" (NAT without root), "segment:NAME" (machine to machine without root), '
        '"bridge:NAME" or "tap:NAME" (root), "none" (no link)',
    )
    mac: Annotated[str, _MAC] | None = Field(
        None, description="MAC address; made from the seed if left out"
    )
    forwards: tuple[Forward, ...] = Field(
        (), description='ports of the host that lead to it; only with network = "user"'
    )

    @field_validator("network")
    @classmethod
    def _known_network(cls, value: str) -> str:
        kind, separator, name = value.partition(":")
        named = kind in {"segment", "bridge", "tap"}
        if named != bool(separator) or kind not in {"user", "none", "segment", "bridge", "tap"}:
            raise ValueError(f"one of {_NETWORK}")
        if named and not is_name(name):
            raise ValueError(f"one of {_NETWORK}, where NAME has {NAME_RULE}")
        return value

    @field_validator("mac")
    @classmethod
    def _unicast(cls, value: str | None) -> str | None:
        # The lowest bit of the first byte marks a group address (IEEE 802, 8.2).
        if value is not None and int(value[:2], 16) & 1:
            raise ValueError(_MAC.rule)
        return value.lower() if value is not None else None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.forwards and self.network != "user":
            raise Wrong("network", self.network, '"user", because it has forwards')
        return self


class ShareKind(StrEnum):
    """How a directory gets into the guest; `auto` takes the first that works."""

    AUTO = "auto"
    P9 = "9p"
    VIRTIOFS = "virtiofs"
    COPY = "copy"


class Share(_Part):
    """A directory of the host's inside the guest."""

    tag: Name = Field(description="name by which the guest mounts it")
    source: HostPath = Field(description="directory of the host")
    target: Annotated[str, Text(r"^/[^\0]*$", 'an absolute path in the guest such as "/src"')] = (
        Field(description="absolute path in the guest")
    )
    readonly: Flag = Field(True, description="whether the guest cannot write to it")
    kind: ShareKind = Field(ShareKind.AUTO, description="how; auto takes the first that works")


class Console(_Part):
    """A terminal: the serial port, or a port of virtio-console."""

    name: Name = Field("serial", description="name of the console")
    kind: Literal["serial", "virtio"] = Field("serial", description="what the guest sees")


class HostDevice(_Part):
    """A device of the host's given to the guest."""

    name: Name = Field(description="name of the device")
    kind: Literal["gpu", "sriov"] = Field(description="what it is: a GPU, or a virtual function")
    address: Annotated[
        str,
        Text(
            r"^([0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$",
            'a PCI address such as "0000:01:00.0"',
        ),
    ] = Field(description='PCI address such as "0000:01:00.0"')


DEFAULT_CONSOLES = (Console(),)
DEFAULT_CHANNELS = ("vmlab.agent",)
"""What a machine has unless its specification says otherwise."""


def _architecture(value: object) -> object:
    return value if isinstance(value, Architecture) else parse_architecture(value)


class MachineSpec(_Part):
    """A machine as its author wants it."""

    model_config = ConfigDict(title="machine specification")

    name: Name = Field(description="name of the machine, one of its kind on a hypervisor")
    architecture: Annotated[
        Architecture,
        BeforeValidator(_architecture),
        WithJsonSchema({"type": "string", "enum": list(SPELLINGS)}),
    ] = Field(
        default_factory=lambda: host_architecture() or Architecture.X86_64,
        description="the guest's architecture; the host's if left out",
    )
    cpus: Annotated[
        Cpus, Shorthand("count", {"type": "integer", "minimum": 1, "maximum": MOST_VCPUS})
    ] = Field(default_factory=Cpus, description="vCPUs, or their number alone")
    memory: Annotated[Memory, Shorthand("size", SIZE_SCHEMA)] = Field(
        default_factory=Memory, description="memory, or its size alone"
    )
    boot: Annotated[Boot, Shorthand("image", {"type": "string", "minLength": 1})] = Field(
        default_factory=Boot, description="what runs first, or the name of an image alone"
    )
    disks: tuple[Disk, ...] = Field((), description="disks; the first one is booted from")
    nics: tuple[Nic, ...] = Field((), description="network interfaces")
    shares: tuple[Share, ...] = Field((), description="directories of the host in the guest")
    consoles: tuple[Console, ...] = Field(
        DEFAULT_CONSOLES, description="terminals; the first one is the kernel's"
    )
    channels: tuple[Name, ...] = Field(
        DEFAULT_CHANNELS, description="byte channels between host and guest, by name"
    )
    host_devices: tuple[HostDevice, ...] = Field(
        (), description="devices of the host that the guest gets"
    )
    display: Flag = Field(False, description="a display, for screenshots and keys")
    accelerator: str | None = Field(
        None, min_length=1, description="accelerator that is required; None is the best that works"
    )
    deterministic: Flag = Field(False, description="the same seed has to give the same run")
    seed: Whole = Field(0, ge=0, lt=1 << 64, description="source of everything random about it")
    labels: dict[str, str] = Field(
        default_factory=dict, description="what the author wants to find it by"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _refuse_twins("disks", "name", (disk.name for disk in self.disks))
        files = (str(disk.file) if disk.file is not None else None for disk in self.disks)
        _refuse_twins("disks", "file", files)
        _refuse_twins("nics", "name", (nic.name for nic in self.nics))
        _refuse_twins("nics", "mac", (nic.mac for nic in self.nics))
        _refuse_twins("shares", "tag", (share.tag for share in self.shares))
        _refuse_twins("consoles", "name", (console.name for console in self.consoles))
        _refuse_twins("channels", "", self.channels)
        _refuse_twins("host_devices", "name", (device.name for device in self.host_devices))
        placed = [cpu for node in self.memory.nodes for cpu in node.cpus]
        if self.memory.nodes and sorted(placed) != list(range(self.cpus.count)):
            raise Wrong(
                "memory.nodes",
                [list(node.cpus) for node in self.memory.nodes],
                f"each of the vCPUs 0 to {self.cpus.count - 1} in the cpus of one node",
            )
        return self

    @classmethod
    def load(cls, source: Path) -> MachineSpec:
        """Read a specification from a TOML file, or from JSON where the name ends in `.json`.

        Relative paths in it are seen from the directory that the file is in.

        Raises:
            InvalidSpec: naming file, field, value and what would be right.
        """
        return read_document(cls, source)

    @classmethod
    def parse(
        cls, text: str | bytes, *, form: str = "toml", source: str | None = None
    ) -> MachineSpec:
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
        # The parts are models already and are not looked into again; the whole is.
        return build(MachineSpec, {**dict(self), **fields})

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


def _refuse_twins(field: str, key: str, values: Iterable[str | None]) -> None:
    """Refuse a list of parts of which two have the same name."""
    first: dict[str, int] = {}
    for position, value in enumerate(values):
        if value is None:
            continue
        if value in first:
            where = f"{field}.{position}.{key}" if key else f"{field}.{position}"
            raise Wrong(where, value, f"a {key or 'name'} that {field}.{first[value]} has not")
        first[value] = position
