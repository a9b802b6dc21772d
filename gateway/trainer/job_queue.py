"""A worker's view of fine-tune jobs: claim one, move it through its states, never run one twice at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, Connection, and_, or_, select, update

from adapters_store.database import Database
from adapters_store.tables import fine_tuning_events, fine_tuning_jobs
from gateway.trainer.hyperparameters import Hyperparameters
from gateway.trainer.job import FineTuningJob, JobError, JobStatus
from gateway.trainer.jobs import add_event, job_from_row
from gateway.trainer.step_metrics import StepMetrics

STALE_AFTER_SECONDS: Final = 30
"""A claim whose worker has given no sign of life for this long may be taken over."""

LeaseState = Literal["held", "cancel", "lost"]

_jobs = fine_tuning_jobs
_WORKER_LOST: Final = {"reason": "worker_lost"}


class JobLost(Exception):
    """The job is no longer this worker's: it was cancelled, or another worker took it over."""


class JobQueue:
    """The queue of all tenants' jobs, the oldest first.

    A transition is one UPDATE that names the state and the worker it starts from, so of two workers only one can make
    it; the loser gets `JobLost`. All methods raise `StoreUnavailable` when the database does not answer.
    """

    def __init__(self, database: Database, stale_after: int = STALE_AFTER_SECONDS) -> None:
        self._database = database
        self._stale_after = stale_after

    def claim_to_validate(self, worker: str) -> FineTuningJob | None:
        """Take the oldest job whose files nobody is checking."""
        return self._claim("validating_files", worker, {})

    def claim_to_run(self, worker: str) -> FineTuningJob | None:
        """Take the oldest queued job; it is then running."""
        return self._claim("queued", worker, {"status": "running", "started_at": int(time.time())})

    def queue(self, job: FineTuningJob, worker: str) -> None:
        """Its files are good: from `validating_files` to `queued`. Raises `JobLost`."""
        self._move(
            job,
            worker,
            ("validating_files",),
            {"status": "queued", **_RELEASED},
            "Files validated, moving job to queued state",
        )

    def set_hyperparameters(self, job: FineTuningJob, worker: str, used: Hyperparameters) -> None:
        """Show the values that "auto" became, while running. Raises `JobLost`."""
        values = {"hyperparameters": used.model_dump(mode="json")}
        self._move(job, worker, ("running",), values, "Fine-tuning job started")

    def succeed(
        self, connection: Connection, job: FineTuningJob, worker: str, fine_tuned_model: str, trained_tokens: int
    ) -> None:
        """From `running` to `succeeded`, in the transaction that publishes the model. Raises `JobLost`."""
        values = _ended("succeeded") | {
            "fine_tuned_model": fine_tuned_model,
            "trained_tokens": trained_tokens,
        }
        message = "The job has successfully completed"
        created = f"New fine-tuned model created: {fine_tuned_model}"
        _move(connection, job, worker, ("running",), values, created, message)

    def fail(self, job: FineTuningJob, worker: str, error: JobError) -> None:
        """From `validating_files` or `running` to `failed`. Raises `JobLost`."""
        values = _ended("failed") | {"error": vars(error)}
        self._move(job, worker, ("validating_files", "running"), values, error.message, level="error")

    def cancel(self, job: FineTuningJob, worker: str) -> None:
        """From `running` to `cancelled`, as its tenant asked. Raises `JobLost`."""
        self._move(job, worker, ("running",), _ended("cancelled"), "Fine-tuning job cancelled")

    def give_back(self, job: FineTuningJob, worker: str) -> None:
        """The worker stops: a running job is queued again, to start anew; a validation is free to take.

        Raises `JobLost`.
        """
        status = "queued" if job.status == "running" else job.status
        values = {"status": status, **_RELEASED}
        message = "The trainer is stopping; the job will start again from its beginning"
        self._move(job, worker, (job.status,), values, message, level="warn")

    def beat(self, job: FineTuningJob, worker: str, steps: Sequence[StepMetrics]) -> LeaseState:
        """Give a sign of life, store `steps` as events, and learn whether the job goes on."""
        held = and_(_jobs.c.id == job.id, _jobs.c.claimed_by == worker, _jobs.c.status == job.status)
        statement = update(_jobs).where(held).values(heartbeat_at=int(time.time()))
        with self._database.write() as connection:
            cancelled = connection.execute(statement.returning(_jobs.c.cancel_requested)).scalar_one_or_none()
            if cancelled is None:
                return "lost"
            if steps:
                _add_steps(connection, job.id, steps)
        return "cancel" if cancelled else "held"

    def recover(self) -> None:
        """End or queue again the running jobs whose workers are gone. A job gets one second chance."""
        stale = select(_jobs).where(_jobs.c.status == "running", self._is_stale())
        with self._database.read() as connection:  # an idle worker takes no write lock
            if connection.execute(stale.limit(1)).one_or_none() is None:
                return
        with self._database.write() as connection:
            for row in connection.execute(stale.with_for_update()).all():
                self._recover(connection, job_from_row(row))

    def _recover(self, connection: Connection, job: FineTuningJob) -> None:
        of_job = update(_jobs).where(_jobs.c.id == job.id)
        if job.cancel_requested:
            connection.execute(of_job.values(_ended("cancelled")))
            add_event(connection, job.id, "Fine-tuning job cancelled")
        elif _was_lost_before(connection, job.id):
            error = JobError("worker_lost", "The training process died twice on this job. Try a smaller batch_size.")
            connection.execute(of_job.values(_ended("failed") | {"error": vars(error)}))
            add_event(connection, job.id, error.message, level="error")
        else:
            connection.execute(of_job.values(status="queued", **_RELEASED))
            message = "The training process died; the job will start again from its beginning"
            add_event(connection, job.id, message, level="warn", data=_WORKER_LOST)

    def _claim(self, status: JobStatus, worker: str, values: dict[str, Any]) -> FineTuningJob | None:
        free = and_(_jobs.c.status == status, or_(_jobs.c.claimed_by.is_(None), self._is_stale()))
        oldest = select(_jobs.c.id).where(free).order_by(_jobs.c.created_at, _jobs.c.id).limit(1)
        claim = {"claimed_by": worker, "heartbeat_at": int(time.time())} | values
        with self._database.read() as connection:  # an idle worker takes no write lock
            if connection.execute(oldest).scalar_one_or_none() is None:
                return None
        with self._database.write() as connection:
            job_id = connection.execute(oldest.with_for_update(skip_locked=True)).scalar_one_or_none()
            statement = update(_jobs).where(_jobs.c.id == job_id, free).values(claim).returning(_jobs)
            row = connection.execute(statement).one_or_none()
        return None if row is None else job_from_row(row)

    def _is_stale(self) -> ColumnElement[bool]:
        return _jobs.c.heartbeat_at < int(time.time()) - self._stale_after

    def _move(
        self,
        job: FineTuningJob,
        worker: str,
        expected: tuple[JobStatus, ...],
        values: dict[str, Any],
        *messages: str,
        level: str = "info",
    ) -> None:
        with self._database.write() as connection:
            _move(connection, job, worker, expected, values, *messages, level=level)


