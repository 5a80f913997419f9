"""Where Alembic begins: runs the versions on the connection that `migrations.upgrade` gives it."""

from __future__ import annotations

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    # SQLite changes a table by making a new one of it; its transactions hold such changes, too.
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
