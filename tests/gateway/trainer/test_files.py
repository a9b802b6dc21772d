from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.errors import UploadTooLarge
from gateway.errors import Conflict, InvalidRequest, NotFound
from gateway.trainer.files import TrainingFiles
from gateway.trainer.job import FineTuningRequest
from gateway.trainer.jobs import FineTuningJobs


def create(files: TrainingFiles, body: bytes, tenant: str = "acme", name: str = "a.jsonl") -> str:
    return files.create(tenant, name, "fine-tune", io.BytesIO(body), 1000).id


def test_what_goes_in_comes_out(files: TrainingFiles) -> None:
    file_id = create(files, b"some lines\n", name="../up/tick\x07ets.jsonl")
    file = files.get("acme", file_id)
    assert (file.filename, file.bytes, file.status) == ("tickets.jsonl", 11, "processed")
    with files.open("acme", file_id) as source:
        assert source.read() == b"some lines\n"


def test_a_file_of_another_tenant_does_not_exist(files: TrainingFiles) -> None:
    file_id = create(files, b"x")
    for call in (files.get, files.open, files.delete):
        with pytest.raises(NotFound, match=file_id):
            call("globex", file_id)
    assert files.list("globex") == ([], False)


def test_lists_page_through_all_files_once(files: TrainingFiles) -> None:
    made = {create(files, bytes([i + 1])) for i in range(5)}
    seen: list[str] = []
    more, after = True, None
    while more:
        page, more = files.list("acme", after=after, limit=2)
        seen += [file.id for file in page]
        after = seen[-1]
    assert len(seen) == 5
    assert set(seen) == made


def test_refused_uploads_leave_nothing(files: TrainingFiles, blobs: BlobStore) -> None:
    with pytest.raises(UploadTooLarge, match="1,000 bytes"):
        create(files, b"x" * 1001)
    with pytest.raises(InvalidRequest, match="empty"):
        create(files, b"")
    with pytest.raises(InvalidRequest, match="purpose"):
        files.create("acme", "a", "assistants", io.BytesIO(b"x"), 10)
    assert files.list("acme") == ([], False)
    assert list(blobs.digests()) == []


def test_equal_bytes_are_kept_until_the_last_file_goes(files: TrainingFiles, blobs: BlobStore) -> None:
    first, second = create(files, b"same"), create(files, b"same", tenant="globex")
    files.delete("acme", first)
    with files.open("globex", second) as source:
        assert source.read() == b"same"
    files.delete("globex", second)
    assert list(blobs.digests()) == []


def test_a_file_that_a_job_waits_for_stays(
    files: TrainingFiles, database: Database, upload: Callable[..., str]
) -> None:
    file_id = upload()
    jobs = FineTuningJobs(database)
    job = jobs.create("acme", FineTuningRequest(model="base", training_file=file_id))
    with pytest.raises(Conflict, match=job.id):
        files.delete("acme", file_id)
    jobs.cancel("acme", job.id)
    files.delete("acme", file_id)
    with pytest.raises(NotFound):
        files.get("acme", file_id)
