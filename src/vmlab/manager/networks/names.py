"""Names that the host knows a network's parts by: of interfaces, tables and segments.

Made from ids alone, never from what a person typed, so that none can be another thing's. An
interface's name has 15 bytes at most (IFNAMSIZ in linux/if.h, the NUL included).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final, Literal

__all__ = [
    "PREFIX",
    "SWITCH",
    "TABLES",
    "alias",
    "digest",
    "interface",
    "of_alias",
    "segment",
    "table",
    "tables",
]

PREFIX: Final = "vmlab"
"""What every alias and table begins with."""

TABLES: Final = f"{PREFIX}_"
"""What the names of all tables begin with, of whichever home."""

SWITCH: Final = "switch"
"""What stands for a network's id where something is for all networks that have a tag."""

_ID_DIGITS: Final = 11
"""Hexadecimal digits of an id in an interface's name: 44 bits."""

_KINDS: Final = {"bridge": "vmlb", "metadata": "vmlm", "port": "vmlp", "switch": "vmls"}


def interface(kind: Literal["bridge", "metadata", "port", "switch"], id_: str) -> str:
    """The name of an interface of a kind, for the network or home of that hexadecimal id.

    That of "metadata" is no interface's but an address's: its label (IFA_LABEL, rtnetlink(7)).
    """
    return f"{_KINDS[kind]}{id_[:_ID_DIGITS]}"


def table(home: str, network: str) -> str:
    """The name of the nftables table of a network, by its home's digest and its id."""
    return f"{tables(home)}{network}"


def tables(home: str) -> str:
    """What the names of all tables of a home begin with."""
    return f"{TABLES}{home}_"


def segment(network: str) -> str:
    """The name of the segment of an isolated network, by its id."""
    return f"net-{network[:12]}"


def digest(directory: Path) -> str:
    """What tells a home's interfaces from another home's, in hexadecimal digits."""
    return hashlib.sha256(str(directory).encode()).hexdigest()[:16]


def alias(home: str, network: str) -> str:
    """What an interface says it is for (IFLA_IFALIAS): a network's id, of a home's digest."""
    return f"{PREFIX} {home} {network}"


def of_alias(home: str, text: str | None) -> str | None:
    """The network that an interface with that alias is for; None if it is not of that home."""
    words = (text or "").split(" ")
    return words[2] if len(words) == 3 and words[:2] == [PREFIX, home] else None
