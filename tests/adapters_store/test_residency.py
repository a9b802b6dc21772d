"""Residency: pins hold, eviction is by recent use, and nothing leaks, whatever the order of events."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters_store.blobs import BlobStore
from adapters_store.errors import AdapterLoadFailed
from adapters_store.host_cache import HostCache
from adapters_store.residency import AdapterResidency
from adapters_store.slots import AdapterSlots, LoRALayout, num_pages_for

from .random_adapters import (
    LAYOUT,
    SHAPES,
    GatedBlobStore,
    StoredAdapter,
    assert_slot_holds,
    put_adapter,
    random_weights,
)

NUM_SLOTS = 3
NUM_PAGES = 4


class World:
    """Real parts: a blob folder, a host cache, slots. `step` is what an engine step does."""

    def __init__(self, blobs: BlobStore, folder: Path, host_bytes: int = 1 << 20) -> None:
        self.folder = folder
        self.blobs = blobs
        self.ready = threading.Semaphore(0)
        self.slots = AdapterSlots(LAYOUT, NUM_SLOTS, NUM_PAGES, torch.float32, "cpu")
        self.host = HostCache(blobs, host_bytes)
        self.residency = AdapterResidency(self.slots, self.host, self.ready.release)

    def put(self, rank: int = 4, seed: int = 0) -> StoredAdapter:
        return put_adapter(self.blobs, self.folder, rank, seed)

    def acquire(self, adapter: StoredAdapter) -> int | None:
        """Ask, wait for the load where one began, and ask again as the next step would."""
        slot = self.residency.acquire(adapter)
        if slot is None and not self.residency.is_waiting_for_room(adapter.digest):
            assert self.ready.acquire(timeout=30), "the engine was not woken"
            self.residency.poll()
            slot = self.residency.acquire(adapter)
        return slot


@pytest.fixture
def world(blobs: BlobStore, tmp_path: Path) -> Iterator[World]:
    world = World(blobs, tmp_path)
    yield world
    world.residency.check_integrity()
    world.host.close()


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


def test_weights_that_do_not_fit_the_base_fail(blobs: BlobStore, tmp_path: Path) -> None:
    other = LoRALayout.from_linears({**SHAPES, "q_proj": (11, 12)}, 2)
    slots = AdapterSlots(other, 2, 2, torch.float32, "cpu")
    host = HostCache(blobs, 1 << 20)
    residency = AdapterResidency(slots, host)
    adapter = put_adapter(blobs, tmp_path, rank=4)
    host.get(adapter.digest).result(timeout=30)
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


def test_releasing_more_than_acquired_is_an_error_of_ours(world: World) -> None:
    adapter = world.put()
    world.acquire(adapter)
    world.residency.release(adapter.digest)
    with pytest.raises(AssertionError, match="more often"):
        world.residency.release(adapter.digest)


class Residency(RuleBasedStateMachine):
    """Requests come, go and are cancelled; blobs break and heal; loads end at any time. CONVENTIONS' invariant 2."""

    @initialize(host_adapters=st.sampled_from([0, 2, 100]))
    def start(self, host_adapters: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name)
        self.blobs = GatedBlobStore(f"file://{path / 'blobs'}")
        self.world = World(self.blobs, path, host_adapters * random_weights(16, 0).num_bytes)
        self.adapters = [self.world.put(rank, seed) for seed, rank in enumerate([4, 16, 16, 20, 33, 50, 8])]
        self.pins: Counter[int] = Counter()
        self.slot_of: dict[int, int] = {}

    @rule(which=st.integers(0, 6))
    def acquire(self, which: int) -> None:
        try:
            slot = self.world.residency.acquire(self.adapters[which])
        except AdapterLoadFailed:
            assert self.pins[which] == 0, "a pinned adapter cannot fail"
            return
        if self.pins[which]:
            assert slot == self.slot_of[which], "a pinned adapter moved"
        if slot is not None:
            self.pins[which] += 1
            self.slot_of[which] = slot

    @rule(which=st.integers(0, 6))
    def acquire_when_loads_have_ended(self, which: int) -> None:
        """With its blob whole and its load ended, only pinned neighbours can keep an adapter out."""
        self.loads_end()
        if not self.blobs.exists(self.adapters[which].digest):
            return
        before = self.pins[which]
        held = [i for i, count in self.pins.items() if count and i != which]
        pages = sum(num_pages_for(self.adapters[i].rank) for i in held)
        fits = pages + num_pages_for(self.adapters[which].rank) <= NUM_PAGES and len(held) < NUM_SLOTS
        for _ in range(5):  # a past failure, and loads that nobody wants any more, go first
            self.world.residency.poll()
            self.acquire(which)
            self.loads_end()
        assert (self.pins[which] > before) == (fits or before > 0)

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        which = data.draw(st.sampled_from([i for i, count in self.pins.items() if count]))
        self.world.residency.release(self.adapters[which].digest)
        self.pins[which] -= 1

    @rule()
    def poll(self) -> None:
        self.world.residency.poll()

    @rule()
    def loads_end(self) -> None:
        self.blobs.gate.set()
        futures = [loading.future for loading in self.world.residency._loading.values()]
        assert not wait(futures, timeout=30).not_done
        self.blobs.gate.clear()

    @rule(which=st.integers(0, 6))
    def blob_breaks(self, which: int) -> None:
        self.loads_end()
        self.blobs.delete(self.adapters[which].digest)

    @rule(which=st.integers(0, 6))
    def blob_heals(self, which: int) -> None:
        adapter = self.adapters[which]
        self.world.put(adapter.rank, which)

    @invariant()
    def pinned_slots_hold_their_adapters(self) -> None:
        pinned = {which: self.slot_of[which] for which, count in self.pins.items() if count}
        assert len(set(pinned.values())) == len(pinned), "two adapters share a slot"
        for which, slot in pinned.items():
            assert self.world.residency.num_pins(self.adapters[which].digest) == self.pins[which]
            assert_slot_holds(self.world.slots, slot, random_weights(self.adapters[which].rank, which))
        self.world.residency.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.blobs.gate.set()
            self.world.host.close()
            self.folder.cleanup()
            for which, count in self.pins.items():
                for _ in range(count):
                    self.world.residency.release(self.adapters[which].digest)
            self.world.residency.check_integrity()


TestResidency = Residency.TestCase
TestResidency.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
