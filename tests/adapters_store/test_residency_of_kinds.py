"""Residency of adapters that take more than pages: virtual tokens, vectors, bottlenecks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapters_store.blobs import BlobStore
from adapters_store.errors import AdapterLoadFailed

from .random_adapters import BOTTLENECKS, GatedBlobStore, put_bottleneck, put_vectors, put_virtual_tokens
from .residency_world import NUM_PAGES, NUM_SLOTS, World


@pytest.mark.parametrize("is_prefix", [False, True])
def test_virtual_tokens_take_a_slot_and_no_page(world: World, is_prefix: bool) -> None:
    adapter = put_virtual_tokens(world.blobs, world.folder, 3, is_prefix=is_prefix)
    slot = world.acquire(adapter)
    assert slot is not None
    assert world.slots.num_free_pages == NUM_PAGES
    assert len(world.slots.pages_of(slot)) == 0
    held = world.slots.virtual_tokens(slot)
    assert held is not None
    assert len(held) == 3
    assert world.residency.num_prefix_tokens(slot) == (3 if is_prefix else 0)
    world.residency.release(adapter.digest)
    for seed in range(NUM_SLOTS):  # it leaves as any other
        assert world.acquire(world.put(seed=seed)) is not None
    assert world.slots.virtual_tokens(slot) is None
    assert world.residency.num_prefix_tokens(slot) == world.residency.num_prefix_tokens(-1) == 0


def test_who_counts_other_virtual_tokens_gets_no_slot(world: World) -> None:
    adapter = put_virtual_tokens(world.blobs, world.folder, 3)
    assert world.acquire(adapter) is not None
    for count in (0, 2):
        with pytest.raises(AdapterLoadFailed, match=f"3 virtual tokens and the request counts {count}"):
            world.residency.acquire(replace(adapter, num_virtual_tokens=count))
    assert world.residency.num_pins(adapter.digest) == 1


def test_no_more_than_a_load_for_each_slot_runs_where_adapters_take_no_page(blobs: BlobStore, tmp_path: Path) -> None:
    gated = GatedBlobStore(blobs.url)
    world = World(gated, tmp_path)
    adapters = [put_virtual_tokens(blobs, tmp_path, count) for count in range(1, NUM_SLOTS + 3)]
    for adapter in adapters:
        assert world.residency.acquire(adapter) is None
    assert len(world.residency._loading) == NUM_SLOTS
    gated.gate.set()
    world.host.close()


@pytest.fixture
def rows(blobs: BlobStore, tmp_path: Path) -> Iterator[World]:
    """A world of three slots, of which one may have vectors."""
    world = World(blobs, tmp_path, num_rows=1)
    yield world
    world.residency.check_integrity()
    world.host.close()


def test_an_adapter_with_vectors_waits_for_a_row_and_others_do_not(rows: World, tmp_path: Path) -> None:
    first, second = (put_vectors(rows.blobs, tmp_path, seed) for seed in (0, 1))
    assert rows.acquire(first) is not None
    assert rows.acquire(second) is None
    assert rows.residency.is_waiting_for_room(second.digest)
    assert rows.acquire(rows.put()) is not None
    rows.residency.release(first.digest)
    slot = rows.acquire(second)
    assert slot is not None
    assert rows.slots.vector_row(slot) == 0
    assert rows.residency.stats.evictions == 1


def test_for_a_row_alone_only_an_adapter_with_vectors_leaves(rows: World, tmp_path: Path) -> None:
    plain, first, second = rows.put(), *(put_vectors(rows.blobs, tmp_path, seed) for seed in (0, 1))
    for adapter in (plain, first):
        rows.acquire(adapter)
        rows.residency.release(adapter.digest)
    assert rows.acquire(second) is not None
    assert rows.residency.stats.resident == (plain.name, second.name)


def test_a_row_comes_back_with_its_slot(rows: World, tmp_path: Path) -> None:
    for seed in range(3):
        adapter = put_vectors(rows.blobs, tmp_path, seed)
        assert rows.acquire(adapter) is not None
        rows.residency.release(adapter.digest)
    assert rows.slots.num_free_rows == 0
    assert rows.residency.stats.evictions == 2


def test_vectors_fail_to_load_where_there_are_no_rows(world: World, tmp_path: Path) -> None:
    with pytest.raises(AdapterLoadFailed, match="num_vector_slots"):
        world.acquire(put_vectors(world.blobs, tmp_path))


@pytest.fixture
def bottlenecks(blobs: BlobStore, tmp_path: Path) -> Iterator[World]:
    """A world of three slots and three pages of bottlenecks."""
    world = World(blobs, tmp_path, num_bottleneck_pages=3)
    yield world
    world.residency.check_integrity()
    world.host.close()


def test_for_pages_of_bottlenecks_alone_only_adapters_that_have_some_leave(bottlenecks: World, tmp_path: Path) -> None:
    world = bottlenecks
    plain, first, second = world.put(), *(put_bottleneck(world.blobs, tmp_path, size) for size in (20, 17))
    for adapter in (plain, first):
        assert world.acquire(adapter) is not None
    assert world.acquire(second) is None
    assert world.residency.is_waiting_for_room(second.digest)
    for adapter in (plain, first):
        world.residency.release(adapter.digest)
    assert world.acquire(second) is not None
    assert world.residency.stats.resident == (plain.name, second.name)
    assert world.slots.room().bottleneck_pages == 1


def test_bottlenecks_of_more_pages_than_there_are_fail_to_load(bottlenecks: World, tmp_path: Path) -> None:
    with pytest.raises(AdapterLoadFailed, match="need 4 pages and this engine has 3"):
        bottlenecks.acquire(put_bottleneck(bottlenecks.blobs, tmp_path, 49))


def test_bottlenecks_fail_to_load_where_there_are_no_pages(world: World, tmp_path: Path) -> None:
    with pytest.raises(AdapterLoadFailed, match="num_bottleneck_pages"):
        world.acquire(put_bottleneck(world.blobs, tmp_path, 4))


def test_bottlenecks_are_kept_in_host_memory(bottlenecks: World, tmp_path: Path) -> None:
    adapter = put_bottleneck(bottlenecks.blobs, tmp_path, 40)
    image = bottlenecks.host.get(adapter.digest).result(timeout=30)
    assert bottlenecks.host.get(adapter.digest).result() is image
    assert bottlenecks.host.num_bytes == image.num_bytes == 3 * BOTTLENECKS.page_bytes
