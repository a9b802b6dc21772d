"""The host cache: images of what is stored, one load at a time per adapter, bounded bytes, failures forgotten."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.blobs import BlobStore
from adapters_store.errors import AdapterLoadFailed
from adapters_store.host_cache import HostCache
from adapters_store.lora_layout import LoRALayout
from adapters_store.weights import AdapterWeights

from .random_adapters import LAYOUT, SHAPES, GatedBlobStore, make_image, put_adapter, put_virtual_tokens, random_weights

PAGE = LAYOUT.page_bytes(torch.float32)


@pytest.fixture
def gated(tmp_path: Path) -> GatedBlobStore:
    return GatedBlobStore(f"file://{tmp_path / 'blobs'}")


@pytest.fixture
def caches() -> Iterator[Any]:
    made: list[HostCache] = []

    def make(blobs: BlobStore, num_pages: int, dtype: torch.dtype = torch.float32, **options: Any) -> HostCache:
        made.append(HostCache(blobs, LAYOUT, dtype, num_pages * LAYOUT.page_bytes(dtype), **options))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


@pytest.mark.parametrize("num_pages", [0, 8], ids=["own memory", "kept"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_an_image_of_what_is_stored_comes_back(
    blobs: BlobStore, caches: Any, tmp_path: Path, dtype: torch.dtype, num_pages: int
) -> None:
    adapter = put_adapter(blobs, tmp_path, rank=20, seed=3)
    image = caches(blobs, num_pages, dtype).get(adapter.digest).result(timeout=30)
    wanted = make_image(random_weights(20, 3), dtype)
    assert image.rank == 20
    assert all(map(torch.equal, image.pages, wanted.pages))


def test_an_adapter_that_does_not_fit_the_base_fails(blobs: BlobStore, caches: Any, tmp_path: Path) -> None:
    adapter = put_adapter(blobs, tmp_path, rank=4)
    other = LoRALayout.from_linears({**SHAPES, "q_proj": (11, 12)}, 2)
    cache = HostCache(blobs, other, torch.float32, 1 << 20)
    with pytest.raises(ValueError, match="q_proj of layer 0"):
        cache.get(adapter.digest).result(timeout=30)
    cache.close()


def test_overlapping_gets_are_one_load(gated: GatedBlobStore, caches: Any, tmp_path: Path) -> None:
    adapter = put_adapter(gated, tmp_path, rank=4)
    cache = caches(gated, 8)
    first, second = cache.get(adapter.digest), cache.get(adapter.digest)
    assert not first.done()
    gated.gate.set()
    image = first.result(timeout=30)
    assert second.result(timeout=30) is image
    kept = cache.get(adapter.digest)
    assert kept.done()
    assert kept.result() is image
    assert gated.num_reads == 1


def test_the_least_recently_used_leave_first(gated: GatedBlobStore, caches: Any, tmp_path: Path) -> None:
    gated.gate.set()
    a, b, c = (put_adapter(gated, tmp_path, rank=4, seed=seed).digest for seed in range(3))
    cache = caches(gated, 2)
    for digest in (a, b, a, c):  # c pushes b out
        cache.get(digest).result(timeout=30)
    assert cache.num_bytes == 2 * PAGE
    assert gated.num_reads == 3
    assert cache.get(a).done()
    assert cache.get(c).done()
    cache.get(b).result(timeout=30)
    assert gated.num_reads == 4
    assert cache.num_bytes == 2 * PAGE


def test_an_image_that_is_still_held_is_not_overwritten(blobs: BlobStore, caches: Any, tmp_path: Path) -> None:
    a, b, c = (put_adapter(blobs, tmp_path, rank=4, seed=seed).digest for seed in range(3))
    cache = caches(blobs, 1)
    held = cache.get(a).result(timeout=30)
    for digest in (b, c):  # find no room, and have memory of their own
        cache.get(digest).result(timeout=30)
    assert torch.equal(held.pages[0], make_image(random_weights(4, 0)).pages[0])
    assert cache.num_bytes == 0
    del held
    cache.get(b).result(timeout=30)
    assert cache.num_bytes == PAGE


def test_an_adapter_larger_than_the_cache_is_handed_out_and_not_kept(
    gated: GatedBlobStore, caches: Any, tmp_path: Path
) -> None:
    gated.gate.set()
    small, large = (put_adapter(gated, tmp_path, rank=rank).digest for rank in (2, 30))
    cache = caches(gated, 1)
    cache.get(small).result(timeout=30)
    assert cache.get(large).result(timeout=30).rank == 30
    assert cache.get(small).done(), "the small one was thrown out for nothing"
    cache.get(large).result(timeout=30)
    assert gated.num_reads == 3


def test_failures_are_not_kept(blobs: BlobStore, caches: Any, tmp_path: Path) -> None:
    adapter = put_adapter(blobs, tmp_path, rank=4)
    path = blobs.local_path(adapter.digest)
    good = path.read_bytes()
    cache = caches(blobs, 8)
    path.write_bytes(good[:-8] + bytes(8))
    with pytest.raises(AdapterLoadFailed, match="damaged"):
        cache.get(adapter.digest).result(timeout=30)
    path.write_bytes(good)
    assert cache.get(adapter.digest).result(timeout=30).rank == 4


def test_callbacks_may_use_the_cache(gated: GatedBlobStore, caches: Any, tmp_path: Path) -> None:
    a, b = (put_adapter(gated, tmp_path, rank=4, seed=seed).digest for seed in range(2))
    cache = caches(gated, 8, num_threads=1)
    chained = threading.Event()
    again: list[bool] = []

    def on_done(_: Any) -> None:
        again.append(cache.get(a).done())
        cache.get(b).add_done_callback(lambda _: chained.set())

    cache.get(a).add_done_callback(on_done)
    gated.gate.set()
    assert chained.wait(timeout=30)
    assert again == [True], "a result is kept before its callbacks run"


def test_close_fails_what_has_not_begun(gated: GatedBlobStore, tmp_path: Path) -> None:
    digests = [put_adapter(gated, tmp_path, rank=4, seed=seed).digest for seed in range(2)]
    cache = HostCache(gated, LAYOUT, torch.float32, 1 << 20, num_threads=1)
    running, queued = (cache.get(digest) for digest in digests)
    closer = threading.Thread(target=cache.close)
    closer.start()
    gated.gate.set()
    closer.join(timeout=30)
    assert running.result(timeout=30).rank == 4
    # It may have begun between the two: then it ends well.
    assert queued.done()
    with pytest.raises(RuntimeError):
        cache.get("0" * 64)


@pytest.mark.parametrize("is_prefix", [False, True])
def test_virtual_tokens_are_kept_beside_the_pages(
    gated: GatedBlobStore, caches: Any, tmp_path: Path, is_prefix: bool
) -> None:
    gated.gate.set()
    adapter = put_virtual_tokens(gated, tmp_path, 3, is_prefix=is_prefix)
    cache = caches(gated, num_pages=4)
    kept = cache.get(put_adapter(gated, tmp_path, rank=4).digest).result(timeout=30)
    image = cache.get(adapter.digest).result(timeout=30)
    assert (image.rank, image.pages) == (0, ())
    assert image.virtual_tokens is not None
    assert image.virtual_tokens.shape == ((3, 4, 6) if is_prefix else (3, 12))
    assert image.virtual_tokens.flatten().tolist() == list(range(image.virtual_tokens.numel()))
    assert cache.get(adapter.digest).result(timeout=30) is image
    assert gated.num_reads == 2
    assert cache.num_bytes == kept.num_bytes + image.virtual_tokens.nbytes


def test_of_what_has_memory_of_its_own_the_least_recently_used_leaves(
    gated: GatedBlobStore, caches: Any, tmp_path: Path
) -> None:
    gated.gate.set()
    cache = caches(gated, num_pages=16)  # and a page's bytes for what has its own
    num_tokens = PAGE // (12 * 4)
    page = put_adapter(gated, tmp_path, rank=4).digest
    virtual = [put_virtual_tokens(gated, tmp_path, num_tokens * 2 // 5 + i).digest for i in range(3)]
    for digest in (page, *virtual):
        cache.get(digest).result(timeout=30)
    assert [cache.holds(digest) for digest in (page, *virtual)] == [True, False, True, True]
    large = put_virtual_tokens(gated, tmp_path, num_tokens + 1).digest
    assert cache.get(large).result(timeout=30).virtual_tokens is not None
    assert [cache.holds(digest) for digest in (large, page, *virtual)] == [False, True, False, True, True]


def test_what_has_no_page_does_not_leave_for_one(gated: GatedBlobStore, caches: Any, tmp_path: Path) -> None:
    gated.gate.set()
    cache = caches(gated, num_pages=1)
    cache._most_own_bytes = 1 << 20
    virtual = put_virtual_tokens(gated, tmp_path, 3).digest
    first, second = (put_adapter(gated, tmp_path, rank=4, seed=seed).digest for seed in range(2))
    for digest in (virtual, first, second):
        cache.get(digest).result(timeout=30)
    assert [cache.holds(digest) for digest in (virtual, first, second)] == [True, False, True]


def test_what_is_held_is_not_what_the_thread_reads_next(blobs: BlobStore, caches: Any, tmp_path: Path) -> None:
    cache = caches(blobs, 8, num_threads=1)
    virtual = cache.get(put_virtual_tokens(blobs, tmp_path, 3).digest).result(timeout=30).virtual_tokens
    image = cache.get(put_adapter(blobs, tmp_path, rank=4, seed=1).digest).result(timeout=30)
    cache.get(put_adapter(blobs, tmp_path, rank=30, seed=2).digest).result(timeout=30)
    assert virtual.flatten().tolist() == list(range(virtual.numel()))
    assert torch.equal(image.pages[0], make_image(random_weights(4, 1)).pages[0])


@pytest.mark.parametrize("pinned", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_a_share_of_virtual_tokens_takes_the_memory_that_is_counted(
    blobs: BlobStore, caches: Any, pinned: bool
) -> None:
    whole = torch.arange(3 * 4 * 12.0).view(3, 4, 12)
    weights = AdapterWeights(0, {}, virtual_tokens=whole[:, :, 6:])
    image = caches(blobs, 8, pinned=pinned, read=lambda *_: weights).get("0" * 64).result(timeout=30)
    assert torch.equal(image.virtual_tokens, whole[:, :, 6:])
    assert image.virtual_tokens.is_pinned() == pinned
    assert image.virtual_tokens.untyped_storage().nbytes() == image.num_own_bytes


@pytest.mark.parametrize("is_prefix", [False, True])
def test_virtual_tokens_of_another_base_fail(blobs: BlobStore, tmp_path: Path, is_prefix: bool) -> None:
    adapter = put_virtual_tokens(blobs, tmp_path, 3, is_prefix=is_prefix)
    wider = {name: (out + 2, 14 if size == 12 else size) for name, (out, size) in SHAPES.items()}
    cache = HostCache(blobs, LoRALayout.from_linears(wider, 2), torch.float32, 1 << 20)
    with pytest.raises(ValueError, match="virtual tokens"):
        cache.get(adapter.digest).result(timeout=30)
    cache.close()
