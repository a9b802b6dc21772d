"""Real parts around a residency, and copies that end when the test says so."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from adapters_store.blobs import BlobStore
from adapters_store.bottleneck_slots import BottleneckSlots
from adapters_store.host_cache import HostCache
from adapters_store.page_copier import PageCopy
from adapters_store.page_image import PageImage
from adapters_store.residency import AdapterResidency
from adapters_store.slots import AdapterSlots
from adapters_store.vector_slots import VectorSlots

from .random_adapters import BOTTLENECKS, LAYOUT, VECTORS, StoredAdapter, put_adapter

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
