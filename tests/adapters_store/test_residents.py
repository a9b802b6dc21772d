"""Which adapters leave first, and what one tenant may have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters_store.blobs import BlobStore
from adapters_store.host_cache import HostCache
from adapters_store.residency import AdapterResidency
from adapters_store.residents import Resident, Residents, TenantShare
from adapters_store.slots import AdapterSlots

from .random_adapters import LAYOUT, StoredAdapter, put_adapter


def residents(in_host: Callable[[str], bool], *digests: str) -> Residents:
    made = Residents(in_host)
    for slot, digest in enumerate(digests):
        made.add(digest, Resident(digest, "t", slot, 1))
    return made


def test_of_those_that_come_back_alike_the_least_recently_used_leaves_first() -> None:
    made = residents(lambda _: True, *"abcd")
    made.touch("a")
    assert made.idle() == ["b", "c", "d", "a"]
    made.evict("b")
    made.touch("c")
    assert made.idle() == ["d", "a", "c"]


def test_what_would_come_from_the_store_stays_longer_but_not_for_ever() -> None:
    made = residents(lambda digest: digest != "far", "far", "near")
    evicted = 0
    while "far" in made:
        made.evict(made.idle()[0])
        evicted += 1
        made.add(f"n{evicted}", Resident("n", "t", 9, 1))
        assert evicted < 100
    assert evicted == 50  # as many pages as come from host memory in the time of one from the store


def test_of_those_that_were_not_used_since_then_the_same_goes_first() -> None:
    made = residents(lambda digest: digest != "a", *"abc")
    since = made["c"].used_at
    assert set(made.idle(since=since)) <= {"a", "b"}  # a clock may not tell two of them apart
    made.touch("b")
    assert "b" not in made.idle(since=since)
    assert made.idle() == ["c", "b", "a"]
    assert made.idle(since=0.0) == []


def test_what_is_pinned_or_kept_does_not_leave() -> None:
    made = residents(lambda _: True, *"abc")
    made["a"].pins = 1
    assert made.idle(keep={"b"}) == ["c"]


@pytest.mark.parametrize(
    ("held", "num_pages", "has_room"),
    [([], 99, True), ([1], 1, True), ([1, 1], 0, False), ([4], 1, True), ([4], 2, False)],
)
def test_a_share_is_of_slots_and_of_pages_and_one_adapter_is_always_in_it(
    held: list[int], num_pages: int, has_room: bool
) -> None:
    assert TenantShare.of(0.5, 4, 10).has_room(held, num_pages) is has_room
    assert TenantShare.of(1.0, 4, 10).has_room(held, num_pages)


class World:
    """Four slots and eight pages, of which a tenant may have half."""

    def __init__(self, blobs: BlobStore, folder: Path) -> None:
        self.slots = AdapterSlots(LAYOUT, 4, 8, torch.float32, "cpu")
        self.host = HostCache(blobs, LAYOUT, torch.float32, 40 * LAYOUT.page_bytes(torch.float32))
        self.residency = AdapterResidency(self.slots, self.host, share=0.5)
        self._put = lambda rank, seed: put_adapter(blobs, folder, rank, seed)

    def put(self, name: str, rank: int = 4) -> StoredAdapter:
        adapter = self._put(rank, sum(name.encode()))
        self.host.get(adapter.digest).result(timeout=30)
        return replace(adapter, name=name)

    def take(self, *adapters: StoredAdapter) -> None:
        for adapter in adapters:
            assert self.residency.acquire(adapter) is not None

    @property
    def resident(self) -> tuple[str, ...]:
        return self.residency.stats.resident


@pytest.fixture
def world(blobs: BlobStore, tmp_path: Path) -> World:
    return World(blobs, tmp_path)


def test_a_tenant_at_its_share_waits_for_its_own_and_others_do_not(world: World) -> None:
    a, b, c, other = (world.put(name) for name in ("acme/a:1", "acme/b:1", "acme/c:1", "zeta/a:1"))
    world.take(a, b)
    assert world.residency.acquire(c) is None
    assert world.residency.exceeds_share(c)
    assert not world.residency.is_waiting_for_room(c.digest)
    assert not world.residency.exceeds_share(other)
    world.take(other)
    world.residency.release(a.digest)
    world.take(c)
    assert world.resident == ("acme/b:1", "zeta/a:1", "acme/c:1")
    world.residency.check_integrity()


def test_a_tenant_at_its_share_exchanges_its_own_though_others_are_idle_longer(world: World) -> None:
    other, a, b, c = (world.put(name) for name in ("zeta/a:1", "acme/a:1", "acme/b:1", "acme/c:1"))
    world.take(other, a, b)
    for adapter in (other, a, b):
        world.residency.release(adapter.digest)
    world.take(c)
    assert world.resident == ("zeta/a:1", "acme/b:1", "acme/c:1")
    assert world.residency.stats.evictions == 1


def test_a_share_of_pages_is_kept_with_large_adapters(world: World) -> None:
    small, large = world.put("acme/a:1", rank=20), world.put("acme/b:1", rank=40)  # two pages and three, of four
    world.take(small)
    assert world.residency.exceeds_share(large)
    world.residency.release(small.digest)
    world.take(large)
    assert world.resident == ("acme/b:1",)
    whole = world.put("zeta/a:1", rank=80)  # five pages: more than the share, and alone
    world.take(whole)
    world.residency.check_integrity()


def test_prefetching_does_not_exceed_a_share(world: World) -> None:
    a, b, c, other = (world.put(name) for name in ("acme/a:1", "acme/b:1", "acme/c:1", "zeta/a:1"))
    world.take(a, b)
    world.residency.prefetch([c, other])
    assert world.resident == ("acme/a:1", "acme/b:1", "zeta/a:1")
