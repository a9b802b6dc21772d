"""/metrics while a part of what it tells of is gone."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

from adapters_store.accounts import Accounts
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from gateway.metrics import FrontDoorMetrics, new_registry
from gateway.server.context import Readiness
from gateway.server.exposition import Exposition
from gateway.trainer.files import TrainingFiles
from gateway.trainer.job import FineTuningRequest
from gateway.trainer.jobs import FineTuningJobs
from tests.gateway.server.doors import Doors
from tests.gateway.server.test_http_server import TRAINING

_JOBS = b'patchbay_fine_tuning_jobs{status="validating_files"} 1.0'


def test_only_the_number_of_jobs_is_left_out_while_the_database_is_gone(doors: Doors, tmp_path: Path) -> None:
    folder = tmp_path / "database"
    database = Database(f"sqlite:///{folder / 'patchbay.db'}")
    database.upgrade()
    _create_job(database, BlobStore(f"file://{tmp_path / 'blobs'}"))
    registry = new_registry()
    router: Any = doors.router
    metrics = FrontDoorMetrics(registry, "door-1")
    exposition = Exposition(registry, metrics, router, database, Readiness(), aggregate=True)
    assert _JOBS in doors.run(exposition.text())
    database.dispose()
    away = shutil.move(folder, tmp_path / "away")
    text = doors.run(exposition.text())
    assert b"patchbay_fine_tuning_jobs{" not in text
    assert b"patchbay_connected_replicas{" in text
    assert b"vllm:num_requests_running" in text
    shutil.move(away, folder)
    assert _JOBS in doors.run(exposition.text())
    database.dispose()


def _create_job(database: Database, blobs: BlobStore) -> None:
    Accounts(database).create_tenant("acme")
    file = TrainingFiles(database, blobs).create("acme", "a.jsonl", "fine-tune", io.BytesIO(TRAINING), len(TRAINING))
    FineTuningJobs(database).create("acme", FineTuningRequest("base", file.id))
