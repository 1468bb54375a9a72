"""What Alembic runs: migrations on the connection that flowbridge has open."""

from alembic import context

from flowbridge.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
