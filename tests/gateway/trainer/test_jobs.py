from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import update

from adapters_store.database import Database
from adapters_store.tables import fine_tuning_jobs
from gateway.errors import Conflict, InvalidRequest, NotFound
from gateway.trainer.files import TrainingFiles
from gateway.trainer.hyperparameters import Hyperparameters, PeftOptions
from gateway.trainer.job import FineTuningJob, FineTuningRequest, JobError, event_number
from gateway.trainer.job_queue import JobLost, JobQueue
from gateway.trainer.jobs import FineTuningJobs
from gateway.trainer.step_metrics import StepMetrics
from tests.gateway.trainer.conftest import prepared

Create = Callable[..., FineTuningJob]


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "postgresql":
        yield prepared(request.getfixturevalue("postgresql"))
        return
    made = prepared(Database(f"sqlite:///{tmp_path / 'patchbay.db'}"))
    yield made
    made.dispose()


@pytest.fixture
def jobs(database: Database) -> FineTuningJobs:
    return FineTuningJobs(database)


@pytest.fixture
def queue(database: Database) -> JobQueue:
    return JobQueue(database)


@pytest.fixture
def create(jobs: FineTuningJobs, upload: Callable[..., str]) -> Create:
    def make(tenant: str = "acme", **fields: Any) -> FineTuningJob:
        return jobs.create(tenant, FineTuningRequest(model="base", training_file=upload(tenant=tenant), **fields))

    return make


def running(create: Create, queue: JobQueue, worker: str = "w1") -> FineTuningJob:
    create()
    job = queue.claim_to_validate(worker)
    assert job is not None
    queue.queue(job, worker)
    claimed = queue.claim_to_run(worker)
    assert claimed is not None
    return claimed


def die(database: Database, job: FineTuningJob) -> None:
    """Let the job's last heartbeat be long ago."""
    with database.write() as connection:
        connection.execute(update(fine_tuning_jobs).where(fine_tuning_jobs.c.id == job.id).values(heartbeat_at=1))


def messages(jobs: FineTuningJobs, job: FineTuningJob) -> list[str]:
    return [event.message for event in jobs.events("acme", job.id)]


