"""The lab: machines made ready for use, and commands run in them.

    from vmlab.lab import Lab

Knows hypervisors by their contract, images by their store and guests by their channels; how a
result is shown is the command line's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmlab.lab.given import LabDisk
    from vmlab.lab.laboratory import Lab, Observer
    from vmlab.lab.networks import LabNetwork
    from vmlab.lab.vm import VM

__all__ = ["Lab", "LabDisk", "LabNetwork", "Observer", "VM"]

_PLACES = {
    "Lab": "laboratory",
    "LabDisk": "given",
    "LabNetwork": "networks",
    "Observer": "laboratory",
    "VM": "vm",
}


def __getattr__(name: str) -> object:
    """The front door, which costs nobody anything who goes in by another one."""
    from importlib import import_module

    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
