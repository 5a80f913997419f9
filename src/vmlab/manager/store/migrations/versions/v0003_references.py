"""What refers to an operation is found by an index: else forgetting one looks at all of them."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Index the columns that refer to operations and had no index yet."""
    op.create_index(op.f("ix_operations_undo_of"), "operations", ["undo_of"])
    op.create_index(op.f("ix_findings_operation_id"), "findings", ["operation_id"])
