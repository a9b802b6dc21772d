"""The files that tenants train on: bytes in the blob store, metadata in SQL."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from sqlalchemy import Connection, Row, and_, delete, insert, or_, select, update

from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.errors import UploadTooLarge
from adapters_store.names import is_id
from adapters_store.references import delete_unreferenced, lock_blob
from adapters_store.tables import fine_tuning_jobs, training_files
from gateway.errors import Conflict, InvalidRequest, NotFound
from gateway.trainer.job import FINAL_STATUSES
from gateway.trainer.jobs import random_id

PURPOSE: Final = "fine-tune"
MAX_FILENAME: Final = 255
_CHUNK: Final = 1 << 20
_files = training_files


@dataclass(frozen=True)
class TrainingFile:
    """One uploaded file. bytes: its size. digest: SHA-256 in hex. created_at: unix seconds.

    status: "uploaded" while its bytes are being stored, then "processed".
    """

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    digest: str
    status: Literal["uploaded", "processed"]
    created_at: int


class TrainingFiles:
    """The files of all tenants; every method sees one tenant's alone. Safe to use from any thread.

    Every method may raise `StoreUnavailable`.
    """

    def __init__(self, database: Database, blobs: BlobStore) -> None:
        self._database = database
        self._blobs = blobs

    def create(self, tenant: str, filename: str, purpose: str, source: BinaryIO, max_bytes: int) -> TrainingFile:
        """Store what `source` holds, in bounded memory; its lines are checked when a job uses it.

        Raises `InvalidRequest` (another purpose, an empty file) or `UploadTooLarge`; then nothing is kept.
        """
        if purpose != PURPOSE:
            raise InvalidRequest(f"The purpose must be {PURPOSE!r}, not {purpose[:80]!r}.", param="purpose")
        handle, name = tempfile.mkstemp(prefix="patchbay-file-")
        try:
            with os.fdopen(handle, "wb") as target:
                digest, size = _spool(source, target, max_bytes)
            return self._store(tenant, _clean(filename), Path(name), digest, size)
        finally:
            Path(name).unlink(missing_ok=True)

    def get(self, tenant: str, file_id: str) -> TrainingFile:
        """One file. Raises `NotFound`."""
        if not is_id(file_id):
            raise _not_found(file_id)
        query = select(_files).where(_files.c.id == file_id, _files.c.tenant == tenant)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise _not_found(file_id)
        return _file_from_row(row)

    def list(self, tenant: str, *, after: str | None = None, limit: int = 10_000) -> tuple[list[TrainingFile], bool]:
        """Up to `limit` files, the newest first, from behind file `after`; and whether there are more.

        Raises `NotFound` when `after` is no file.
        """
        query = select(_files).where(_files.c.tenant == tenant)
        if after is not None:
            last = self.get(tenant, after)
            same_second = and_(_files.c.created_at == last.created_at, _files.c.id < last.id)
            query = query.where(or_(_files.c.created_at < last.created_at, same_second))
        query = query.order_by(_files.c.created_at.desc(), _files.c.id.desc()).limit(limit + 1)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return [_file_from_row(row) for row in rows[:limit]], len(rows) > limit

    def open(self, tenant: str, file_id: str) -> BinaryIO:
        """The file's bytes, checked against their digest. Raises `NotFound`, or `StoreError` for damaged bytes."""
        return self._blobs.open(self.get(tenant, file_id).digest)

    def delete(self, tenant: str, file_id: str) -> None:
        """Remove a file, and its bytes unless something else has the same.

        Raises `NotFound`, or `Conflict` while a job that has not ended needs it.
        """
        digest = self.get(tenant, file_id).digest
        with self._database.write() as connection:
            job_id = _job_using(connection, file_id)
            if job_id is not None:
                raise Conflict(f"The job {job_id} still needs the file {file_id}. Cancel it or wait for its end.")
            is_mine = and_(_files.c.id == file_id, _files.c.tenant == tenant)
            connection.execute(delete(_files).where(is_mine))
        delete_unreferenced(self._database, self._blobs, digest)

    def _store(self, tenant: str, filename: str, path: Path, digest: str, size: int) -> TrainingFile:
        file = TrainingFile(
            f"file-{random_id()}", tenant, filename, PURPOSE, size, digest, "processed", int(time.time())
        )
        # The row comes first, so that from here on no delete of equal bytes takes the blob away.
        with self._database.write() as connection:
            lock_blob(self._database, connection, digest)
            connection.execute(insert(_files).values(vars(file) | {"status": "uploaded"}))
        is_file = _files.c.id == file.id
        try:
            self._blobs.put(digest, path)
        except BaseException:
            with self._database.write() as connection:
                connection.execute(delete(_files).where(is_file))
            raise
        with self._database.write() as connection:
            connection.execute(update(_files).where(is_file).values(status="processed"))
        return file


def _spool(source: BinaryIO, target: BinaryIO, max_bytes: int) -> tuple[str, int]:
    """Copy in chunks; the SHA-256 and the size of what was copied."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        size += len(chunk)
        if size > max_bytes:
            raise UploadTooLarge("the training file", max_bytes)
        digest.update(chunk)
        target.write(chunk)
    if not size:
        raise InvalidRequest("The file is empty.", param="file")
    return digest.hexdigest(), size


def _clean(filename: str) -> str:
    """A name fit for display: no folders, no control characters."""
    base = filename.replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in base if c.isprintable())[:MAX_FILENAME] or "file.jsonl"


def _job_using(connection: Connection, file_id: str) -> str | None:
    jobs = fine_tuning_jobs.c
    query = select(jobs.id).where(
        or_(jobs.training_file == file_id, jobs.validation_file == file_id),
        jobs.status.not_in(FINAL_STATUSES),
    )
    job_id: str | None = connection.execute(query.limit(1)).scalar_one_or_none()
    return job_id


def _file_from_row(row: Row[Any]) -> TrainingFile:
    return TrainingFile(**row._mapping)


def _not_found(file_id: str) -> NotFound:
    return NotFound(f"No such file object: {file_id}", param="file_id")
