"""Machines in one state are found in their order, and what they take of a host, by an index."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Replace the indexes of machines by state and by host with wider ones."""
    for name, columns in {
        "state": ["state", "name"],
        "host": ["host", "state", "vcpus", "memory"],
    }.items():
        op.drop_index(op.f(f"ix_machines_{name}"), "machines")
        op.create_index(op.f(f"ix_machines_{'_'.join(columns)}"), "machines", columns)
