"""Specifications, documents and values of every kind, for property tests."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import strategies as st

from vmlab.machine.architecture import Architecture
from vmlab.machine.sizes import MIB
from vmlab.machine.spec import MachineSpec

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
names = st.builds(str.__add__, st.sampled_from(LETTERS), st.text(LETTERS + "_.-", max_size=20))
plain_text = st.text(st.characters(codec="utf-8"), max_size=20)
one_line = st.text(st.characters(codec="utf-8", exclude_characters="\n\0"), max_size=20)
paths = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def maybe(table: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """A table of some of the fields."""
    return st.fixed_dictionaries({}, optional=table)


@st.composite
def cpus(draw: st.DrawFn, count: int) -> dict[str, Any]:
    table: dict[str, Any] = {"count": count}
    if draw(st.booleans()):
        table |= {"sockets": 1, "cores": count, "threads": 1}
    if draw(st.booleans()):
        table["maximum"] = draw(st.integers(count, 64))
    if draw(st.booleans()):
        table["model"] = draw(one_line.filter(bool))
    hosts = st.lists(st.integers(0, 255), min_size=1, max_size=4)
    table["pinning"] = draw(st.dictionaries(st.integers(0, count - 1), hosts, max_size=3))
    return table


@st.composite
def memory(draw: st.DrawFn, count: int) -> dict[str, Any]:
    size = draw(st.integers(1, 4096)) * MIB
    table: dict[str, Any] = {"size": size, "shared": draw(st.booleans())}
    if draw(st.booleans()):
        table["maximum"] = size + draw(st.integers(0, 64)) * MIB
    if draw(st.booleans()):
        split = draw(st.integers(0, count))
        half = size // 2
        table["nodes"] = [
            {"memory": half, "cpus": list(range(split))},
            {"memory": size - half, "cpus": list(range(split, count)), "host_node": 1},
        ]
    return table


boots = st.one_of(
    maybe({"image": one_line.filter(bool), "cmdline": one_line, "firmware": paths}),
    st.fixed_dictionaries({"kernel": paths}, optional={"initrd": paths, "cmdline": one_line}),
)
disks = st.fixed_dictionaries(
    {"name": names, "size": st.integers(1, 1 << 40).map(lambda sectors: sectors * 512)},
    optional={
        "source": paths,
        "format": st.sampled_from(["raw", "qcow2"]),
        "bus": st.sampled_from(["virtio", "scsi"]),
        "readonly": st.booleans(),
        "serial": st.text("ABC0123_.+-", min_size=1, max_size=20),
    },
)
networks = st.sampled_from(["user", "none"]) | st.builds(
    "{}:{}".format, st.sampled_from(["segment", "bridge", "tap"]), names
)
macs = st.binary(min_size=6, max_size=6).map(
    lambda raw: ":".join(f"{byte:02x}" for byte in [raw[0] & 0xFE, *raw[1:]])
)
nics = st.fixed_dictionaries({"name": names}, optional={"network": networks, "mac": macs})
shares = st.fixed_dictionaries(
    {"tag": names, "source": paths, "target": one_line.map(lambda text: "/" + text)},
    optional={
        "readonly": st.booleans(),
        "kind": st.sampled_from(["auto", "9p", "virtiofs", "copy"]),
    },
)
consoles = st.fixed_dictionaries(
    {"name": names}, optional={"kind": st.sampled_from(["serial", "virtio"])}
)
devices = st.fixed_dictionaries(
    {
        "name": names,
        "kind": st.sampled_from(["gpu", "sriov"]),
        "address": st.sampled_from(["0000:01:00.0", "02:1f.7"]),
    }
)


def apart(table: st.SearchStrategy[Any], *keys: str) -> st.SearchStrategy[list[Any]]:
    """Up to three tables of which no two have a value of `keys` in common."""
    unique = [lambda part, key=key: part.get(key, object()) for key in keys]
    return st.lists(table, max_size=3, unique_by=tuple(unique))


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """Valid documents of machine specifications, as plain data."""
    count = draw(st.integers(1, 16))
    required: dict[str, Any] = {"name": draw(names)}
    chosen = draw(
        maybe(
            {
                "architecture": st.sampled_from([*Architecture, "amd64", "arm64"]).map(str),
                "memory": memory(count),
                "boot": boots,
                "disks": apart(disks, "name"),
                "nics": apart(nics, "name", "mac"),
                "shares": apart(shares, "tag"),
                "consoles": apart(consoles, "name"),
                "channels": st.lists(names, max_size=3, unique=True),
                "host_devices": apart(devices, "name"),
                "display": st.booleans(),
                "accelerator": one_line.filter(bool),
                "deterministic": st.booleans(),
                "seed": st.integers(0, (1 << 63) - 1),
                "labels": st.dictionaries(plain_text, plain_text, max_size=3),
            }
        )
    )
    return required | {"cpus": draw(cpus(count))} | chosen


specs = tables().map(lambda table: MachineSpec.of(**table))

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def toml(value: Any) -> str:
    """Plain data as TOML: tables at the top level, what is inside them in one line."""
    if isinstance(value, dict) and value:
        return "".join(f"{toml_key(key)} = {inline(part)}\n" for key, part in value.items())
    return ""


def toml_key(key: str) -> str:
    return inline(str(key))


def inline(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        pairs = ", ".join(f"{toml_key(key)} = {inline(part)}" for key, part in value.items())
        return "{" + pairs + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(inline(part) for part in value) + "]"
    if isinstance(value, float):
        return "nan" if math.isnan(value) else "inf" if math.isinf(value) else repr(value)
    if isinstance(value, int):
        return str(value)
    # A JSON string is a TOML string, but for DEL and for characters that JSON escapes in pairs.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
