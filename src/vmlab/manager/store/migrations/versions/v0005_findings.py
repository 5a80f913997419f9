"""What the observer keeps of a finding for itself is not among the evidence that it tells."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Move what was looked at, and what a finding is about, to columns of their own."""
    op.add_column(
        "findings", sa.Column("source", sa.String(255), nullable=False, server_default="")
    )
    op.add_column(
        "findings",
        sa.Column("touches", sa.JSON(none_as_null=True), nullable=False, server_default="[]"),
    )
    table = sa.table(
        "findings",
        sa.column("id", sa.String),
        sa.column("evidence", sa.JSON),
        sa.column("source", sa.String),
        sa.column("touches", sa.JSON),
    )
    connection = op.get_bind()
    for id_, evidence in connection.execute(sa.select(table.c.id, table.c.evidence)).all():
        source, touches = evidence.pop("source", ""), evidence.pop("touches", [])
        connection.execute(
            sa.update(table)
            .where(table.c.id == id_)
            .values(evidence=evidence, source=source, touches=touches)
        )
