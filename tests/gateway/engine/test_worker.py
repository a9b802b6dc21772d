"""What a rank that has no scheduler does when the store fails under it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from adapters_store.blobs import BlobStore
from adapters_store.errors import StoreUnavailable
from adapters_store.host_cache import HostCache
from adapters_store.lora_layout import LoRALayout
from gateway.engine import worker
from gateway.engine.worker import read_patiently
from tests.adapters_store.random_adapters import LAYOUT, SHAPES, StoredAdapter, make_image, put_adapter, random_weights


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(f"file://{tmp_path / 'blobs'}")


@pytest.fixture
def adapter(blobs: BlobStore, tmp_path: Path) -> StoredAdapter:
    return put_adapter(blobs, tmp_path, rank=4, seed=1)


@pytest.fixture
def host(blobs: BlobStore) -> Iterator[HostCache]:
    host = HostCache(blobs, LAYOUT, torch.float32, 1 << 20)
    yield host
    host.close()


class Warnings(logging.Handler):
    """What the worker warns of; at the second of them `act` is called."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.messages: list[str] = []
        self._act = act

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        if len(self.messages) == 2:
            self._act()


@pytest.mark.parametrize(
    ("is_missing", "reason"), [(True, "its bytes are missing"), (False, "the blob store cannot be read")]
)
def test_a_store_that_fails_for_a_while_is_asked_again(
    host: HostCache,
    adapter: StoredAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_missing: bool,
    reason: str,
) -> None:
    """Its folder is away, and comes back; meanwhile there is nothing in its place, or a link to itself."""
    folder, away = tmp_path / "blobs", tmp_path / "away"
    folder.rename(away)
    if not is_missing:
        folder.symlink_to(folder)

    def mend() -> None:
        folder.unlink(missing_ok=True)
        away.rename(folder)

    warnings = Warnings(mend)
    monkeypatch.setattr(worker, "_PAUSE_S", 0.01)
    monkeypatch.setattr(worker.logger, "handlers", [warnings])
    image = read_patiently(host, adapter.digest, time.monotonic() + 60)
    assert all(map(torch.equal, image.pages, make_image(random_weights(4, 1)).pages))
    assert len(warnings.messages) == 2
    assert all(adapter.digest[:12] in message and reason in message for message in warnings.messages)


def test_a_store_that_does_not_come_back_fails_when_the_time_is_over(
    host: HostCache, adapter: StoredAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blobs").rename(tmp_path / "away")
    (tmp_path / "blobs").symlink_to(tmp_path / "blobs")
    monkeypatch.setattr(worker, "_PAUSE_S", 0.01)
    until = time.monotonic() + 0.1
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        read_patiently(host, adapter.digest, until)
    assert time.monotonic() >= until


def test_what_does_not_come_of_the_store_is_not_tried_again(
    blobs: BlobStore, adapter: StoredAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    host = HostCache(blobs, LoRALayout.from_linears({**SHAPES, "q_proj": (11, 12)}, 2), torch.float32, 1 << 20)
    with pytest.raises(ValueError, match="q_proj of layer 0"):
        read_patiently(host, adapter.digest, time.monotonic() + 60)
    assert not caplog.records
    host.close()
