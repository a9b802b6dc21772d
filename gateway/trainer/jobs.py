"""A tenant's view of fine-tune jobs: create, read, cancel. What a worker does with them is in `job_queue`."""

from __future__ import annotations

import secrets
import string
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Row, and_, or_, select, update

from adapters_store.database import Database
from adapters_store.errors import InvalidName
from adapters_store.names import check_name, is_id
from adapters_store.tables import fine_tuning_events, fine_tuning_jobs, training_files
from gateway.errors import Conflict, InvalidRequest, NotFound
from gateway.trainer.hyperparameters import Hyperparameters, PeftOptions
from gateway.trainer.job import FineTuningEvent, FineTuningJob, FineTuningRequest, JobError

BASE62: Final = string.digits + string.ascii_letters
MAX_SEED: Final = (1 << 31) - 1
_jobs = fine_tuning_jobs
_events = fine_tuning_events


class FineTuningJobs:
    """The jobs of all tenants; every method sees one tenant's alone. Safe to use from any thread.

    All methods raise `StoreUnavailable` when the database does not answer.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, tenant: str, request: FineTuningRequest) -> FineTuningJob:
        """Store a new job in `validating_files`, for a worker to find.

        Raises `InvalidRequest` for a file that this tenant has not uploaded or a name that no adapter can have.
        """
        _check_suffix(request.suffix)
        job_id = f"ftjob-{random_id()}"
        with self._database.write() as connection:
            _check_file(connection, tenant, request.training_file, "training_file")
            if request.validation_file is not None:
                _check_file(connection, tenant, request.validation_file, "validation_file")
            connection.execute(_jobs.insert().values(_new_row(job_id, tenant, request)))
            add_event(connection, job_id, f"Created fine-tuning job: {job_id}")
        return self.get(tenant, job_id)

    def get(self, tenant: str, job_id: str) -> FineTuningJob:
        """One job. Raises `NotFound`."""
        _check_id(job_id)
        query = select(_jobs).where(_jobs.c.id == job_id, _jobs.c.tenant == tenant)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise _not_found(job_id)
        return job_from_row(row)

    def list(self, tenant: str, *, after: str | None = None, limit: int = 20) -> tuple[list[FineTuningJob], bool]:
        """Up to `limit` jobs, the newest first, from behind job `after`; and whether there are more.

        Raises `NotFound` when `after` is no job.
        """
        query = select(_jobs).where(_jobs.c.tenant == tenant)
        if after is not None:
            last = self.get(tenant, after)
            older = _jobs.c.created_at < last.created_at
            query = query.where(or_(older, and_(_jobs.c.created_at == last.created_at, _jobs.c.id < last.id)))
        query = query.order_by(_jobs.c.created_at.desc(), _jobs.c.id.desc()).limit(limit + 1)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return [job_from_row(row) for row in rows[:limit]], len(rows) > limit

    def cancel(self, tenant: str, job_id: str) -> FineTuningJob:
        """End a waiting job now; ask a running one's worker to end it at its next step.

        Raises `NotFound`, or `Conflict` when the job has ended already.
        """
        _check_id(job_id)
        mine = and_(_jobs.c.id == job_id, _jobs.c.tenant == tenant)
        waiting = update(_jobs).where(mine, _jobs.c.status.in_(("validating_files", "queued")))
        running = update(_jobs).where(mine, _jobs.c.status == "running")
        with self._database.write() as connection:
            ended = connection.execute(
                waiting.values(status="cancelled", cancel_requested=True, finished_at=int(time.time()))
            ).rowcount
            asked = ended or connection.execute(running.values(cancel_requested=True)).rowcount
            if asked:
                message = "Fine-tuning job cancelled" if ended else "Cancellation requested"
                add_event(connection, job_id, message)
        job = self.get(tenant, job_id)
        if not asked:
            raise Conflict(f"The job {job_id} has ended already (status {job.status}).")
        return job

    def events(self, tenant: str, job_id: str, *, after: int = 0, limit: int = 1000) -> Sequence[FineTuningEvent]:
        """Up to `limit` events with numbers above `after`, the oldest first: what a stream sends. Raises `NotFound`."""
        self.get(tenant, job_id)
        query = select(_events).where(_events.c.job_id == job_id, _events.c.id > after)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(_events.c.id).limit(limit)).all()
        return [_event_from_row(row) for row in rows]

    def latest_events(
        self, tenant: str, job_id: str, *, before: int | None = None, limit: int = 20
    ) -> tuple[Sequence[FineTuningEvent], bool]:
        """Up to `limit` events with numbers below `before`, the newest first: what a list shows; and whether there
        are more. Raises `NotFound`."""
        self.get(tenant, job_id)
        query = select(_events).where(_events.c.job_id == job_id)
        if before is not None:
            query = query.where(_events.c.id < before)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(_events.c.id.desc()).limit(limit + 1)).all()
        return [_event_from_row(row) for row in rows[:limit]], len(rows) > limit


def random_id() -> str:
    """24 random base62 characters."""
    return "".join(secrets.choice(BASE62) for _ in range(24))


def add_event(
    connection: Connection,
    job_id: str,
    message: str,
    *,
    level: str = "info",
    type: str = "message",
    data: Mapping[str, Any] | None = None,
) -> None:
    """Append one event to a job's log, inside the caller's transaction. PostgreSQL keeps no NUL, which is shown."""
    connection.execute(
        _events.insert().values(
            job_id=job_id,
            created_at=int(time.time()),
            level=level,
            type=type,
            message=message.replace("\0", "\\0"),
            data=None if data is None else dict(data),
        )
    )


def job_from_row(row: Row[Any]) -> FineTuningJob:
    """The job that a row of `fine_tuning_jobs` holds."""
    fields = dict(row._mapping)
    del fields["method"]  # always supervised, with these hyperparameters
    error = fields.pop("error")
    return FineTuningJob(
        **fields
        | {
            "hyperparameters": Hyperparameters.model_validate(fields["hyperparameters"]),
            "peft": PeftOptions.model_validate(fields["peft"]),
            "error": None if error is None else JobError(**error),
        }
    )


def _event_from_row(row: Row[Any]) -> FineTuningEvent:
    return FineTuningEvent(
        number=row.id,
        job_id=row.job_id,
        created_at=row.created_at,
        level=row.level,
        type=row.type,
        message=row.message,
        data=row.data or {},
    )


def _new_row(job_id: str, tenant: str, request: FineTuningRequest) -> dict[str, Any]:
    hyperparameters = request.hyperparameters.model_dump(mode="json")
    return {
        "id": job_id,
        "tenant": tenant,
        "model": request.model,
        "suffix": request.suffix,
        "training_file": request.training_file,
        "validation_file": request.validation_file,
        "seed": secrets.randbelow(MAX_SEED) if request.seed is None else request.seed,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised"},
        "peft": request.peft.model_dump(mode="json"),
        "metadata": dict(request.metadata),
        "status": "validating_files",
        "created_at": int(time.time()),
        "cancel_requested": False,
    }


def _check_id(job_id: str) -> None:
    if not is_id(job_id):
        raise _not_found(job_id)


def _not_found(job_id: str) -> NotFound:
    return NotFound(f"No fine-tuning job {job_id!r}.", param="fine_tuning_job_id")


def _check_suffix(suffix: str | None) -> None:
    if suffix is not None:
        try:
            check_name("suffix", suffix)
        except InvalidName as error:
            raise InvalidRequest(str(error), param="suffix") from None


def _check_file(connection: Connection, tenant: str, file_id: str, param: str) -> None:
    files = training_files.c
    query = select(files.purpose, files.status).where(files.id == file_id, files.tenant == tenant)
    row = connection.execute(query).one_or_none() if is_id(file_id) else None
    if row is None:
        raise InvalidRequest(f"No file {file_id!r}; upload it first (purpose fine-tune).", param=param)
    if row.purpose != "fine-tune" or row.status != "processed":
        raise InvalidRequest(
            f"The file {file_id} cannot be trained on: its purpose is {row.purpose!r} and its status {row.status!r}.",
            param=param,
        )