def _move(
    connection: Connection,
    job: FineTuningJob,
    worker: str,
    expected: tuple[JobStatus, ...],
    values: dict[str, Any],
    *messages: str,
    level: str = "info",
) -> None:
    held = and_(_jobs.c.id == job.id, _jobs.c.claimed_by == worker, _jobs.c.status.in_(expected))
    if not connection.execute(update(_jobs).where(held).values(values)).rowcount:
        raise JobLost(job.id)
    for message in messages:
        add_event(connection, job.id, message, level=level)


_RELEASED: Final[dict[str, Any]] = {"claimed_by": None, "heartbeat_at": None}


def _ended(status: JobStatus) -> dict[str, Any]:
    return {"status": status, "finished_at": int(time.time())}


def _add_steps(connection: Connection, job_id: str, steps: Sequence[StepMetrics]) -> None:
    now = int(time.time())
    rows = [
        {
            "job_id": job_id,
            "created_at": now,
            "level": "info",
            "type": "metrics",
            "message": f"Step {m.step}/{m.total_steps}: training loss={m.train_loss:.2f}",
            "data": m.data(),
        }
        for m in steps
    ]
    connection.execute(fine_tuning_events.insert(), rows)


def _was_lost_before(connection: Connection, job_id: str) -> bool:
    events = fine_tuning_events.c
    query = select(events.data).where(events.job_id == job_id, events.level == "warn")
    return any(data == _WORKER_LOST for data in connection.execute(query).scalars())
