"""A worker's hold on one job, kept by a thread of its own so that long steps do not look like death."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Final

from adapters_store.errors import StoreUnavailable
from gateway.trainer.job import FineTuningJob
from gateway.trainer.job_queue import STALE_AFTER_SECONDS, JobLost, JobQueue, LeaseState
from gateway.trainer.step_metrics import StepMetrics

BEAT_SECONDS: Final = 1.0

logger = logging.getLogger(__name__)


class JobCancelled(Exception):
    """The job's tenant asked for its end."""


class WorkerStopping(Exception):
    """The worker was told to stop."""


class JobLease:
    """Beats for a claimed job once a second, and with each beat stores the steps that were made since the last.

    Use it as a context manager, and `flush` before the job moves to another state. A database that does not answer for
    as long as a claim lives counts as the loss of the job, for another worker may have it by then.
    """

    def __init__(self, queue: JobQueue, job: FineTuningJob, worker: str, stop: threading.Event) -> None:
        self._queue = queue
        self._job = job
        self._worker = worker
        self._stop = stop
        self._steps: list[StepMetrics] = []
        self._lock = threading.Lock()
        self._state: LeaseState = "held"
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lease-{job.id}", daemon=True)

    def __enter__(self) -> JobLease:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()

    def check(self) -> None:
        """Raise `JobCancelled`, `JobLost` or `WorkerStopping` when the job must not go on."""
        if self._state == "lost":
            raise JobLost(self._job.id)
        if self._state == "cancel":
            raise JobCancelled(self._job.id)
        if self._stop.is_set():
            raise WorkerStopping(self._job.id)

    def record(self, step: StepMetrics) -> None:
        """Note a step for the job's events. Never waits for the database."""
        self._steps.append(step)

    def flush(self) -> None:
        """Beat now, storing every step noted so far. Raises `StoreUnavailable`."""
        with self._lock:
            steps = list(self._steps)
            self._state = self._queue.beat(self._job, self._worker, steps)
            del self._steps[: len(steps)]

    def _run(self) -> None:
        last_answer = time.monotonic()
        while not self._left.wait(BEAT_SECONDS):
            try:
                self.flush()
                last_answer = time.monotonic()
            except StoreUnavailable as error:
                logger.warning("no heartbeat for %s: %s", self._job.id, error)
                if time.monotonic() - last_answer > STALE_AFTER_SECONDS:
                    self._state = "lost"
