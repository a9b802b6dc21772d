from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters_store.accounts import Accounts
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.registry import AdapterRegistry
from adapters_store.reports import VersionReport
from adapters_store.versions import AdapterVersion
from adapters_store.weights import load_weights
from gateway.config import EngineConfig, GatewayConfig, StoreConfig, TrainerConfig
from gateway.errors import EngineUnavailable
from gateway.trainer import lease
from gateway.trainer.files import TrainingFiles
from gateway.trainer.hyperparameters import Hyperparameters, PeftOptions
from gateway.trainer.job import FineTuningJob, FineTuningRequest
from gateway.trainer.jobs import FineTuningJobs
from gateway.trainer.training_base import TrainingBase
from gateway.trainer.worker import TrainerWorker
from tests.gateway.trainer.tiny import colour_lines

Submit = Callable[..., FineTuningJob]


@pytest.fixture
def registry(database: Database, blobs: BlobStore) -> AdapterRegistry:
    return AdapterRegistry(database, blobs)


@pytest.fixture
def jobs(database: Database) -> FineTuningJobs:
    return FineTuningJobs(database)


@pytest.fixture
def worker(
    engine_config: EngineConfig,
    database: Database,
    registry: AdapterRegistry,
    files: TrainingFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> TrainerWorker:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    config = GatewayConfig(
        engine=engine_config,
        store=StoreConfig(data_dir=str(tmp_path)),
        trainer=TrainerConfig(torch_threads=1, max_steps=5000, max_seq_len=64),
    )
    return TrainerWorker(config, database, registry, files)


@pytest.fixture
def submit(jobs: FineTuningJobs, upload: Callable[..., str], base: TrainingBase) -> Submit:
    def create(content: bytes | None = None, **fields: Any) -> FineTuningJob:
        values = {"model": base.name, "training_file": upload(content), "peft": PeftOptions(r=4)} | fields
        return jobs.create("acme", FineTuningRequest(**values))

    return create


def long_job(submit: Submit) -> FineTuningJob:
    return submit(hyperparameters=Hyperparameters(n_epochs=50, batch_size=1))


def in_background(worker: TrainerWorker, stop: threading.Event) -> threading.Thread:
    thread = threading.Thread(target=worker.run_next, args=(stop,))
    thread.start()
    return thread


def wait_for_steps(jobs: FineTuningJobs, job: FineTuningJob) -> None:
    while not any(event.type == "metrics" for event in jobs.events("acme", job.id)):
        assert not jobs.get("acme", job.id).finished
        time.sleep(0.02)


def test_a_job_becomes_a_version_that_the_alias_names(
    worker: TrainerWorker,
    submit: Submit,
    jobs: FineTuningJobs,
    registry: AdapterRegistry,
    blobs: BlobStore,
    upload: Callable[..., str],
    tmp_path: Path,
) -> None:
    hyperparameters = Hyperparameters(n_epochs=2, batch_size=8)
    job = submit(suffix="colours", hyperparameters=hyperparameters, validation_file=upload(colour_lines(4)))
    stop = threading.Event()
    assert worker.run_next(stop)
    done = jobs.get("acme", job.id)
    assert (done.status, done.error) == ("succeeded", None)
    assert done.fine_tuned_model == "acme/colours:1"
    assert done.trained_tokens is not None
    assert done.trained_tokens > 2 * 24 * 20
    assert done.hyperparameters.learning_rate_multiplier == 1.0

    version = registry.resolve("acme", "acme/colours")
    assert version.ref == done.fine_tuned_model
    weights = load_weights(blobs.local_path(version.digest))
    assert weights.rank == 4
    assert len(weights.tensors) == 2 * 7
    assert any(b.abs().sum() > 0 for _, b in weights.tensors.values())

    steps = [event.data for event in jobs.events("acme", job.id) if event.type == "metrics"]
    assert [data["step"] for data in steps] == [1, 2, 3, 4, 5, 6]
    assert {"train_loss", "train_mean_token_accuracy", "tokens_per_second", "learning_rate"} <= steps[0].keys()
    assert "valid_loss" in steps[-1]

    again = submit(suffix="colours", hyperparameters=hyperparameters)
    worker.run_next(stop)
    assert jobs.get("acme", again.id).fine_tuned_model == "acme/colours:2"
    assert registry.resolve("acme", "acme/colours").version == 2
    assert not worker.run_next(stop)
    assert list((tmp_path / "staging").iterdir()) == []


def test_what_a_job_made_is_tested_first_and_waits_for_a_replica(
    worker: TrainerWorker, submit: Submit, jobs: FineTuningJobs, registry: AdapterRegistry
) -> None:
    tested: list[str] = []

    def test(version: AdapterVersion) -> VersionReport:
        tested.append(version.ref)
        if len(tested) == 1:
            raise EngineUnavailable("no replica yet")
        return VersionReport(passed=len(tested) == 2, tested_at=0, reason="for a test")

    worker._test = test
    hyperparameters = Hyperparameters(n_epochs=1)
    first = submit(suffix="colours", hyperparameters=hyperparameters)
    worker.run_next(threading.Event())
    assert jobs.get("acme", first.id).fine_tuned_model == "acme/colours:2" == tested[1]
    second = submit(suffix="colours", hyperparameters=hyperparameters)
    worker.run_next(threading.Event())
    failed = jobs.get("acme", second.id)
    assert (failed.status, failed.fine_tuned_model) == ("failed", None)
    assert failed.error is not None
    assert failed.error.code == "self_test_failed"
    info = registry.get("acme", "colours")
    assert ([v.status for v in info.versions], info.aliases) == (["ready", "quarantined"], {"default": 2})


def test_a_job_without_suffix_gets_a_name_and_the_alias_it_asked_for(
    worker: TrainerWorker, submit: Submit, jobs: FineTuningJobs, registry: AdapterRegistry
) -> None:
    options = PeftOptions(r=2, target_modules=("q_proj",), alias="candidate")
    job = submit(hyperparameters=Hyperparameters(n_epochs=1), peft=options)
    worker.run_next(threading.Event())
    model = jobs.get("acme", job.id).fine_tuned_model
    assert model == f"acme/ft-{job.id[6:].lower()}:1"
    version = registry.resolve("acme", model.replace(":1", "@candidate"))
    assert version.ref == model
    assert version.manifest.target_modules == ("q_proj",)


def test_bad_files_fail_their_jobs_with_the_lines_and_the_next_job_runs(
    worker: TrainerWorker, submit: Submit, jobs: FineTuningJobs, upload: Callable[..., str]
) -> None:
    bad = colour_lines(11) + b'{"messages": []}\n'
    first, second = submit(bad), submit(validation_file=upload(bad))
    good = submit(hyperparameters=Hyperparameters(n_epochs=1))
    worker.run_next(threading.Event())
    for job, param in ((first, "training_file"), (second, "validation_file")):
        failed = jobs.get("acme", job.id)
        assert failed.status == "failed"
        assert failed.error is not None
        assert (failed.error.code, failed.error.param) == ("invalid_training_file", param)
        assert "line 12: messages" in failed.error.message
        assert jobs.events("acme", job.id)[-1].level == "error"
    assert jobs.get("acme", good.id).status == "succeeded"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "acme/other"}, "model"),
        ({"peft": PeftOptions(r=9)}, "peft.r"),
        ({"hyperparameters": Hyperparameters(n_epochs=50, batch_size=1), "training_file": None}, "hyperparameters"),
    ],
)
def test_jobs_that_may_not_run_fail_before_they_start(
    worker: TrainerWorker,
    submit: Submit,
    jobs: FineTuningJobs,
    upload: Callable[..., str],
    database: Database,
    fields: dict[str, Any],
    param: str,
) -> None:
    Accounts(database).create_tenant("small", max_rank=8)
    lines = colour_lines(120) if "training_file" in fields else colour_lines()
    request = {"model": submit().model, "peft": PeftOptions(r=8)} | fields
    request["training_file"] = upload(lines, tenant="small")
    job = jobs.create("small", FineTuningRequest(**request))
    for other in jobs.list("acme")[0]:
        jobs.cancel("acme", other.id)
    worker.run_next(threading.Event())
    failed = jobs.get("small", job.id)
    assert (failed.status, failed.started_at) == ("failed", None)
    assert failed.error is not None
    assert failed.error.param == param


