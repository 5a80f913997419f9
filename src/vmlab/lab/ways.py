"""How a guest is talked to: the channels that its image declares, the best first.

A kept machine carries them in a label, since whoever comes back knows its name alone. SSH is not
among them: it needs a network and keys, which `vmlab run` does not set up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vmlab.guests.agent import AgentChannel
from vmlab.guests.command import CommandChannel
from vmlab.hypervisors.base import Machine
from vmlab.machine.spec import MachineSpec

LABEL: Final = "vmlab.channels"
_KNOWN: Final = ("agent", "qga", "console")


def label_of(channels: Sequence[str]) -> dict[str, str]:
    """The label that keeps an image's channels, as far as they can be used here."""
    known = [channel for channel in channels if channel in _KNOWN]
    return {LABEL: ",".join(known)} if known else {}


def ways_into(spec: MachineSpec) -> tuple[str, ...]:
    """The ways into a machine's guest, by its label; vmlab's agent where nothing is said."""
    said = spec.labels.get(LABEL, "").split(",")
    return tuple(way for way in said if way in _KNOWN) or ("agent",)


def channel_into(machine: Machine, way: str) -> CommandChannel:
    """The channel of that name into a machine's guest; it is not open yet."""
    if way == "qga":
        from vmlab.guests.qga import QgaChannel

        return QgaChannel(machine.channel)
    if way == "console":
        from vmlab.guests.console import ConsoleChannel

        return ConsoleChannel(machine.console)
    return AgentChannel(machine.channel)
