"""Flattened device trees (Devicetree Specification 0.4, chapter 5)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

_MAGIC: Final = 0xD00D_FEED
_VERSION: Final = 17
_COMPATIBLE_VERSION: Final = 16
_HEADER: Final = struct.Struct(">10I")
_BEGIN_NODE: Final = 1
_END_NODE: Final = 2
_PROPERTY: Final = 3
_END: Final = 9

Property = bytes | str | list[str] | int | list[int] | None


@dataclass
class Node:
    """A node: its name with unit address, its properties, and the nodes below it."""

    name: str
    properties: dict[str, bytes] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list)

    def add(self, name: str, **properties: Property) -> Node:
        """A new node below this one. Underscores in keywords are hyphens in names."""
        node = Node(name)
        for key, value in properties.items():
            node.set(key if key == "device_type" else key.replace("_", "-"), value)
        self.children.append(node)
        return node

    def set(self, name: str, value: Property) -> None:
        """Set a property: bytes, text, texts, a cell, cells, or nothing (a flag)."""
        self.properties[name] = _encode(value)


def cells(value: int) -> list[int]:
    """A 64-bit number as two cells."""
    return [value >> 32, value & 0xFFFF_FFFF]


def _encode(value: Property) -> bytes:
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode() + b"\0"
    if isinstance(value, int):
        return struct.pack(">I", value)
    return b"".join(_encode(item) for item in value)


def flatten(root: Node) -> bytes:
    """The binary form of the tree whose root is `root` (its name is "")."""
    strings = bytearray()
    places: dict[str, int] = {}
    parts: list[bytes] = []

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    def walk(node: Node) -> None:
        parts.append(struct.pack(">I", _BEGIN_NODE) + padded(node.name.encode() + b"\0"))
        for name, value in node.properties.items():
            if name not in places:
                places[name] = len(strings)
                strings.extend(name.encode() + b"\0")
            parts.append(struct.pack(">III", _PROPERTY, len(value), places[name]) + padded(value))
        for child in node.children:
            walk(child)
        parts.append(struct.pack(">I", _END_NODE))

    walk(root)
    parts.append(struct.pack(">I", _END))
    structure = b"".join(parts)
    reservations = bytes(16)
    at_reservations = _HEADER.size
    at_structure = at_reservations + len(reservations)
    at_strings = at_structure + len(structure)
    size = at_strings + len(strings)
    header = _HEADER.pack(
        _MAGIC, size, at_structure, at_strings, at_reservations, _VERSION, _COMPATIBLE_VERSION, 0,
        len(strings), len(structure),
    )  # fmt: skip
    return header + reservations + structure + bytes(strings)
