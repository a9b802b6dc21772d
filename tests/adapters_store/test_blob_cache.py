"""The local tier of a remote store: fetched once by all, whole or absent, within its limit, nothing evicted in use."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters_store.blob_cache import BlobCache
from adapters_store.errors import AdapterLoadFailed

SIZE = 1000


def blob(number: int) -> tuple[str, bytes]:
    data = bytes([number]) * SIZE
    return hashlib.sha256(data).hexdigest(), data


class Remote:
    """What is fetched from; counts how often."""

    def __init__(self, *numbers: int) -> None:
        self.blobs = dict(map(blob, numbers))
        self.fetched: list[str] = []

    def fetch(self, digest: str, path: Path) -> None:
        self.fetched.append(digest)
        path.write_bytes(self.blobs[digest])


def read(cache: BlobCache, remote: Remote, digest: str) -> bytes:
    with cache.open(digest, lambda path: remote.fetch(digest, path)) as file:
        return file.read()


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if len(path.name) == 64}


def test_a_blob_is_fetched_once_and_survives_a_restart(tmp_path: Path) -> None:
    digest, data = blob(1)
    remote = Remote(1)
    for _ in range(3):
        assert read(BlobCache(tmp_path, 10 * SIZE), remote, digest) == data
    assert remote.fetched == [digest]


def test_those_who_come_while_it_is_fetched_wait_for_it(tmp_path: Path) -> None:
    digest, data = blob(1)
    remote, cache, begun = Remote(1), BlobCache(tmp_path, 10 * SIZE), threading.Event()

    def fetch(path: Path) -> None:
        begun.set()
        time.sleep(0.2)
        remote.fetch(digest, path)

    def open_and_read(_: int) -> bytes:
        with cache.open(digest, fetch) as file:
            return file.read()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(open_and_read, range(8))) == [data] * 8
    assert remote.fetched == [digest]


def test_the_least_recently_read_go_first(tmp_path: Path) -> None:
    digests = [blob(i)[0] for i in range(4)]
    cache, remote = BlobCache(tmp_path, 3 * SIZE), Remote(0, 1, 2, 3)
    for age, digest in enumerate(digests[:3]):
        read(cache, remote, digest)
        os.utime(tmp_path / digest, (age, age))
    read(cache, remote, digests[0])  # now the newest
    read(cache, remote, digests[3])
    assert kept(tmp_path) == {digests[0], digests[2], digests[3]}


def test_what_is_open_is_not_evicted(tmp_path: Path) -> None:
    first, second, third = (blob(i)[0] for i in range(3))
    cache, remote = BlobCache(tmp_path, SIZE), Remote(0, 1, 2)
    with cache.open(first, lambda path: remote.fetch(first, path)):
        read(cache, remote, second)
        assert kept(tmp_path) == {first, second}
    read(cache, remote, third)
    assert kept(tmp_path) == {third}


def test_damaged_bytes_are_not_kept_and_those_of_the_disk_are_fetched_again(tmp_path: Path) -> None:
    digest, data = blob(1)
    cache, remote = BlobCache(tmp_path, 10 * SIZE), Remote()
    remote.blobs[digest] = data[:-1]
    with pytest.raises(AdapterLoadFailed, match=digest[:12]):
        read(cache, remote, digest)
    assert kept(tmp_path) == set()
    remote.blobs[digest] = data
    read(cache, remote, digest)
    (tmp_path / digest).write_bytes(data[:-1] + b"!")
    assert read(cache, remote, digest) == data
    assert len(remote.fetched) == 3


def _fetch_and_hang(folder: Path, digest: str, ready: str) -> None:
    def fetch(path: Path) -> None:
        path.write_bytes(b"a part")
        Path(ready).touch()
        time.sleep(60)

    BlobCache(folder, 10 * SIZE).open(digest, fetch)


def test_killed_while_it_fetches_it_leaves_no_blob_and_holds_up_nobody(tmp_path: Path) -> None:
    digest, data = blob(1)
    folder, ready = tmp_path / "cache", tmp_path / "ready"
    child = multiprocessing.get_context("spawn").Process(target=_fetch_and_hang, args=(folder, digest, str(ready)))
    child.start()
    while not ready.exists():
        assert child.is_alive()
        time.sleep(0.02)
    assert kept(folder) == set()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert read(BlobCache(folder, 10 * SIZE), Remote(1), digest) == data
    assert not list(folder.glob(".part-*"))
