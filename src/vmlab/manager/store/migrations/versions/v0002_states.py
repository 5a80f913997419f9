"""States of machines and disks are those that there are; what is under way is found by an index."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_MACHINES = (
    "created",
    "starting",
    "running",
    "pausing",
    "paused",
    "resuming",
    "stopping",
    "stopped",
    "restarting",
    "snapshotting",
    "restoring",
    "migrating",
    "failed",
    "deleting",
    "deleted",
    "unknown",
)
_DISKS = ("creating", "available", "attaching", "attached", "detaching", "deleting", "failed")


def upgrade() -> None:
    """Refuse other states; what is in one is unknown, or failed."""
    _restrict("machines", _MACHINES, "unknown")
    _restrict("disks", _DISKS, "failed")
    op.create_index(op.f("ix_machines_operation_id"), "machines", ["operation_id"])


def _restrict(name: str, states: tuple[str, ...], otherwise: str) -> None:
    table = sa.table(
        name, sa.column("state", sa.String), sa.column("reason", sa.Text), sa.column("version")
    )
    op.execute(
        sa.update(table)
        .where(table.c.state.not_in(states))
        .values(
            state=otherwise,
            reason=sa.literal("its state was written down as ") + table.c.state,
            version=table.c.version + 1,
        )
    )
    with op.batch_alter_table(name) as batch:
        listed = ", ".join(f"'{state}'" for state in states)
        batch.create_check_constraint(op.f(f"ck_{name}_state"), f"state IN ({listed})")
