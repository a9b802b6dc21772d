"""Blobs: whole or absent, checked on every read, in a folder and in a remote store."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import tempfile
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from adapters_store.blobs import BlobStore
from adapters_store.errors import AdapterLoadFailed, StoreError, StoreUnavailable

BYTES = b"some bytes" * 100
DIGEST = hashlib.sha256(BYTES).hexdigest()


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "s3":
        url = request.getfixturevalue("s3_url")
    else:
        url = f"file://{tmp_path / 'blobs'}" if request.param == "file" else f"memory://{uuid.uuid4().hex}/blobs"
    return BlobStore(url, cache_dir=tmp_path / "cache")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(BYTES)
    return path


def damage(store: BlobStore) -> None:
    fs, root = fsspec.core.url_to_fs(store.url)
    with fs.open(f"{root}/{DIGEST[:2]}/{DIGEST}", "wb") as file:
        file.write(BYTES[:-1] + b"!")


def test_what_was_put_is_read_back(store: BlobStore, source: Path) -> None:
    assert not store.exists(DIGEST)
    store.put(DIGEST, source)
    assert store.exists(DIGEST)
    assert store.local_path(DIGEST).read_bytes() == BYTES
    with store.open(DIGEST) as file:
        assert file.read() == BYTES
    assert list(store.digests()) == [DIGEST]


def test_a_final_file_is_the_blob_itself_and_other_files_are_not(tmp_path: Path, source: Path) -> None:
    store = BlobStore(f"file://{tmp_path / 'blobs'}")
    store.put(DIGEST, source)
    assert not store.local_path(DIGEST).samefile(source)
    store.delete(DIGEST)
    store.put(DIGEST, source, is_final=True)
    assert store.local_path(DIGEST).samefile(source)
    assert store.local_path(DIGEST).stat().st_mode & 0o777 == 0o600
    source.unlink()
    assert store.local_path(DIGEST).read_bytes() == BYTES


def test_a_final_file_mends_a_damaged_blob_and_is_checked_as_others_are(store: BlobStore, source: Path) -> None:
    store.put(DIGEST, source)
    damage(store)
    store.put(DIGEST, source, is_final=True)
    assert store.local_path(DIGEST).read_bytes() == BYTES
    with pytest.raises(StoreError, match="digest"):
        store.put("0" * 64, source, is_final=True)
    assert list(store.digests()) == [DIGEST]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="takes another file system")
def test_a_final_file_of_another_file_system_is_copied(tmp_path: Path) -> None:
    store = BlobStore(f"file://{tmp_path / 'blobs'}")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        source = Path(elsewhere) / "source"
        source.write_bytes(BYTES)
        store.put(DIGEST, source, is_final=True)
    assert store.local_path(DIGEST).read_bytes() == BYTES


def test_putting_again_is_harmless(store: BlobStore, source: Path) -> None:
    store.put(DIGEST, source)
    store.put(DIGEST, source)
    assert list(store.digests()) == [DIGEST]


def test_a_file_with_another_digest_is_not_stored(store: BlobStore, source: Path) -> None:
    with pytest.raises(StoreError):
        store.put("0" * 64, source)
    assert list(store.digests()) == []


def test_damage_is_found_on_reading_and_healed_by_putting_again(store: BlobStore, source: Path) -> None:
    store.put(DIGEST, source)
    damage(store)
    with pytest.raises(AdapterLoadFailed, match="damaged"):
        store.local_path(DIGEST)
    store.put(DIGEST, source)
    assert store.local_path(DIGEST).read_bytes() == BYTES


def test_a_missing_blob_says_so(store: BlobStore) -> None:
    with pytest.raises(AdapterLoadFailed, match="missing"):
        store.local_path(DIGEST)


def test_a_deleted_blob_is_gone_and_deleting_twice_is_harmless(store: BlobStore, source: Path) -> None:
    store.put(DIGEST, source)
    store.delete(DIGEST)
    store.delete(DIGEST)
    assert not store.exists(DIGEST)


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63])
def test_only_digests_name_blobs(store: BlobStore, digest: str) -> None:
    with pytest.raises(ValueError, match="not a SHA-256 digest"):
        store.exists(digest)


def test_a_damaged_local_copy_of_a_remote_blob_is_fetched_again(tmp_path: Path, source: Path) -> None:
    store = BlobStore(f"memory://{uuid.uuid4().hex}", cache_dir=tmp_path / "cache")
    store.put(DIGEST, source)
    store.local_path(DIGEST).write_bytes(b"damaged")
    assert store.local_path(DIGEST).read_bytes() == BYTES


def test_the_local_cache_of_a_remote_store_stays_within_its_limit(tmp_path: Path) -> None:
    store = BlobStore(f"memory://{uuid.uuid4().hex}", cache_dir=tmp_path / "cache", cache_bytes=2500)
    paths = []
    for i in range(4):
        data = bytes([i]) * 1000
        (tmp_path / "source").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        store.put(digest, tmp_path / "source")
        paths.append(store.local_path(digest))
        os.utime(paths[-1], (i, i))
    assert [path.exists() for path in paths] == [False, False, True, True]


def test_opening_a_folder_removes_old_leftovers_only(tmp_path: Path, source: Path) -> None:
    url = f"file://{tmp_path / 'blobs'}"
    BlobStore(url).put(DIGEST, source)
    folder = tmp_path / "blobs" / DIGEST[:2]
    old, new = folder / ".tmp-old", folder / ".tmp-new"
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    store = BlobStore(url)
    assert (old.exists(), new.exists(), store.exists(DIGEST)) == (False, True, True)


def test_a_store_that_cannot_be_written_is_unavailable(tmp_path: Path, source: Path) -> None:
    (tmp_path / "blobs").write_text("a file, not a folder")
    with pytest.raises(StoreUnavailable):
        BlobStore(f"file://{tmp_path / 'blobs'}").put(DIGEST, source)


def test_a_blob_of_several_parts_comes_back_from_s3(s3_url: str, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 20
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / "source").write_bytes(data)
    store = BlobStore(s3_url, cache_dir=tmp_path / "cache")
    store.put(digest, tmp_path / "source")
    assert store.local_path(digest).read_bytes() == data
    assert store.leftovers() == []


def test_an_unfinished_upload_to_s3_is_a_leftover_that_can_be_removed(s3_url: str, tmp_path: Path) -> None:
    store = BlobStore(s3_url, cache_dir=tmp_path / "cache")
    fs, root = fsspec.core.url_to_fs(s3_url)
    unfinished = fs.open(f"{root}/ab/cd", "wb", block_size=8 << 20, autocommit=False)
    unfinished.write(bytes(9 << 20))
    (name,) = store.leftovers()
    assert f"{root}/ab/cd" in name
    store.remove_leftover(name)
    assert store.leftovers() == []


@pytest.mark.parametrize(("age_s", "num_leftovers"), [(3500, 0), (3700, 1)])
def test_an_upload_to_s3_that_may_still_run_is_no_leftover(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age_s: int, num_leftovers: int
) -> None:
    store = BlobStore(s3_url, cache_dir=tmp_path / "cache")
    fs, root = fsspec.core.url_to_fs(s3_url)
    fs.open(f"{root}/ab/cd", "wb", block_size=8 << 20, autocommit=False).write(bytes(9 << 20))
    bucket, _, prefix = root.partition("/")
    (upload,) = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)["Uploads"]
    now = upload["Initiated"].timestamp() + age_s  # moto says the same of every upload
    monkeypatch.setattr("adapters_store.blobs.time", SimpleNamespace(time=lambda: now))
    assert len(store.leftovers()) == num_leftovers


def test_an_s3_store_that_does_not_answer_or_has_no_bucket_is_unavailable(
    s3_url: str, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreUnavailable):
        BlobStore("s3://no-such-bucket/x", cache_dir=tmp_path / "cache").put(DIGEST, source)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store = BlobStore("s3://patchbay-tests/x", cache_dir=tmp_path / "cache")
    with pytest.raises(StoreUnavailable):
        store.exists(DIGEST)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_leftover_of_a_folder_is_what_nobody_writes_any_more(tmp_path: Path, source: Path) -> None:
    store = BlobStore(f"file://{tmp_path / 'blobs'}")
    store.put(DIGEST, source)
    killed, running = (tmp_path / "blobs" / DIGEST[:2] / name for name in (".tmp-killed", ".tmp-running"))
    killed.touch()
    with running.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert store.leftovers() == [str(killed)]
        store.remove_leftover(str(killed))
        assert store.leftovers() == []


def test_another_process_may_be_given_the_store(tmp_path: Path, source: Path) -> None:
    store = BlobStore(f"file://{tmp_path / 'blobs'}")
    store.put(DIGEST, source)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(store.exists, (DIGEST,))