def test_a_running_job_ends_at_its_tenants_word_and_publishes_nothing(
    worker: TrainerWorker, submit: Submit, jobs: FineTuningJobs, registry: AdapterRegistry
) -> None:
    job = long_job(submit)
    thread = in_background(worker, threading.Event())
    wait_for_steps(jobs, job)
    jobs.cancel("acme", job.id)
    thread.join(timeout=30)
    assert not thread.is_alive()
    done = jobs.get("acme", job.id)
    assert (done.status, done.fine_tuned_model) == ("cancelled", None)
    assert not registry.list("acme")
    last = [event.data["step"] for event in jobs.events("acme", job.id) if event.type == "metrics"][-1]
    assert last < 1200


def test_a_stopping_worker_hands_its_job_to_the_next(
    worker: TrainerWorker, submit: Submit, jobs: FineTuningJobs
) -> None:
    job = long_job(submit)
    stop = threading.Event()
    thread = in_background(worker, stop)
    wait_for_steps(jobs, job)
    stop.set()
    thread.join(timeout=30)
    assert not thread.is_alive()
    waiting = jobs.get("acme", job.id)
    assert (waiting.status, waiting.claimed_by) == ("queued", None)


def test_a_job_that_was_taken_away_publishes_nothing(
    worker: TrainerWorker, submit: Submit, jobs: FineTuningJobs, registry: AdapterRegistry, database: Database
) -> None:
    job = long_job(submit)
    thread = in_background(worker, threading.Event())
    wait_for_steps(jobs, job)
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE fine_tuning_jobs SET claimed_by = 'another'")
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert jobs.get("acme", job.id).claimed_by == "another"
    assert not registry.list("acme")


def test_a_job_taken_away_while_its_model_is_stored_publishes_nothing(
    worker: TrainerWorker,
    submit: Submit,
    jobs: FineTuningJobs,
    registry: AdapterRegistry,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = submit(hyperparameters=Hyperparameters(n_epochs=1))
    put = BlobStore.put

    def put_and_lose(blobs: BlobStore, digest: str, path: Path, *, is_final: bool = False) -> None:
        put(blobs, digest, path, is_final=is_final)
        with database.write() as connection:
            connection.exec_driver_sql("UPDATE fine_tuning_jobs SET claimed_by = 'another'")

    monkeypatch.setattr(BlobStore, "put", put_and_lose)
    worker.run_next(threading.Event())
    assert jobs.get("acme", job.id).status == "running"
    assert not registry.list("acme")


def test_an_unexpected_error_fails_the_job_without_telling_its_text(
    worker: TrainerWorker, submit: Submit, jobs: FineTuningJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a path on the server")

    monkeypatch.setattr("gateway.trainer.worker.LoRATrainer.save", broken)
    job = submit(hyperparameters=Hyperparameters(n_epochs=1))
    worker.run_next(threading.Event())
    failed = jobs.get("acme", job.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.code == "internal_error"
    everything = json.dumps([event.message for event in jobs.events("acme", job.id)]) + failed.error.message
    assert "path on the server" not in everything
