"""Alembic migrations of the metadata database; `Database.upgrade` runs them."""
