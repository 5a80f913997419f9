"""Reads flattened device trees for tests, independently of what writes them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field


@dataclass
class Tree:
    properties: dict[str, bytes] = field(default_factory=dict)
    children: dict[str, Tree] = field(default_factory=dict)

    def at(self, path: str) -> Tree:
        node = self
        for name in path.strip("/").split("/"):
            node = node.children[name] if name else node
        return node

    def paths(self, here: str = "") -> dict[str, Tree]:
        found = {here or "/": self}
        for name, child in self.children.items():
            found |= child.paths(f"{here}/{name}")
        return found

    def cells(self, name: str) -> list[int]:
        value = self.properties[name]
        return [cell for (cell,) in struct.iter_unpack(">I", value)]

    def texts(self, name: str) -> list[str]:
        return self.properties[name].decode().rstrip("\0").split("\0")


def parse(data: bytes) -> Tree:
    magic, size, structure, strings, *_ = struct.unpack_from(">10I", data)
    assert magic == 0xD00DFEED
    assert size <= len(data)
    place = structure
    root: Tree | None = None
    stack: list[Tree] = []
    while True:
        (token,) = struct.unpack_from(">I", data, place)
        place += 4
        if token == 1:
            end = data.index(b"\0", place)
            name = data[place:end].decode()
            place = (end + 4) & ~3
            node = Tree()
            if stack:
                stack[-1].children[name] = node
            else:
                root = node
            stack.append(node)
        elif token == 2:
            stack.pop()
        elif token == 3:
            length, at = struct.unpack_from(">II", data, place)
            end = data.index(b"\0", strings + at)
            value = data[place + 8 : place + 8 + length]
            stack[-1].properties[data[strings + at : end].decode()] = value
            place = (place + 8 + length + 3) & ~3
        elif token == 9:
            assert root is not None and not stack
            return root
        else:
            assert token == 4
