"""Slots hold exactly their adapter's rows, and pages are never lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.lora_layout import LoRALayout, num_pages_for
from adapters_store.slots import AdapterSlots, Place
from adapters_store.weights import AdapterWeights
from lora_kernels.segments import PAGE_RANK

from .random_adapters import LAYOUT, SHAPES, assert_slot_holds, make_image, random_weights


def make_slots(num_slots: int = 3, num_pages: int = 6, dtype: torch.dtype = torch.float32) -> AdapterSlots:
    return AdapterSlots(LAYOUT, num_slots, num_pages, dtype, "cpu")


def load(slots: AdapterSlots, weights: AdapterWeights) -> int:
    slot = slots.next_free_slot
    assert slot is not None
    dtype = slots.pools(0, "qkv").a.dtype
    assert slots.load(slot, make_image(weights, dtype, slots.layout)).is_done
    return slot


def test_the_layout_groups_linears_by_their_input() -> None:
    assert [(g.name, g.widths, g.in_features) for g in LAYOUT.groups] == [
        ("qkv", (10, 6, 8), 12),
        ("o", (12,), 10),
        ("gate_up", (20, 22), 12),
        ("down", (12,), 20),
    ]
    assert LAYOUT.group("qkv").columns("v_proj") == slice(16, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_page_bytes_are_what_the_pools_take(dtype: torch.dtype) -> None:
    slots = make_slots(num_pages=5, dtype=dtype)
    pools = [slots.pools(layer, group.name) for layer in range(2) for group in LAYOUT.groups]
    tensors = [tensor for pool in pools for tensor in pool.arrays]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == 5 * LAYOUT.page_bytes(dtype)


@pytest.mark.parametrize(("rank", "pages"), [(1, 1), (16, 1), (17, 2), (32, 2), (33, 3), (64, 4)])
def test_a_rank_takes_its_share_of_pages(rank: int, pages: int) -> None:
    slots = make_slots()
    slot = load(slots, random_weights(rank, seed=rank))
    assert slots.pages_of(slot).rank == rank
    assert num_pages_for(rank) == pages == len(slots.pages_of(slot)) == 6 - slots.num_free_pages
    slots.check_integrity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smaller_adapters_inherit_no_rows(dtype: torch.dtype) -> None:
    slots = make_slots(num_slots=2, num_pages=4, dtype=dtype)
    first = load(slots, random_weights(64, seed=1))
    slots.free(first)
    partial = random_weights(20, seed=2, linears=["k_proj", "down_proj"])
    small = random_weights(3, seed=3, num_layers=1)
    slot, other = load(slots, partial), load(slots, small)
    assert_slot_holds(slots, slot, partial)
    assert_slot_holds(slots, other, small)


def test_ranks_may_differ_between_linears() -> None:
    low, high = random_weights(2, seed=1, linears=["q_proj"]), random_weights(30, seed=2, linears=["v_proj"])
    weights = AdapterWeights(30, {**low.tensors, **high.tensors})
    slots = make_slots()
    assert_slot_holds(slots, load(slots, weights), weights)


def test_neighbours_are_not_touched() -> None:
    slots = make_slots()
    kept = random_weights(20, seed=1)
    slot = load(slots, kept)
    for seed in range(5):
        slots.free(load(slots, random_weights(40, seed)))
    assert_slot_holds(slots, slot, kept)


def test_each_load_has_a_generation_of_its_own() -> None:
    slots = make_slots(num_slots=6)
    seen = {slots.generation(slot) for slot in range(6)}
    assert seen == {0}
    for seed in range(6):
        slot = load(slots, random_weights(4, seed))
        assert slots.generation(slot) not in seen
        seen.add(slots.generation(slot))
        if seed % 2:
            slots.free(slot)


def test_slot_pages_is_a_live_view() -> None:
    slots = make_slots()
    view = slots.slot_pages
    slot = load(slots, random_weights(20, seed=1))
    assert dict(view) == {slot: slots.pages_of(slot)}
    slots.free(slot)
    assert not view


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_what_kernels_read_of_a_layer_is_contiguous(dtype: torch.dtype) -> None:
    slots = make_slots(dtype=dtype)
    arrays = [array for layer in range(2) for group in LAYOUT.groups for array in slots.pools(layer, group.name).arrays]
    assert len(arrays) == (32 if dtype == torch.int8 else 16)
    assert all(array.is_contiguous() and array.data_ptr() % 16 == 0 for array in arrays)
    assert len({array.data_ptr() for array in arrays}) == len(arrays)


def test_an_adapter_is_loaded_into_the_pages_that_are_asked_for() -> None:
    slots, adapter = make_slots(), random_weights(20, seed=1)
    slots.load(2, make_image(adapter, torch.float32, LAYOUT), Place((4, 1)))
    assert slots.place(2) == Place((4, 1))
    assert_slot_holds(slots, 2, adapter)
    slots.check_integrity()


@given(st.lists(st.one_of(st.integers(1, 40), st.none()), max_size=25))
def test_free_and_used_make_the_total(operations: list[int | None]) -> None:
    slots = AdapterSlots(LoRALayout.from_linears(SHAPES, num_layers=1), 3, 5, torch.float32, "cpu")
    held: dict[int, AdapterWeights] = {}
    for seed, rank in enumerate(operations):
        if rank is None and held:
            slot = next(iter(held))
            slots.free(slot)
            del held[slot]
        elif rank is not None and num_pages_for(rank) <= slots.num_free_pages and slots.num_free_slots:
            weights = random_weights(rank, seed, num_layers=1)
            held[load(slots, weights)] = weights
        slots.check_integrity()
        used = sum(len(pages) for pages in slots.slot_pages.values())
        assert used + slots.num_free_pages == 5
        assert len(held) + slots.num_free_slots == 3
    for slot, weights in held.items():
        assert_slot_holds(slots, slot, weights)


def test_a_page_holds_page_rank_rows() -> None:
    pools = make_slots().pools(0, "qkv")
    assert pools.a.shape == (6, 3, PAGE_RANK, 12)
    assert pools.b.shape == (6, PAGE_RANK, 24)
