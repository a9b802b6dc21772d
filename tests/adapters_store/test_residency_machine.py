"""Residency: nothing leaks and nothing moves, whatever the order of events."""

from __future__ import annotations

import tempfile
from collections import Counter
from concurrent.futures import wait
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters_store.errors import AdapterLoadFailed
from adapters_store.lora_layout import num_pages_for

from .random_adapters import GatedBlobStore, assert_slot_holds, random_weights
from .residency_world import NUM_PAGES, NUM_SLOTS, SlowSlots, World


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
