"""All kinds of requests that can be carried out: importing this registers them."""

from vmlab.manager.networks import handlers as networks
from vmlab.manager.observer import handler as repairs
from vmlab.manager.operator import (
    attachments,
    clones,
    creation,
    disks,
    emergency,
    exports,
    imports,
    lifecycle,
    migrations,
    resizing,
    snapshots,
    templates,
)

__all__ = [
    "attachments",
    "clones",
    "creation",
    "disks",
    "emergency",
    "exports",
    "imports",
    "lifecycle",
    "migrations",
    "networks",
    "repairs",
    "resizing",
    "snapshots",
    "templates",
]
