"""Residency: pins hold, eviction is by recent use, and nothing that nobody waits for keeps memory."""

from __future__ import annotations

from concurrent.futures import wait
from pathlib import Path

import pytest
import torch

from adapters_store.blobs import BlobStore
from adapters_store.errors import AdapterLoadFailed, StoreUnavailable
from adapters_store.host_cache import HostCache
from adapters_store.lora_layout import LoRALayout
from adapters_store.residency import AdapterResidency
from adapters_store.slots import AdapterSlots

from .random_adapters import LAYOUT, SHAPES, StoredAdapter, assert_slot_holds, make_image, put_adapter, random_weights
from .residency_world import NUM_PAGES, NUM_SLOTS, SlowSlots, World
from .test_page_supply import Reader


def test_the_first_acquire_waits_for_the_load_and_the_engine_is_woken(world: World) -> None:
    adapter = world.put()
    assert world.residency.acquire(adapter) is None
    assert world.ready.acquire(timeout=30)
    world.residency.poll()
    slot = world.residency.acquire(adapter)
    assert slot is not None
    assert_slot_holds(world.slots, slot, random_weights(4, 0))
    stats = world.residency.stats
    assert (stats.resident, stats.loads, stats.evictions, stats.failures) == ((adapter.name,), 1, 0, 0)
    assert stats.load_seconds > 0


def test_a_resident_adapter_is_shared(world: World) -> None:
    adapter = world.put()
    assert world.acquire(adapter) == world.acquire(adapter)
    assert world.residency.num_pins(adapter.digest) == 2
    assert world.residency.stats.loads == 1


def test_an_adapter_from_host_memory_is_placed_at_once(world: World) -> None:
    adapter = world.put()
    world.host.get(adapter.digest).result(timeout=30)
    assert world.residency.acquire(adapter) is not None


def test_pinned_adapters_stay_and_the_newcomer_waits(world: World) -> None:
    pinned = [world.put(seed=seed) for seed in range(NUM_SLOTS)]
    slots = [world.acquire(adapter) for adapter in pinned]
    late = world.put(seed=9)
    for _ in range(3):
        assert world.acquire(late) is None
        assert world.residency.is_waiting_for_room(late.digest)
        world.residency.poll()
    assert [world.residency.acquire(adapter) for adapter in pinned] == slots
    world.residency.release(pinned[1].digest)
    assert world.acquire(late) is None, "one of its two pins is still held"
    world.residency.release(pinned[1].digest)
    assert world.acquire(late) == slots[1]
    assert not world.residency.is_waiting_for_room(late.digest)
    assert world.residency.stats.evictions == 1


def test_the_least_recently_used_leaves_and_only_when_room_is_needed(world: World) -> None:
    a, b, c, d = (world.put(seed=seed) for seed in range(4))
    for adapter in (a, b, c):
        world.acquire(adapter)
    for adapter in (b, a, c):  # order of last use: b, a, c
        world.residency.release(adapter.digest)
    assert world.residency.stats.resident == (b.name, a.name, c.name)
    world.acquire(d)
    assert world.residency.stats.resident == (a.name, c.name, d.name)


def test_pages_are_freed_for_a_large_adapter_as_many_as_it_needs(world: World) -> None:
    small = [world.put(seed=seed) for seed in range(3)]
    for adapter in small:
        world.acquire(adapter)
        world.residency.release(adapter.digest)
    large = world.put(rank=40)  # three pages of four
    assert world.acquire(large) is not None
    assert world.residency.stats.resident == (small[2].name, large.name)


def test_nothing_is_evicted_in_vain(world: World) -> None:
    held, idle = world.put(rank=20), world.put(rank=4)
    world.acquire(held)
    world.acquire(idle)
    world.residency.release(idle.digest)
    assert world.acquire(world.put(rank=40)) is None  # three pages: held's two leave only two
    assert world.residency.stats.evictions == 0


