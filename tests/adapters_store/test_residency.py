"""Residency: pins hold, eviction is by recent use, and nothing leaks, whatever the order of events."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters_store.blobs import BlobStore
from adapters_store.bottleneck_slots import BottleneckSlots
from adapters_store.errors import AdapterLoadFailed
from adapters_store.host_cache import HostCache
from adapters_store.lora_layout import LoRALayout, num_pages_for
from adapters_store.page_copier import PageCopy
from adapters_store.page_image import PageImage
from adapters_store.residency import AdapterResidency
from adapters_store.slots import AdapterSlots
from adapters_store.vector_slots import VectorSlots

from .random_adapters import (
    BOTTLENECKS,
    LAYOUT,
    SHAPES,
    VECTORS,
    GatedBlobStore,
    StoredAdapter,
    assert_slot_holds,
    make_image,
    put_adapter,
    put_bottleneck,
    put_vectors,
    put_virtual_tokens,
    random_weights,
)

NUM_SLOTS = 3
NUM_PAGES = 4


class Arrival:
    """In the place of a CUDA event."""

    def __init__(self) -> None:
        self.is_there = False

    def query(self) -> bool:
        return self.is_there


class SlowSlots(AdapterSlots):
    """Slots whose copies, as on a GPU, are not done when `load` comes back: the test says when."""

    def __init__(self) -> None:
        super().__init__(LAYOUT, NUM_SLOTS, NUM_PAGES, torch.float32, "cpu")
        self.arrivals: dict[int, Arrival] = {}

    def load(self, slot: int, image: PageImage) -> PageCopy:
        super().load(slot, image)
        arrival: Any = Arrival()
        self.arrivals[slot] = arrival
        return PageCopy(image, arrival)

    def copies_end(self) -> None:
        for arrival in self.arrivals.values():
            arrival.is_there = True


class World:
    """Real parts: a blob folder, a host cache, slots. `step` is what an engine step does."""

    def __init__(
        self,
        blobs: BlobStore,
        folder: Path,
        host_pages: int = 40,
        slots: AdapterSlots | None = None,
        num_rows: int = 0,
        num_bottleneck_pages: int = 0,
    ) -> None:
        self.folder = folder
        self.blobs = blobs
        self.ready = threading.Semaphore(0)
        vectors = VectorSlots(VECTORS, num_rows, "cpu") if num_rows else None
        bottlenecks = BottleneckSlots(BOTTLENECKS, num_bottleneck_pages, "cpu") if num_bottleneck_pages else None
        self.slots = slots or AdapterSlots(LAYOUT, NUM_SLOTS, NUM_PAGES, torch.float32, "cpu", vectors, bottlenecks)
        host_bytes = host_pages * LAYOUT.page_bytes(torch.float32)
        self.host = HostCache(
            blobs,
            LAYOUT,
            torch.float32,
            host_bytes,
            vectors=VECTORS if num_rows else None,
            bottlenecks=BOTTLENECKS if num_bottleneck_pages else None,
        )
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

    def put_in_host(self, rank: int = 4, seed: int = 0) -> StoredAdapter:
        adapter = self.put(rank, seed)
        self.host.get(adapter.digest).result(timeout=30)
        return adapter


@pytest.fixture
def slow(blobs: BlobStore, tmp_path: Path) -> Iterator[tuple[World, SlowSlots]]:
    slots = SlowSlots()
    world = World(blobs, tmp_path, slots=slots)
    yield world, slots
    world.residency.check_integrity()
    world.host.close()


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


def test_releasing_more_than_acquired_is_an_error_of_ours(world: World) -> None:
    adapter = world.put()
    world.acquire(adapter)
    world.residency.release(adapter.digest)
    with pytest.raises(AssertionError, match="more often"):
        world.residency.release(adapter.digest)


class Residency(RuleBasedStateMachine):
    """Requests come, go and are cancelled; blobs break and heal; loads and copies end at any time.

    CONVENTIONS' invariant 2.
    """

    @initialize(host_pages=st.sampled_from([0, 2, 6, 100]), is_slow=st.booleans())
    def start(self, host_pages: int, is_slow: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name)
        self.blobs = GatedBlobStore(f"file://{path / 'blobs'}")
        self.slow = SlowSlots() if is_slow else None
        self.world = World(self.blobs, path, host_pages, self.slow)
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
            assert self.slow is None or self.slow.arrivals[slot].is_there, "a slot was handed out before its bytes"
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
        for _ in range(6):  # a past failure, copies, and loads that nobody wants any more, go first
            self.world.residency.poll()
            self.acquire(which)
            self.loads_end()
            self.copies_end()
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

    @rule(upcoming=st.lists(st.integers(0, 6), max_size=7))
    def prefetch(self, upcoming: list[int]) -> None:
        before = set(self.world.residency.stats.resident)
        self.world.residency.prefetch([self.adapters[which] for which in upcoming])
        gone = before - set(self.world.residency.stats.resident)
        assert not gone & {self.adapters[which].name for which in upcoming}

    @rule()
    def copies_end(self) -> None:
        if self.slow is not None:
            self.slow.copies_end()

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
    assert world.slots.free_room.bottleneck_pages == 1


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
