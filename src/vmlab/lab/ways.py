"""How a guest is talked to: by the best of the channels that its image declares.

A machine carries their names in a label, since whoever comes back to a kept one knows its name
alone. The choice itself is made by `vmlab.guests.choice`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vmlab.guests.command import CommandChannel
from vmlab.hypervisors.base import Machine
from vmlab.machine.spec import MachineSpec

LABEL: Final = "vmlab.channels"


def label_of(channels: Sequence[str]) -> dict[str, str]:
    """The label that keeps an image's channels."""
    return {LABEL: ",".join(channels)} if channels else {}


def declared_by(spec: MachineSpec) -> tuple[str, ...]:
    """The channels in a machine's label; vmlab's agent where nothing is said."""
    return tuple(filter(None, spec.labels.get(LABEL, "").split(","))) or ("agent",)


def channel_into(machine: Machine) -> CommandChannel:
    """What commands get into a machine's guest by; it is not open yet."""
    # Imported while the guest boots, and not before.
    from vmlab.guests.choice import ChosenChannel

    return ChosenChannel(machine, declared_by(machine.spec))
