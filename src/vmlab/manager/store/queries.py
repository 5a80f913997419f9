"""What the store is asked: rows by name or id for those who change them, documents for the rest.

Each function takes the session of a transaction first. A list costs the same few queries however
many items it has. What is not found is told with the names that come close.
"""

from __future__ import annotations

from vmlab.manager.store.listings import (
    list_addresses,
    list_disks,
    list_events,
    list_findings,
    list_hosts,
    list_machines,
    list_networks,
    list_operations,
    list_snapshots,
    list_templates,
)
from vmlab.manager.store.lookup import (
    find_disk,
    find_finding,
    find_host,
    find_machine,
    find_network,
    find_operation,
    find_snapshot,
    find_template,
)
from vmlab.manager.store.told import (
    address_document,
    crowds,
    disk_document,
    event_document,
    finding_document,
    host_document,
    machine_document,
    network_document,
    operation_document,
    snapshot_document,
    template_document,
)

__all__ = [
    "address_document",
    "crowds",
    "disk_document",
    "event_document",
    "find_disk",
    "find_finding",
    "find_host",
    "find_machine",
    "find_network",
    "find_operation",
    "find_snapshot",
    "find_template",
    "finding_document",
    "host_document",
    "list_addresses",
    "list_disks",
    "list_events",
    "list_findings",
    "list_hosts",
    "list_machines",
    "list_networks",
    "list_operations",
    "list_snapshots",
    "list_templates",
    "machine_document",
    "network_document",
    "operation_document",
    "snapshot_document",
    "template_document",
]
