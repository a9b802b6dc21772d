"""Alembic's entry: runs the migrations on the connection that `Database.upgrade` passes."""

from __future__ import annotations

from alembic import context

from adapters_store.tables import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    transactional_ddl=True,
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()