@pytest.mark.parametrize("field", ["n_epochs", "batch_size", "learning_rate_multiplier"])
def test_a_number_out_of_range_is_told_the_range(field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Hyperparameters.model_validate({field: 1000})
    assert caught.value.errors()[0]["type"] == "less_than_equal"


def test_a_new_job_keeps_what_was_asked(jobs: FineTuningJobs, create: Create) -> None:
    asked = Hyperparameters(n_epochs=2)
    job = create(suffix="support", seed=5, hyperparameters=asked, peft=PeftOptions(r=8), metadata={"team": "a"})
    assert job == jobs.get("acme", job.id)
    assert job.id.startswith("ftjob-")
    assert len(job.id) == 30
    assert (job.status, job.suffix, job.seed, job.metadata) == ("validating_files", "support", 5, {"team": "a"})
    assert (job.hyperparameters, job.peft.r, job.error, job.finished) == (asked, 8, None, False)
    assert job.method["supervised"]["hyperparameters"]["n_epochs"] == 2
    assert 0 <= create().seed < 1 << 31


def test_bad_requests_are_refused_by_field(jobs: FineTuningJobs, create: Create, upload: Callable[..., str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        create(suffix="No Spaces")
    assert caught.value.param == "suffix"
    foreign = upload(tenant="globex")
    with pytest.raises(InvalidRequest, match=foreign) as caught:
        jobs.create("acme", FineTuningRequest(model="base", training_file=foreign))
    assert caught.value.param == "training_file"
    with pytest.raises(InvalidRequest) as caught:
        create(validation_file="file-none")
    assert caught.value.param == "validation_file"
    assert jobs.list("acme") == ([], False)


def test_a_job_of_another_tenant_does_not_exist(jobs: FineTuningJobs, create: Create) -> None:
    job = create()
    for call in (jobs.get, jobs.cancel, jobs.events, jobs.latest_events):
        with pytest.raises(NotFound):
            call("globex", job.id)
    assert jobs.list("globex") == ([], False)
    assert jobs.get("acme", job.id).status == "validating_files"


def test_lists_page_through_all_jobs_once(jobs: FineTuningJobs, create: Create) -> None:
    made = {create().id for _ in range(5)}
    seen: list[str] = []
    more, after = True, None
    while more:
        page, more = jobs.list("acme", after=after, limit=2)
        seen += [job.id for job in page]
        after = seen[-1]
    assert len(seen) == 5
    assert set(seen) == made


def test_the_way_to_success(jobs: FineTuningJobs, create: Create, queue: JobQueue, database: Database) -> None:
    job = running(create, queue)
    assert (job.status, job.claimed_by) == ("running", "w1")
    assert job.started_at is not None
    queue.set_hyperparameters(job, "w1", Hyperparameters(n_epochs=3, batch_size=4, learning_rate_multiplier=1.0))
    step = StepMetrics(1, 9, 2.5, 0.25, 1e-3, 100.0)
    assert queue.beat(job, "w1", [step]) == "held"
    with database.write() as connection:
        queue.succeed(connection, job, "w1", "acme/x:1", 1234)
    done = jobs.get("acme", job.id)
    assert (done.status, done.fine_tuned_model, done.trained_tokens) == ("succeeded", "acme/x:1", 1234)
    assert done.hyperparameters.n_epochs == 3
    assert done.finished_at is not None
    events = jobs.events("acme", job.id)
    (metrics,) = [event for event in events if event.type == "metrics"]
    assert metrics.data["train_loss"] == 2.5
    assert "valid_loss" not in metrics.data
    assert events[-1].message == "The job has successfully completed"
    assert event_number(events[2].id) == events[2].number
    assert jobs.events("acme", job.id, after=events[2].number) == events[3:]
    newest, more = jobs.latest_events("acme", job.id, limit=2)
    assert (newest, more) == (events[:-3:-1], True)
    older, more = jobs.latest_events("acme", job.id, before=newest[-1].number, limit=100)
    assert (older, more) == (events[-3::-1], False)


def test_no_two_workers_get_one_job(create: Create, database: Database) -> None:
    made = {create().id for _ in range(6)}
    taken: list[str] = []
    start = threading.Barrier(4)

    def work(name: str) -> None:
        queue = JobQueue(database)
        start.wait()
        while (job := queue.claim_to_validate(name)) is not None:
            taken.append(job.id)

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(made)


def test_a_waiting_job_is_cancelled_at_once(jobs: FineTuningJobs, create: Create, queue: JobQueue) -> None:
    job = create()
    assert jobs.cancel("acme", job.id).status == "cancelled"
    assert queue.claim_to_validate("w1") is None
    with pytest.raises(Conflict, match="cancelled"):
        jobs.cancel("acme", job.id)


def test_cancelling_during_validation_takes_the_job_from_its_worker(
    jobs: FineTuningJobs, create: Create, queue: JobQueue
) -> None:
    job = create()
    claimed = queue.claim_to_validate("w1")
    assert claimed is not None
    jobs.cancel("acme", job.id)
    assert queue.beat(claimed, "w1", []) == "lost"
    with pytest.raises(JobLost):
        queue.queue(claimed, "w1")
    assert jobs.get("acme", job.id).status == "cancelled"


def test_a_running_jobs_worker_learns_of_the_cancellation(
    jobs: FineTuningJobs, create: Create, queue: JobQueue, database: Database
) -> None:
    job = running(create, queue)
    assert jobs.cancel("acme", job.id).status == "running"
    assert queue.beat(job, "w1", []) == "cancel"
    queue.cancel(job, "w1")
    assert jobs.get("acme", job.id).status == "cancelled"
    with database.write() as connection, pytest.raises(JobLost):
        queue.succeed(connection, job, "w1", "acme/x:1", 1)


def test_a_dead_workers_job_is_run_once_more_and_then_failed(
    jobs: FineTuningJobs, create: Create, queue: JobQueue, database: Database
) -> None:
    job = running(create, queue)
    queue.recover()
    assert jobs.get("acme", job.id).status == "running"
    die(database, job)
    queue.recover()
    assert jobs.get("acme", job.id).status == "queued"
    assert "died; the job will start again" in messages(jobs, job)[-1]
    assert queue.beat(job, "w1", []) == "lost"
    again = queue.claim_to_run("w2")
    assert again is not None
    with database.write() as connection, pytest.raises(JobLost):
        queue.succeed(connection, job, "w1", "acme/x:1", 1)
    die(database, job)
    queue.recover()
    failed = jobs.get("acme", job.id)
    assert failed.status == "failed"
    assert failed.error == JobError("worker_lost", messages(jobs, job)[-1])


def test_a_dead_workers_cancelled_job_is_cancelled(
    jobs: FineTuningJobs, create: Create, queue: JobQueue, database: Database
) -> None:
    job = running(create, queue)
    jobs.cancel("acme", job.id)
    die(database, job)
    queue.recover()
    assert jobs.get("acme", job.id).status == "cancelled"


def test_a_dead_workers_validation_is_taken_over(create: Create, queue: JobQueue, database: Database) -> None:
    job = create()
    assert queue.claim_to_validate("w1") is not None
    assert queue.claim_to_validate("w2") is None
    die(database, job)
    claimed = queue.claim_to_validate("w2")
    assert claimed is not None
    assert claimed.claimed_by == "w2"


def test_a_stopping_workers_job_waits_for_the_next_without_counting_as_lost(
    jobs: FineTuningJobs, create: Create, queue: JobQueue
) -> None:
    job = running(create, queue)
    queue.give_back(job, "w1")
    waiting = jobs.get("acme", job.id)
    assert (waiting.status, waiting.claimed_by) == ("queued", None)
    again = queue.claim_to_run("w2")
    assert again is not None
    queue.fail(again, "w2", JobError("invalid_training_file", "line 3: bad", "training_file"))
    failed = jobs.get("acme", job.id)
    assert (failed.status, failed.error) == (
        "failed",
        JobError("invalid_training_file", "line 3: bad", "training_file"),
    )


@pytest.mark.parametrize("event_id", ["ftevent-abc", "ftjob-12", "ftevent-" + "9" * 24, "ftevent-" + "1" * 5000])
def test_what_is_no_event_id_is_refused(event_id: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        event_number(event_id)
    assert caught.value.param == "after"


def test_the_last_event_id_that_there_can_be_pages(jobs: FineTuningJobs, create: Create) -> None:
    job, last = create(), event_number(f"ftevent-{2**31 - 1:024d}")
    assert len(jobs.latest_events("acme", job.id, before=last)[0]) == 1
    assert jobs.events("acme", job.id, after=last) == []


@pytest.mark.parametrize("text", ["", "\0", "ftjob-\0", "x" * 100])
def test_an_id_that_a_database_refuses_is_not_found(jobs: FineTuningJobs, files: TrainingFiles, text: str) -> None:
    for call in (jobs.get, jobs.cancel, jobs.events, jobs.latest_events, files.get, files.open, files.delete):
        with pytest.raises(NotFound):
            call("acme", text)
    for pages in (jobs.list, files.list):
        with pytest.raises(NotFound):
            pages("acme", after=text)
    with pytest.raises(InvalidRequest) as caught:
        jobs.create("acme", FineTuningRequest(model="base", training_file=text))
    assert caught.value.param == "training_file"


def test_a_job_may_fail_on_a_text_that_a_database_refuses(
    jobs: FineTuningJobs, queue: JobQueue, create: Create
) -> None:
    job = running(create, queue)
    queue.fail(job, "w1", JobError("invalid_training_file", "line 1: the role 'a\0b' is unknown"))
    assert jobs.get("acme", job.id).status == "failed"
    assert messages(jobs, job)[-1] == "line 1: the role 'a\\0b' is unknown"
