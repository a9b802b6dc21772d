"""Which rows name a blob, and the removal of one that none names."""

from __future__ import annotations

from sqlalchemy import Connection, exists, or_, select

from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.tables import adapter_versions, training_files


def lock_blob(database: Database, connection: Connection, digest: str) -> None:
    """Hold a blob's lock until the transaction ends: it is neither removed nor newly named by others meanwhile."""
    database.lock(connection, f"blob {digest}")


def is_referenced(connection: Connection, digest: str) -> bool:
    """Whether a version or a training file has these bytes."""
    tables = (adapter_versions, training_files)
    references = or_(*(exists().where(table.c.digest == digest) for table in tables))
    return bool(connection.execute(select(references)).scalar_one())


def delete_unreferenced(database: Database, blobs: BlobStore, digest: str) -> bool:
    """Remove a blob unless something names it; whether it was. Call it when the row that named it is gone for good.

    Raises `StoreUnavailable`.
    """
    with database.write() as connection:
        lock_blob(database, connection, digest)
        if is_referenced(connection, digest):
            return False
        blobs.delete(digest)
    return True
