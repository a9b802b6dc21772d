"""The trainer as a Ray Serve deployment: one process that runs fine-tune jobs, one after the other."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from sqlalchemy import select

from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.registry import AdapterRegistry
from adapters_store.reports import VersionReport
from adapters_store.tables import fine_tuning_jobs
from adapters_store.versions import AdapterVersion
from gateway.config import GatewayConfig
from gateway.errors import EngineUnavailable
from gateway.server.logs import configure_logging
from gateway.trainer.files import TrainingFiles

if TYPE_CHECKING:
    from gateway.trainer.worker import TrainerWorker

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.5
_ERROR_PAUSE_S: Final = 5.0
_STOP_S: Final = 10.0
_GRACE_S: Final = 10.0
_NICE: Final = 10  # serving goes first where both share the CPU


class TrainerReplica:
    """Claims jobs from the database and runs them on a thread. Takes no calls."""

    def __init__(self, config: GatewayConfig) -> None:
        configure_logging("trainer")
        os.nice(_NICE)
        self._config = config
        self._app = serve.get_replica_context().app_name
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trainer", daemon=True)
        self._thread.start()

    def check_health(self) -> None:
        """Called by Serve, which replaces a trainer that raises here."""
        if not self._thread.is_alive():
            raise RuntimeError("the trainer's thread has stopped")

    def __del__(self) -> None:
        """Called by Serve at shutdown: the running job goes back to the queue at its next step."""
        self._stop.set()
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        database = Database(self._config.store.database)
        self._until_stopped(lambda: _upgraded(database))
        self._until_stopped(lambda: _has_jobs(database))
        if not self._stop.is_set():
            worker = self._make_worker(database)
            while not self._stop.is_set():
                self._until_stopped(lambda: worker.run_next(self._stop))
        database.dispose()

    def _until_stopped(self, attempt: Callable[[], bool]) -> None:
        """Call `attempt` now and then until it returns true; a failure is logged and tried again later."""
        while not self._stop.is_set():
            try:
                if attempt():
                    return
                self._stop.wait(_POLL_S)
            except Exception:
                # A job's own failure ends that job; this is the database or the disk, which may come back.
                logger.exception("the trainer cannot go on; it tries again in %g s", _ERROR_PAUSE_S)
                self._stop.wait(_ERROR_PAUSE_S)

    def _make_worker(self, database: Database) -> TrainerWorker:
        # Torch takes seconds and 300 MB: it is imported here, at the first job.
        from gateway.trainer.worker import TrainerWorker

        store = self._config.store
        blobs = BlobStore(store.blobs, store.cache, store.cache_bytes)
        registry = AdapterRegistry(database, blobs)
        test = self._test if self._config.store.self_test else None
        return TrainerWorker(self._config, database, registry, TrainingFiles(database, blobs), test)

    def _test(self, version: AdapterVersion) -> VersionReport:
        """Have a front door test a version: it has the links to the replicas. Raises `EngineUnavailable`."""
        patience = self._config.store.self_test_timeout_s + _GRACE_S
        try:
            report: VersionReport = serve.get_app_handle(self._app).self_test.remote(version).result(timeout_s=patience)
        except EngineUnavailable:
            raise
        except (RayError, RayServeException, TimeoutError) as error:
            raise EngineUnavailable("No front door could test the version.") from error
        return report


def _upgraded(database: Database) -> bool:
    database.upgrade()
    return True


def _has_jobs(database: Database) -> bool:
    """Whether any job has not ended."""
    status = fine_tuning_jobs.c.status
    waiting = select(fine_tuning_jobs.c.id).where(status.in_(("validating_files", "queued", "running"))).limit(1)
    with database.read() as connection:
        return connection.execute(waiting).first() is not None
