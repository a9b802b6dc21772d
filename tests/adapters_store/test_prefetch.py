"""What will be acquired next is brought in before, at nobody's expense."""

from __future__ import annotations

from concurrent.futures import wait
from pathlib import Path

import pytest

from adapters_store.blobs import BlobStore
from adapters_store.errors import AdapterLoadFailed

from .random_adapters import GatedBlobStore, StoredAdapter
from .residency_world import NUM_SLOTS, SlowSlots, World


def prefetch(world: World, *adapters: StoredAdapter) -> None:
    """Step after step, as long as that changes anything."""
    for _ in range(2 * len(adapters) + 2):
        world.residency.poll()
        world.residency.prefetch(adapters)
        wait([loading.future for loading in world.residency._loading.values()], timeout=30)


def test_what_is_next_is_brought_in_and_not_pinned(world: World) -> None:
    adapters = [world.put(seed=seed) for seed in range(3)]
    prefetch(world, *adapters)
    assert world.residency.stats.resident == tuple(adapter.name for adapter in adapters)
    assert [world.residency.num_pins(adapter.digest) for adapter in adapters] == [0, 0, 0]
    assert [world.residency.acquire(adapter) for adapter in adapters] == [0, 1, 2]


def test_one_copy_at_a_time_is_made_ahead(slow: tuple[World, SlowSlots]) -> None:
    world, slots = slow
    adapters = [world.put_in_host(seed=seed) for seed in range(3)]
    prefetch(world, *adapters)
    assert len(slots.arrivals) == 1
    slots.copies_end()
    prefetch(world, *adapters)
    assert len(slots.arrivals) == 2


def test_what_is_held_or_next_itself_is_not_evicted_for_what_is_next(world: World) -> None:
    held, idle, useless = (world.put(seed=seed) for seed in range(3))
    for adapter in (held, idle, useless):
        world.acquire(adapter)
    for adapter in (idle, useless):
        world.residency.release(adapter.digest)
    new, other = world.put(seed=8), world.put(seed=9)
    prefetch(world, new, other, idle)
    assert set(world.residency.stats.resident) == {held.name, idle.name, new.name}
    assert world.residency.stats.evictions == 1


def test_nothing_takes_what_one_before_it_waits_for(world: World) -> None:
    held = world.put(rank=20)
    world.acquire(held)
    large, small = world.put(rank=40), world.put(rank=4)
    prefetch(world, large, small)
    assert world.residency.stats.resident == (held.name,)
    world.residency.release(held.digest)
    prefetch(world, large, small)
    assert world.residency.stats.resident == (large.name, small.name)


def test_what_is_next_takes_half_of_what_loads_may_take(blobs: BlobStore, tmp_path: Path) -> None:
    world = World(blobs, tmp_path, host_pages=4)
    for seed in range(NUM_SLOTS):
        world.acquire(world.put(seed=seed))
    upcoming = [world.put(seed=10 + seed) for seed in range(4)]
    prefetch(world, *upcoming)
    assert [world.residency.is_waiting_for_room(adapter.digest) for adapter in upcoming] == [True, False, False, False]
    prefetch(world)
    assert not world.residency._loading, "nobody waits for them any more"
    world.host.close()


def test_a_failure_ahead_is_told_to_who_acquires_and_not_tried_again_before(blobs: BlobStore, tmp_path: Path) -> None:
    gated = GatedBlobStore(f"file://{tmp_path / 'gated'}")
    gated.gate.set()
    world = World(gated, tmp_path)
    adapter = world.put()
    gated.delete(adapter.digest)
    for _ in range(3):
        prefetch(world, adapter)
    assert gated.num_reads == 1
    assert world.residency.stats.failures == 0
    with pytest.raises(AdapterLoadFailed):
        world.residency.acquire(adapter)
    assert world.residency.stats.failures == 1
    world.host.close()
