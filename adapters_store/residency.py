"""Which adapters are on the device, which are on their way, and which may leave."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from adapters_store.errors import AdapterLoadFailed
from adapters_store.host_cache import HostCache
from adapters_store.slots import AdapterSlots, num_pages_for
from adapters_store.weights import AdapterWeights


class LoadableAdapter(Protocol):
    """What residency must know of an adapter version: `name` for reports, `digest` of its blob, `rank`."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def rank(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ResidencyStats:
    """Counters since the start, and the names of the adapters on the device, least recently used first.

    load_seconds: summed over loads, from the first request for the adapter to its bytes being in host memory,
    plus the copy to its slot; waiting for a slot does not count.
    """

    resident: tuple[str, ...]
    loads: int
    evictions: int
    failures: int
    load_seconds: float


@dataclass(slots=True)
class _Resident:
    name: str
    slot: int
    pins: int = 0


class _Loading:
    """A load under way, or finished and waiting for room."""

    def __init__(self, future: Future[AdapterWeights]) -> None:
        self.future = future
        self.wanted = True
        self._started = self._ended = time.monotonic()
        future.add_done_callback(self._finish)

    def _finish(self, _: Future[AdapterWeights]) -> None:
        self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._ended - self._started


class AdapterResidency:
    """Brings adapters into slots on demand and evicts the least recently used that nobody holds.

    An adapter is absent, loading or resident. `acquire` moves it along and pins it; each pin is given back by
    one `release`. One thread only (the engine's); loads end on others, which call `on_ready` to wake it.
    """

    def __init__(self, slots: AdapterSlots, host: HostCache, on_ready: Callable[[], None] | None = None) -> None:
        self._slots = slots
        self._host = host
        self._on_ready = on_ready
        self._resident: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._loading: dict[str, _Loading] = {}
        self._failed: dict[str, AdapterLoadFailed] = {}
        self._loads = 0
        self._evictions = 0
        self._failures = 0
        self._load_seconds = 0.0

    @property
    def stats(self) -> ResidencyStats:
        """The counters now."""
        names = tuple(entry.name for entry in self._resident.values())
        return ResidencyStats(names, self._loads, self._evictions, self._failures, self._load_seconds)

    def acquire(self, adapter: LoadableAdapter) -> int | None:
        """Pin the adapter and return its slot; None while it loads or every slot it could take is pinned.

        Ask again on a later step: the load goes on. Raises `AdapterLoadFailed` when it cannot be read, does
        not fit the base, or has a rank that needs more pages than there are; asking again on a later step
        tries anew.
        """
        if (entry := self._resident.get(adapter.digest)) is None:
            entry = self._bring_in(adapter)
        if entry is None:
            return None
        entry.pins += 1
        entry.name = adapter.name
        self._resident.move_to_end(adapter.digest)
        return entry.slot

    def release(self, digest: str) -> None:
        """Give one pin back."""
        entry = self._resident[digest]
        assert entry.pins > 0, f"adapter {digest[:12]} is released more often than acquired"
        entry.pins -= 1
        self._resident.move_to_end(digest)

    def poll(self) -> None:
        """Once per step, before its `acquire` calls: collect finished loads.

        A failure is reported to all who ask until the next poll. A finished load that nobody asked for since
        the last poll is let go (the host cache still has it), so that a cancelled request keeps no memory.
        """
        self._failed.clear()
        for digest, loading in list(self._loading.items()):
            if loading.future.done():
                if loading.future.exception() is not None:
                    self._fail(digest, loading)
                elif not loading.wanted:
                    del self._loading[digest]
                loading.wanted = False

    def is_waiting_for_room(self, digest: str) -> bool:
        """Whether the adapter is in host memory and only pinned neighbours keep it from a slot.

        A scheduler that goes on admitting others past such a request can starve it.
        """
        loading = self._loading.get(digest)
        return loading is not None and loading.future.done() and loading.future.exception() is None

    def num_pins(self, digest: str) -> int:
        """Pins held on the adapter; zero when it is not resident."""
        entry = self._resident.get(digest)
        return entry.pins if entry is not None else 0

    def check_integrity(self) -> None:
        """Assert that slots and pages add up and that each loaded slot belongs to one resident adapter."""
        self._slots.check_integrity()
        held = sorted(entry.slot for entry in self._resident.values())
        assert held == sorted(self._slots.slot_pages), "slots and resident adapters differ"
        assert not self._resident.keys() & self._loading.keys(), "an adapter is resident and loading"

    def _bring_in(self, adapter: LoadableAdapter) -> _Resident | None:
        self._check_rank(adapter.digest, adapter.rank)
        if (error := self._failed.get(adapter.digest)) is not None:
            raise error
        loading = self._loading.get(adapter.digest) or self._start(adapter.digest)
        if loading is None:
            return None
        loading.wanted = True
        if not loading.future.done():
            return None
        if loading.future.exception() is not None:
            raise self._fail(adapter.digest, loading)
        return self._place(adapter, loading)

    def _start(self, digest: str) -> _Loading | None:
        # A long queue of distinct adapters must not fill the host's memory with loads that wait for a slot.
        if len(self._loading) >= self._slots.num_slots:
            return None
        future = self._host.get(digest)
        loading = self._loading[digest] = _Loading(future)
        if self._on_ready is not None and not future.done():
            wake = self._on_ready
            future.add_done_callback(lambda _: wake())
        return loading

    def _place(self, adapter: LoadableAdapter, loading: _Loading) -> _Resident | None:
        weights = loading.future.result()
        num_pages = num_pages_for(weights.rank)
        self._check_rank(adapter.digest, weights.rank)
        if not self._make_room(num_pages):
            return None
        slot = self._slots.next_free_slot
        assert slot is not None
        started = time.monotonic()
        del self._loading[adapter.digest]
        try:
            self._slots.load(slot, weights)
        except ValueError as error:
            raise self._record(adapter.digest, str(error)) from error
        self._loads += 1
        self._load_seconds += loading.seconds + time.monotonic() - started
        entry = self._resident[adapter.digest] = _Resident(adapter.name, slot)
        return entry

    def _make_room(self, num_pages: int) -> bool:
        """Evict until a slot and `num_pages` pages are free; evict nothing when that cannot be reached."""
        idle = [digest for digest, entry in self._resident.items() if entry.pins == 0]
        evictable = sum(len(self._slots.pages_of(self._resident[digest].slot)) for digest in idle)
        if self._slots.num_free_pages + evictable < num_pages or self._slots.num_free_slots + len(idle) == 0:
            return False
        for digest in idle:
            if self._slots.num_free_slots > 0 and self._slots.num_free_pages >= num_pages:
                break
            self._slots.free(self._resident.pop(digest).slot)
            self._evictions += 1
        return True

    def _check_rank(self, digest: str, rank: int) -> None:
        if num_pages_for(rank) > self._slots.num_pages or self._slots.num_slots == 0:
            needed, total = num_pages_for(rank), self._slots.num_pages
            raise AdapterLoadFailed(digest, f"its rank {rank} needs {needed} pages and this engine has {total}")

    def _fail(self, digest: str, loading: _Loading) -> AdapterLoadFailed:
        del self._loading[digest]
        cause = loading.future.exception()
        reason = cause.reason if isinstance(cause, AdapterLoadFailed) else str(cause)
        failure = self._record(digest, reason)
        failure.__cause__ = cause
        return failure

    def _record(self, digest: str, reason: str) -> AdapterLoadFailed:
        self._failures += 1
        failure = self._failed[digest] = AdapterLoadFailed(digest, reason)
        return failure