def test_lent_pages_are_waited_for_where_nothing_else_is_missing(world: World) -> None:
    reader = Reader(world.slots.pages)
    reader.reading = {reader.borrow() or 0 for _ in range(3)}
    held, late, larger = world.put_in_host(4, 0), world.put_in_host(20, 1), world.put_in_host(64, 2)
    assert world.residency.acquire(held) is not None
    for is_step in (True, False):  # what one step has not emptied another may not either
        world.residency.poll()
        assert world.residency.acquire(late) is None
        assert world.residency.is_waiting_for_lent_pages(late.digest)
        assert world.residency.is_waiting_for_room(late.digest) is not is_step
        assert reader.recalled == {1, 2}
    world.residency.poll()
    assert not world.residency.is_waiting_for_lent_pages(late.digest)  # nobody has asked in this step
    assert world.residency.acquire(larger) is None
    assert not world.residency.is_waiting_for_lent_pages(larger.digest)  # it lacks what is held, too
    reader.reading.clear()
    assert world.residency.acquire(late) is not None


def test_a_rank_beyond_all_pages_fails_at_once(world: World) -> None:
    with pytest.raises(AdapterLoadFailed, match="needs 5 pages and this engine has 4"):
        world.residency.acquire(StoredAdapter("tenant/big:1", "a" * 64, 16 * NUM_PAGES + 1))
    assert world.residency.stats.loads == 0


def test_a_failure_reaches_all_who_wait_and_is_then_tried_anew(world: World) -> None:
    adapter = world.put()
    path = world.blobs.local_path(adapter.digest)
    good = path.read_bytes()
    path.write_bytes(b"")
    assert world.residency.acquire(adapter) is None
    assert world.ready.acquire(timeout=30)
    world.residency.poll()
    for _ in range(2):
        with pytest.raises(AdapterLoadFailed, match=r"\A(?!.*could not be loaded.*could not be loaded).*damaged"):
            world.residency.acquire(adapter)
    assert world.residency.stats.failures == 1
    path.write_bytes(good)
    world.residency.poll()
    assert world.acquire(adapter) is not None


def test_a_store_that_does_not_answer_is_no_failure_of_the_adapter(world: World) -> None:
    adapter = world.put()
    path = world.blobs.local_path(adapter.digest)
    aside = path.rename(path.with_suffix(".aside"))
    path.mkdir()  # what can be no more read than a disk that is gone
    assert world.residency.acquire(adapter) is None
    assert world.ready.acquire(timeout=30)
    world.residency.poll()
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=r"cannot be read"):
            world.residency.acquire(adapter)
    path.rmdir()
    aside.rename(path)
    world.residency.poll()
    assert world.acquire(adapter) is not None


def test_weights_that_do_not_fit_the_base_fail(blobs: BlobStore, tmp_path: Path) -> None:
    other = LoRALayout.from_linears({**SHAPES, "q_proj": (11, 12)}, 2)
    slots = AdapterSlots(other, 2, 2, torch.float32, "cpu")
    host = HostCache(blobs, other, torch.float32, 1 << 20)
    residency = AdapterResidency(slots, host)
    adapter = put_adapter(blobs, tmp_path, rank=4)
    assert residency.acquire(adapter) is None
    wait([host.get(adapter.digest)], timeout=30)
    residency.poll()
    with pytest.raises(AdapterLoadFailed, match="q_proj of layer 0"):
        residency.acquire(adapter)
    residency.check_integrity()
    host.close()


def test_a_load_that_nobody_waits_for_keeps_no_memory(world: World) -> None:
    adapter = world.put()
    assert world.residency.acquire(adapter) is None
    assert world.ready.acquire(timeout=30)
    world.residency.poll()  # wanted since the last poll: kept for the coming acquire
    assert world.residency.is_waiting_for_room(adapter.digest)
    world.residency.poll()  # nobody came
    assert not world.residency.is_waiting_for_room(adapter.digest)
    assert world.residency.acquire(adapter) is not None  # from the host cache


def test_a_long_queue_loads_no_more_than_there_are_slots(world: World) -> None:
    for seed in range(NUM_SLOTS):
        world.acquire(world.put(seed=seed))
    queued = [world.put(seed=10 + i) for i in range(3 * NUM_SLOTS)]
    assert [world.residency.acquire(adapter) for adapter in queued] == [None] * len(queued)
    for _ in range(NUM_SLOTS):
        assert world.ready.acquire(timeout=30)
    assert not world.ready.acquire(timeout=0.2)
    assert sum(world.residency.is_waiting_for_room(adapter.digest) for adapter in queued) == NUM_SLOTS


