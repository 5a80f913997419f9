"""The first schema: machines and what belongs to them, operations, events, findings, users."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "counters",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_counters")),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(length=63), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=True),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("operation", sa.String(length=32), nullable=True),
        sa.Column("request_id", sa.String(length=255), nullable=True),
        sa.Column("data", sa.JSON(none_as_null=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
    )
    op.create_index(op.f("ix_events_subject"), "events", ["subject"], unique=False)
    op.create_table(
        "hosts",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("hypervisor", sa.String(length=63), nullable=False),
        sa.Column("options", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("available", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("breaker", sa.String(length=16), nullable=False),
        sa.Column("failures", sa.BigInteger(), nullable=False),
        sa.Column("limits", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "breaker IN ('closed', 'open', 'half-open')", name=op.f("ck_hosts_breaker")
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_hosts")),
    )
    op.create_table(
        "networks",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("mode", sa.String(length=16), nullable=False),
        sa.Column("vlan", sa.BigInteger(), nullable=True),
        sa.Column("bridge", sa.String(length=15), nullable=True),
        sa.Column("subnet", sa.String(length=49), nullable=True),
        sa.Column("subnet6", sa.String(length=49), nullable=True),
        sa.Column("gateway", sa.String(length=45), nullable=True),
        sa.Column("dns", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("ranges", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("reserved", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("dhcp", sa.Boolean(), nullable=False),
        sa.Column("data", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated", sa.DateTime(timezone=True), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "mode IN ('isolated', 'user', 'bridged')", name=op.f("ck_networks_mode")
        ),
        sa.CheckConstraint("vlan BETWEEN 1 AND 4094", name=op.f("ck_networks_vlan")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_networks")),
        sa.UniqueConstraint("name", name=op.f("uq_networks_name")),
    )
    op.create_table(
        "operations",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("dry_run", sa.Boolean(), nullable=False),
        sa.Column("target", sa.String(length=63), nullable=True),
        sa.Column("target_name", sa.String(length=255), nullable=True),
        sa.Column("lock_keys", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("request", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("result", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("attempts", sa.BigInteger(), nullable=False),
        sa.Column("cancelling", sa.Boolean(), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("request_id", sa.String(length=255), nullable=True),
        sa.Column("idempotency_key", sa.String(length=255), nullable=True),
        sa.Column("request_hash", sa.String(length=64), nullable=True),
        sa.Column("undo_of", sa.String(length=32), nullable=True),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deadline", sa.DateTime(timezone=True), nullable=True),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')",
            name=op.f("ck_operations_state"),
        ),
        sa.ForeignKeyConstraint(["undo_of"], ["operations.id"], name=op.f("fk_operations_undo_of")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_operations")),
        sa.UniqueConstraint(
            "actor", "idempotency_key", name=op.f("uq_operations_actor_idempotency_key")
        ),
        sa.UniqueConstraint("number", name=op.f("uq_operations_number")),
    )
    op.create_index(
        op.f("ix_operations_state_number"), "operations", ["state", "number"], unique=False
    )
    op.create_index(op.f("ix_operations_target"), "operations", ["target"], unique=False)
    op.create_table(
        "templates",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("image", sa.String(length=255), nullable=True),
        sa.Column("vcpus", sa.BigInteger(), nullable=False),
        sa.Column("memory", sa.BigInteger(), nullable=False),
        sa.Column("spec", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("labels", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_templates")),
        sa.UniqueConstraint("name", name=op.f("uq_templates_name")),
    )
    op.create_table(
        "users",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("disabled", sa.Boolean(), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("name", name=op.f("uq_users_name")),
    )
    op.create_table(
        "findings",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("code", sa.String(length=63), nullable=False),
        sa.Column("severity", sa.String(length=16), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("hint", sa.Text(), nullable=False),
        sa.Column("evidence", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("policy", sa.String(length=16), nullable=False),
        sa.Column("actions", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("first_seen", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_seen", sa.DateTime(timezone=True), nullable=False),
        sa.Column("resolved", sa.DateTime(timezone=True), nullable=True),
        sa.Column("operation_id", sa.String(length=32), nullable=True),
        sa.CheckConstraint(
            "severity IN ('info', 'warning', 'error', 'critical')",
            name=op.f("ck_findings_severity"),
        ),
        sa.ForeignKeyConstraint(
            ["operation_id"], ["operations.id"], name=op.f("fk_findings_operation_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_findings")),
    )
    op.create_index(
        op.f("ix_findings_first_seen_id"), "findings", ["first_seen", "id"], unique=False
    )
    op.create_index(
        "uq_findings_open",
        "findings",
        ["code", "subject"],
        unique=True,
        sqlite_where=sa.text("resolved IS NULL"),
        postgresql_where=sa.text("resolved IS NULL"),
    )
    op.create_table(
        "machines",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("wanted", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("host", sa.String(length=63), nullable=False),
        sa.Column("hypervisor", sa.String(length=63), nullable=False),
        sa.Column("template_id", sa.String(length=32), nullable=True),
        sa.Column("image", sa.String(length=255), nullable=True),
        sa.Column("architecture", sa.String(length=16), nullable=False),
        sa.Column("vcpus", sa.BigInteger(), nullable=False),
        sa.Column("memory", sa.BigInteger(), nullable=False),
        sa.Column("spec", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("labels", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("policy", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("metadata", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("operation_id", sa.String(length=32), nullable=True),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "wanted IN ('running', 'paused', 'stopped')", name=op.f("ck_machines_wanted")
        ),
        sa.ForeignKeyConstraint(["host"], ["hosts.name"], name=op.f("fk_machines_host")),
        sa.ForeignKeyConstraint(
            ["operation_id"], ["operations.id"], name=op.f("fk_machines_operation_id")
        ),
        sa.ForeignKeyConstraint(
            ["template_id"], ["templates.id"], name=op.f("fk_machines_template_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_machines")),
        sa.UniqueConstraint("name", name=op.f("uq_machines_name")),
    )
    op.create_index(op.f("ix_machines_host"), "machines", ["host"], unique=False)
    op.create_index(op.f("ix_machines_state"), "machines", ["state"], unique=False)
    op.create_index(op.f("ix_machines_template_id"), "machines", ["template_id"], unique=False)
    op.create_table(
        "steps",
        sa.Column("operation_id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("started", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended", sa.DateTime(timezone=True), nullable=True),
        sa.Column("data", sa.JSON(none_as_null=True), nullable=False),
        sa.CheckConstraint(
            "state IN ('planned', 'running', 'done', 'undone', 'failed', 'skipped')",
            name=op.f("ck_steps_state"),
        ),
        sa.ForeignKeyConstraint(
            ["operation_id"],
            ["operations.id"],
            name=op.f("fk_steps_operation_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("operation_id", "name", name=op.f("pk_steps")),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("user_id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("hash", sa.String(length=128), nullable=False),
        sa.Column("scope", sa.String(length=16), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("scope IN ('read', 'operate', 'admin')", name=op.f("ck_tokens_scope")),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("fk_tokens_user_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("hash", name=op.f("uq_tokens_hash")),
    )
    op.create_index(op.f("ix_tokens_user_id"), "tokens", ["user_id"], unique=False)
    op.create_table(
        "disks",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("format", sa.String(length=8), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("machine_id", sa.String(length=32), nullable=True),
        sa.Column("device", sa.String(length=63), nullable=True),
        sa.Column("bus", sa.String(length=8), nullable=True),
        sa.Column("readonly", sa.Boolean(), nullable=False),
        sa.Column("mount_point", sa.Text(), nullable=True),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated", sa.DateTime(timezone=True), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("format IN ('raw', 'qcow2')", name=op.f("ck_disks_format")),
        sa.CheckConstraint("size >= 0", name=op.f("ck_disks_size")),
        sa.ForeignKeyConstraint(["machine_id"], ["machines.id"], name=op.f("fk_disks_machine_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_disks")),
        sa.UniqueConstraint("machine_id", "device", name=op.f("uq_disks_machine_id_device")),
        sa.UniqueConstraint("name", name=op.f("uq_disks_name")),
    )
    op.create_index(op.f("ix_disks_machine_id"), "disks", ["machine_id"], unique=False)
    op.create_table(
        "nics",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("machine_id", sa.String(length=32), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("mode", sa.String(length=16), nullable=False),
        sa.Column("network_id", sa.String(length=32), nullable=True),
        sa.Column("mac", sa.String(length=17), nullable=False),
        sa.Column("requested_address", sa.String(length=45), nullable=True),
        sa.Column("data", sa.JSON(none_as_null=True), nullable=False),
        sa.CheckConstraint(
            "(mode = 'network') = (network_id IS NOT NULL)", name=op.f("ck_nics_network")
        ),
        sa.CheckConstraint("mode IN ('network', 'user', 'none')", name=op.f("ck_nics_mode")),
        sa.ForeignKeyConstraint(
            ["machine_id"], ["machines.id"], name=op.f("fk_nics_machine_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["network_id"], ["networks.id"], name=op.f("fk_nics_network_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_nics")),
        sa.UniqueConstraint("mac", name=op.f("uq_nics_mac")),
        sa.UniqueConstraint("machine_id", "name", name=op.f("uq_nics_machine_id_name")),
    )
    op.create_index(op.f("ix_nics_network_id"), "nics", ["network_id"], unique=False)
    op.create_table(
        "reservations",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("operation_id", sa.String(length=32), nullable=False),
        sa.Column("machine_id", sa.String(length=32), nullable=True),
        sa.Column("host", sa.String(length=63), nullable=True),
        sa.Column("vcpus", sa.BigInteger(), nullable=False),
        sa.Column("memory", sa.BigInteger(), nullable=False),
        sa.Column("disk", sa.BigInteger(), nullable=False),
        sa.Column("machines", sa.BigInteger(), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["host"], ["hosts.name"], name=op.f("fk_reservations_host")),
        sa.ForeignKeyConstraint(
            ["machine_id"],
            ["machines.id"],
            name=op.f("fk_reservations_machine_id"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["operation_id"],
            ["operations.id"],
            name=op.f("fk_reservations_operation_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reservations")),
    )
    op.create_index(
        op.f("ix_reservations_operation_id"), "reservations", ["operation_id"], unique=False
    )
    op.create_table(
        "snapshots",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("machine_id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("memory", sa.Boolean(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=True),
        sa.Column("scheduled", sa.Boolean(), nullable=False),
        sa.Column("expires", sa.DateTime(timezone=True), nullable=True),
        sa.Column("data", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["machine_id"],
            ["machines.id"],
            name=op.f("fk_snapshots_machine_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_snapshots")),
        sa.UniqueConstraint("machine_id", "name", name=op.f("uq_snapshots_machine_id_name")),
    )
    op.create_table(
        "addresses",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("network_id", sa.String(length=32), nullable=False),
        sa.Column("address", sa.String(length=45), nullable=False),
        sa.Column("number", sa.String(length=33), nullable=False),
        sa.Column("machine_id", sa.String(length=32), nullable=True),
        sa.Column("nic_id", sa.String(length=32), nullable=True),
        sa.Column("mac", sa.String(length=17), nullable=True),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["machine_id"],
            ["machines.id"],
            name=op.f("fk_addresses_machine_id"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["network_id"],
            ["networks.id"],
            name=op.f("fk_addresses_network_id"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["nic_id"], ["nics.id"], name=op.f("fk_addresses_nic_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_addresses")),
        sa.UniqueConstraint("network_id", "address", name=op.f("uq_addresses_network_id_address")),
    )
    op.create_index(op.f("ix_addresses_machine_id"), "addresses", ["machine_id"], unique=False)
    op.create_index(
        op.f("ix_addresses_network_id_number"), "addresses", ["network_id", "number"], unique=False
    )
    op.create_index(op.f("ix_addresses_nic_id"), "addresses", ["nic_id"], unique=False)
