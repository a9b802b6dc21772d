"""Which adapters are on the device, which are on their way, and which may leave."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from adapters_store.errors import AdapterLoadFailed, StoreError, StoreUnavailable
from adapters_store.host_cache import HostCache
from adapters_store.lora_layout import num_pages_for
from adapters_store.page_copier import PageCopy
from adapters_store.page_image import PageImage
from adapters_store.residents import Resident, Residents, TenantShare
from adapters_store.slots import AdapterSlots, Room


class LoadableAdapter(Protocol):
    """What residency must know of an adapter version: `name` for reports, `digest` of its blob, `rank`.

    tenant: whose it is. num_virtual_tokens: how many its users count before every prompt.
    """

    @property
    def name(self) -> str: ...

    @property
    def tenant(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def num_virtual_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ResidencyStats:
    """Counters since the start, and the names of the adapters on the device, least recently used first.

    load_seconds: summed over loads, from the first request for the adapter to its image being in host memory,
    plus the copy to its slot until that was seen done; waiting for a slot does not count.
    """

    resident: tuple[str, ...]
    loads: int
    evictions: int
    failures: int
    load_seconds: float


class _Loading:
    """A load into host memory, under way or finished and waiting for room."""

    def __init__(self, future: Future[PageImage], tenant: str, num_pages: int) -> None:
        self.future = future
        self.tenant = tenant
        self.num_pages = num_pages
        self.wanted = True
        self.forget_waits()
        self._started = self._ended = time.monotonic()
        future.add_done_callback(self._finish)

    def forget_waits(self) -> None:
        """Note that the adapter was not looked at yet in this step."""
        self.waits_for_lent_pages = False
        self.waits_for_step = False  # and no longer for room

    def _finish(self, _: Future[PageImage]) -> None:
        self._ended = time.monotonic()

    @property
    def is_loaded(self) -> bool:
        return self.future.done() and self.future.exception() is None

    @property
    def seconds(self) -> float:
        return self._ended - self._started


@dataclass(frozen=True, slots=True)
class _Copying:
    """A copy under way into a slot that nobody may use yet. seconds: what the load into host memory took."""

    name: str
    tenant: str
    slot: int
    copy: PageCopy
    num_pages: int
    seconds: float
    started: float


class AdapterResidency:
    """Brings adapters into slots on demand and evicts what nobody holds, in the order of `Residents`.

    share: the part of the slots and of the pages that one tenant's adapters may take, but one adapter always. A tenant
    that has it exchanges its own.

    An adapter is absent, loading (into host memory), copying (to the device) or resident. `acquire` moves it along and
    pins it; each pin is given back by one `release`. A copy that began always ends, and its adapter is resident then,
    wanted or not. One thread only (the engine's); loads end on others, which call `on_ready` to wake it. Copies wake
    nobody: while `is_copying`, `poll` soon.
    """

    def __init__(
        self,
        slots: AdapterSlots,
        host: HostCache,
        on_ready: Callable[[], None] | None = None,
        *,
        share: float = 1.0,
    ) -> None:
        self._slots = slots
        self._host = host
        self._on_ready = on_ready
        self._share = TenantShare.of(share, slots.num_slots, slots.num_pages)
        self._resident = Residents(host.holds)
        self._copying: dict[str, _Copying] = {}
        self._loading: dict[str, _Loading] = {}
        self._failed: dict[str, StoreError] = {}
        self._is_idle = False
        self._host_pages = 0  # that loads and copies hold
        self._loads = 0
        self._evictions = 0
        self._failures = 0
        self._load_seconds = 0.0

    @property
    def stats(self) -> ResidencyStats:
        """The counters now."""
        names = tuple(entry.name for entry in self._resident.values())
        return ResidencyStats(names, self._loads, self._evictions, self._failures, self._load_seconds)

    @property
    def is_copying(self) -> bool:
        """Whether a copy to the device was under way at the last `poll`, or has begun since."""
        return bool(self._copying)

    def acquire(self, adapter: LoadableAdapter) -> int | None:
        """Pin the adapter and return its slot; None while it is on its way or every slot it could take is pinned.

        Ask again on a later step: the load goes on. Raises `AdapterLoadFailed` when it cannot be read, does
        not fit the base, has a rank that needs more pages than there are, or other virtual tokens than it says, and
        `StoreUnavailable` when the store does not answer; asking again on a later step tries anew.
        """
        if (entry := self._resident.get(adapter.digest)) is None:
            entry = self._bring_in(adapter)
        if entry is None:
            return None
        self._check_virtual_tokens(adapter, entry.slot)
        entry.pins += 1
        entry.name, entry.tenant = adapter.name, adapter.tenant
        self._resident.touch(adapter.digest)
        return entry.slot

    def prefetch(self, adapters: Iterable[LoadableAdapter]) -> None:
        """Once per step, after its `acquire` calls: bring in, in this order, those that will be acquired next.

        It takes half of what loads may take of the host, slots that nobody holds, and one copy at a time. None of
        `adapters` is evicted for another, or has what one before it waits for. A failure is told to who acquires.
        """
        upcoming = {adapter.digest: adapter for adapter in adapters}
        may_copy = not self._copying
        for digest, adapter in upcoming.items():
            if digest in self._resident or digest in self._copying or digest in self._failed:
                continue
            if self.exceeds_share(adapter):
                continue
            loading = self._loading.get(digest) or self._start(adapter, share=2)
            if loading is None:
                break
            loading.wanted = True
            if may_copy and loading.is_loaded:
                may_copy = False
                self._place(adapter, loading, keep=upcoming)

    def release(self, digest: str) -> None:
        """Give one pin back."""
        entry = self._resident[digest]
        assert entry.pins > 0, f"adapter {digest[:12]} is released more often than acquired"
        entry.pins -= 1
        self._resident.touch(digest)

    def poll(self, *, is_idle: bool = False) -> None:
        """Before a step's `acquire` calls: collect finished copies and loads.

        A finished load that nobody asked for since the last poll is let go (the host cache may still have it), so
        that a cancelled request keeps no memory. A failure is reported to all who ask until the next poll. is_idle:
        nothing runs, so that no step would save what the pages hold that an adapter is to take.
        """
        self._is_idle = is_idle
        self._failed.clear()
        self._slots.pages.begin_step()
        for digest in list(self._copying):
            self._settle(digest)
        for digest, loading in list(self._loading.items()):
            if loading.future.done():
                if not loading.wanted:
                    self._let_go(digest)
                loading.wanted = False
                loading.forget_waits()

    def give_up_pages(self, since: float) -> bool:
        """Evict, of the adapters with pages that nobody has used since then, the first to go. False if there is none.

        since: on the monotonic clock.
        """
        idle = self._resident.idle(since=since)
        digest = next((d for d in idle if self._slots.pages_of(self._resident[d].slot).ids), None)
        if digest is not None:
            self._evict(digest)
        return digest is not None

    def is_waiting_for_room(self, digest: str) -> bool:
        """Whether the adapter is in host memory and only pinned neighbours keep it from a slot.

        A scheduler that goes on admitting others past such a request can starve it.
        """
        loading = self._loading.get(digest)
        return loading is not None and loading.is_loaded and not loading.waits_for_step

    def contention(self, waiting: str) -> Callable[[str], bool]:
        """Whether an adapter has, or would take, any of what the one which `is_waiting_for_room` lacks; by its digest.

        What nobody has a pin on is not lacking. Of an adapter whose needs are not known before it is loaded, True.
        """
        needed = Room.needed(self._loading[waiting].future.result())
        room = self._slots.room([self._resident[digest].slot for digest in self._resident.idle()])
        if room.slots < needed.slots:
            return lambda _: True  # each has one, or takes one

        def contends(digest: str) -> bool:
            if (entry := self._resident.get(digest) or self._copying.get(digest)) is not None:
                return self._slots.held_room(entry.slot).helps(room, needed)
            loading = self._loading.get(digest)
            return loading is None or not loading.is_loaded or Room.needed(loading.future.result()).helps(room, needed)

        return contends

    def would_fit(self, waiting: str, given_up: Iterable[str]) -> bool:
        """Whether the one which `is_waiting_for_room` would have it if nobody had a pin on these resident ones."""
        slots = [self._resident[digest].slot for digest in {*self._resident.idle(), *given_up}]
        image = self._loading[waiting].future.result()
        return self._slots.would_have_room(image, slots, more_pages=self._slots.pages.num_in_use)

    def is_waiting_for_lent_pages(self, digest: str) -> bool:
        """Whether the adapter is in host memory and only pages that were lent keep it from a slot.

        They are emptied as far as what they hold finds room elsewhere: who takes that room makes it wait.
        """
        loading = self._loading.get(digest)
        return loading is not None and loading.waits_for_lent_pages

    def exceeds_share(self, adapter: LoadableAdapter) -> bool:
        """Whether an adapter that is not on the device waits for others of its tenant to be given back.

        Its tenant's requests wait then, and nobody else's.
        """
        if self._share.is_whole or adapter.digest in self._resident or adapter.digest in self._copying:
            return False
        tenant = adapter.tenant
        held = [entry.num_pages for entry in self._resident.values() if entry.tenant == tenant and entry.pins]
        held += [entry.num_pages for entry in self._copying.values() if entry.tenant == tenant]
        return not self._share.has_room(held, num_pages_for(adapter.rank))

    def num_prefix_tokens(self, slot: int) -> int:
        """Virtual tokens whose keys and values an adapter on the device holds itself; 0 for the bare base (-1)."""
        virtual = self._slots.virtual_tokens(slot)
        return len(virtual) if virtual is not None and virtual.dim() == 3 else 0

    def num_pins(self, digest: str) -> int:
        """Pins held on the adapter; zero when it is not resident."""
        entry = self._resident.get(digest)
        return entry.pins if entry is not None else 0

    @property
    def num_held(self) -> int:
        """Adapters on which anyone holds a pin."""
        return sum(entry.pins > 0 for entry in self._resident.values())

    def check_integrity(self) -> None:
        """Assert that slots and pages add up and that each loaded slot belongs to one resident adapter."""
        self._slots.check_integrity()
        held = [entry.slot for entry in self._resident.values()] + [entry.slot for entry in self._copying.values()]
        assert sorted(held) == sorted(self._slots.slot_pages), "slots and their adapters differ"
        digests = [*self._loading, *self._copying, *self._resident]
        assert len(set(digests)) == len(digests), "an adapter is in two states"
        num_pages = sum(entry.num_pages for entry in self._loading.values())
        num_pages += sum(entry.num_pages for entry in self._copying.values())
        assert self._host_pages == num_pages, "pages of host memory are miscounted"

    def _bring_in(self, adapter: LoadableAdapter) -> Resident | None:
        if adapter.digest in self._copying:
            return None
        self._check_rank(adapter.digest, adapter.rank)
        if (error := self._failed.get(adapter.digest)) is not None:
            raise error
        if self.exceeds_share(adapter):
            return None
        loading = self._loading.get(adapter.digest) or self._start(adapter, share=1)
        if loading is None:
            return None
        loading.wanted = True
        if not loading.future.done():
            return None
        if loading.future.exception() is not None:
            raise self._fail(adapter.digest, loading)
        self._check_rank(adapter.digest, loading.future.result().rank)
        self._check_bottleneck(adapter.digest, loading.future.result())
        self._check_token_rows(adapter.digest, loading.future.result())
        self._place(adapter, loading, keep=())
        return self._resident.get(adapter.digest)

    def _start(self, adapter: LoadableAdapter, share: int) -> _Loading | None:
        """Load into host memory, unless there are loads for all slots then, or for all of that, or for their `share`.

        A long queue of distinct adapters must not fill it with what waits for a slot. One always may load alone.
        """
        num_pages = num_pages_for(adapter.rank)
        is_full = len(self._loading) >= self._slots.num_slots // share
        is_full |= self._host_pages + num_pages > self._host.num_pages // share
        if is_full and (self._loading or self._copying or share > 1):
            return None
        future = self._host.get(adapter.digest)
        loading = self._loading[adapter.digest] = _Loading(future, adapter.tenant, num_pages)
        self._host_pages += num_pages
        if self._on_ready is not None and not future.done():
            wake = self._on_ready
            future.add_done_callback(lambda _: wake())
        return loading

    def _let_go(self, digest: str) -> None:
        self._host_pages -= self._loading.pop(digest).num_pages

    def _place(self, adapter: LoadableAdapter, loading: _Loading, keep: Collection[str]) -> None:
        """Start to copy a loaded adapter into a slot, if there is one or can be without evicting what to `keep`."""
        image, idle = loading.future.result(), self._resident.idle(keep)
        loading.forget_waits()
        exchanged = self._to_exchange(image, adapter.tenant, idle)
        if exchanged is None:
            return
        slots = [self._resident[digest].slot for digest in idle]
        if not self._slots.would_have_room(image, slots):
            if not keep:
                may_come = self._slots.recall_pages(image, slots)
                lent = self._slots.pages.num_in_use
                loading.waits_for_lent_pages = self._slots.would_have_room(image, slots, more_pages=lent)
                loading.waits_for_step = may_come and loading.waits_for_lent_pages
            return
        self._make_room(image, idle, exchanged)
        loading.waits_for_step = not self._is_idle and not self._slots.pages.make_ready(image.num_pages)
        if not loading.waits_for_step:
            self._copy(adapter, loading)

    def _copy(self, adapter: LoadableAdapter, loading: _Loading) -> None:
        slot = self._slots.next_free_slot
        assert slot is not None
        started = time.monotonic()
        copy = self._slots.load(slot, loading.future.result())
        del self._loading[adapter.digest]
        self._copying[adapter.digest] = _Copying(
            adapter.name, adapter.tenant, slot, copy, loading.num_pages, loading.seconds, started
        )
        self._settle(adapter.digest)

    def _settle(self, digest: str) -> None:
        """Make an adapter resident when its copy is done."""
        copying = self._copying[digest]
        if not copying.copy.is_done:
            return
        del self._copying[digest]
        self._host_pages -= copying.num_pages
        self._resident.add(digest, Resident(copying.name, copying.tenant, copying.slot, copying.num_pages))
        self._loads += 1
        self._load_seconds += copying.seconds + time.monotonic() - copying.started

    def _make_room(self, image: PageImage, idle: Iterable[str], exchanged: Collection[str]) -> None:
        """Evict what is exchanged, and of what is idle what the image needs room of, nothing that would give none."""
        for digest in exchanged:
            self._evict(digest)
        for digest in idle:
            if self._slots.has_room(image):
                break
            if digest not in exchanged and self._slots.lacks_for(image, self._resident[digest].slot):
                self._evict(digest)

    def _to_exchange(self, image: PageImage, tenant: str, idle: list[str]) -> list[str] | None:
        """Which of its idle adapters a tenant gives up to stay within its share; None where they do not do."""
        own = {digest: entry.num_pages for digest, entry in self._resident.items() if entry.tenant == tenant}
        own |= {digest: entry.num_pages for digest, entry in self._copying.items() if entry.tenant == tenant}
        exchanged: list[str] = []
        candidates = (digest for digest in idle if digest in own)
        while not self._share.has_room([own[d] for d in own if d not in exchanged], image.num_pages):
            if (digest := next(candidates, None)) is None:
                return None
            exchanged.append(digest)
        return exchanged

    def _evict(self, digest: str) -> None:
        self._slots.free(self._resident.evict(digest).slot)
        self._evictions += 1

    def _check_rank(self, digest: str, rank: int) -> None:
        if num_pages_for(rank) > self._slots.num_pages or self._slots.num_slots == 0:
            needed, total = num_pages_for(rank), self._slots.num_pages
            raise AdapterLoadFailed(digest, f"its rank {rank} needs {needed} pages and this engine has {total}")

    def _check_bottleneck(self, digest: str, image: PageImage) -> None:
        needed, total = image.num_bottleneck_pages, self._slots.num_bottleneck_pages
        if needed > total:
            reason = f"its bottlenecks need {needed} pages and this engine has {total} (engine.num_bottleneck_pages)"
            raise AdapterLoadFailed(digest, reason)

    def _check_token_rows(self, digest: str, image: PageImage) -> None:
        total = len(self._slots.tokens.rows) if self._slots.tokens is not None else 0
        if image.num_token_rows > total:
            reason = f"its {image.num_token_rows} rows of tokens are more than this engine's {total} (num_token_rows)"
            raise AdapterLoadFailed(digest, reason)

    def _check_virtual_tokens(self, adapter: LoadableAdapter, slot: int) -> None:
        """Who counts none of them would be served the bare base."""
        virtual = self._slots.virtual_tokens(slot)
        num_tokens = 0 if virtual is None else len(virtual)
        if num_tokens != adapter.num_virtual_tokens:
            reason = f"it has {num_tokens} virtual tokens and the request counts {adapter.num_virtual_tokens}"
            raise AdapterLoadFailed(adapter.digest, reason)

    def _fail(self, digest: str, loading: _Loading) -> StoreError:
        self._let_go(digest)
        self._failures += 1
        cause = loading.future.exception()
        failure = self._failed[digest] = _failure(digest, cause)
        failure.__cause__ = cause
        return failure


def _failure(digest: str, cause: BaseException | None) -> StoreError:
    """What a load ended with, as the adapter's own failure unless it is the store's."""
    if isinstance(cause, StoreUnavailable):
        return StoreUnavailable(str(cause))
    return AdapterLoadFailed(digest, cause.reason if isinstance(cause, AdapterLoadFailed) else str(cause))
