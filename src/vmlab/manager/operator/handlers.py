"""All kinds of requests that can be carried out: importing this registers them."""

from vmlab.manager.networks import handlers as networks
from vmlab.manager.observer import handler as repairs
from vmlab.manager.operator import (
    clones,
    creation,
    disks,
    emergency,
    exports,
    lifecycle,
    migrations,
    resizing,
    snapshots,
    templates,
)

__all__ = [
    "clones",
    "creation",
    "disks",
    "emergency",
    "exports",
    "lifecycle",
    "migrations",
    "networks",
    "repairs",
    "resizing",
    "snapshots",
    "templates",
]