def test_loads_hold_no_more_of_the_host_s_memory_than_there_is(blobs: BlobStore, tmp_path: Path) -> None:
    world = World(blobs, tmp_path, host_pages=3)
    queued = [world.put(rank=20, seed=seed) for seed in range(2)]
    assert [world.residency.acquire(adapter) for adapter in queued] == [None, None]
    assert world.ready.acquire(timeout=30)
    assert not world.ready.acquire(timeout=0.2), "both were loaded"
    world.residency.poll()
    assert world.residency.acquire(queued[0]) is not None
    assert world.acquire(queued[1]) is not None
    world.residency.check_integrity()
    world.host.close()


def test_an_adapter_larger_than_the_host_s_memory_is_served(blobs: BlobStore, tmp_path: Path) -> None:
    world = World(blobs, tmp_path, host_pages=1)
    assert world.acquire(world.put(rank=40)) is not None
    world.host.close()


def test_a_slot_is_handed_out_when_its_copy_is_done(slow: tuple[World, SlowSlots]) -> None:
    world, slots = slow
    adapter = world.put_in_host()
    for _ in range(3):
        assert world.residency.acquire(adapter) is None
        assert world.residency.is_copying
        assert not world.residency.is_waiting_for_room(adapter.digest)
        world.residency.check_integrity()
        world.residency.poll()
    assert world.residency.stats.loads == 0
    slots.copies_end()
    assert world.residency.acquire(adapter) is None, "seen by `poll` alone, before anything is scheduled"
    world.residency.poll()
    assert world.residency.acquire(adapter) == 0
    assert not world.residency.is_copying
    assert world.residency.stats.loads == 1


def test_what_is_being_copied_is_not_evicted(slow: tuple[World, SlowSlots]) -> None:
    world, slots = slow
    adapters = [world.put_in_host(seed=seed) for seed in range(NUM_SLOTS + 1)]
    assert [world.residency.acquire(adapter) for adapter in adapters] == [None] * len(adapters)
    assert sorted(slots.arrivals) == list(range(NUM_SLOTS))
    assert world.residency.is_waiting_for_room(adapters[-1].digest)
    slots.copies_end()
    world.residency.poll()
    assert [world.residency.acquire(adapter) for adapter in adapters] == [0, 1, 2, None]


def test_a_copy_that_nobody_wants_any_more_ends_and_may_be_evicted(slow: tuple[World, SlowSlots]) -> None:
    world, slots = slow
    for seed in range(NUM_SLOTS):
        world.residency.acquire(world.put_in_host(seed=seed))
    for _ in range(3):
        world.residency.poll()
    assert world.residency.is_copying
    slots.copies_end()
    world.residency.poll()
    assert len(world.residency.stats.resident) == NUM_SLOTS
    wanted = world.put_in_host(rank=40, seed=9)
    assert world.residency.acquire(wanted) is None
    slots.copies_end()
    world.residency.poll()
    assert world.residency.acquire(wanted) is not None
    assert world.residency.stats.evictions == NUM_SLOTS - 1


def test_what_is_copied_from_stays_as_it_is(blobs: BlobStore, tmp_path: Path) -> None:
    slots = SlowSlots()
    world = World(blobs, tmp_path, host_pages=1, slots=slots)
    assert world.residency.acquire(world.put_in_host(seed=0)) is None
    world.put_in_host(seed=1)  # pushes the first out of the cache
    (copying,) = world.residency._copying.values()
    assert torch.equal(copying.copy.image.pages[0], make_image(random_weights(4, 0)).pages[0])
    slots.copies_end()
    world.residency.poll()
    del copying
    world.put_in_host(seed=2)
    assert world.host.num_bytes == LAYOUT.page_bytes(torch.float32), "the frame did not come back"
    world.host.close()


def test_releasing_more_than_acquired_is_an_error_of_ours(world: World) -> None:
    adapter = world.put()
    world.acquire(adapter)
    world.residency.release(adapter.digest)
    with pytest.raises(AssertionError, match="more often"):
        world.residency.release(adapter.digest)
