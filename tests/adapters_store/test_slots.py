"""Slots hold exactly their adapter's rows, and pages are never lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.slots import AdapterSlots, LoRALayout, num_pages_for
from adapters_store.weights import AdapterWeights
from lora_kernels.segments import PAGE_RANK

from .random_adapters import LAYOUT, SHAPES, assert_slot_holds, random_weights


def make_slots(num_slots: int = 3, num_pages: int = 6, dtype: torch.dtype = torch.float32) -> AdapterSlots:
    return AdapterSlots(LAYOUT, num_slots, num_pages, dtype, "cpu")


def load(slots: AdapterSlots, weights: AdapterWeights) -> int:
    slot = slots.next_free_slot
    assert slot is not None
    slots.load(slot, weights)
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
    tensors = [tensor for pool in pools for tensor in vars(pool).values() if tensor is not None]
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


@pytest.mark.parametrize(
    "key_and_pair",
    [
        ((2, "q_proj"), (torch.zeros(4, 12), torch.zeros(10, 4))),
        ((0, "lm_head"), (torch.zeros(4, 12), torch.zeros(10, 4))),
        ((0, "q_proj"), (torch.zeros(4, 13), torch.zeros(10, 4))),
        ((0, "q_proj"), (torch.zeros(4, 12), torch.zeros(11, 4))),
        ((0, "q_proj"), (torch.zeros(4, 12), torch.zeros(10, 5))),
        ((0, "q_proj"), (torch.zeros(9, 12), torch.zeros(10, 9))),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    key_and_pair: tuple[tuple[int, str], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    slots = make_slots()
    weights = AdapterWeights(8, dict([key_and_pair]))
    with pytest.raises(ValueError, match=f"{key_and_pair[0][1]}"):
        slots.load(0, weights)
    assert (slots.num_free_slots, slots.num_free_pages) == (3, 6)
    slots.check_integrity()


def test_a_b_that_is_infinite_in_float16_is_refused_there() -> None:
    weights = AdapterWeights(4, {(0, "q_proj"): (torch.zeros(4, 12), torch.full((10, 4), 7e4))})
    slots = make_slots(dtype=torch.float16)
    with pytest.raises(ValueError, match="q_proj in layer 0 is infinite in float16"):
        slots.load(0, weights)
    assert slots.num_free_pages == 6
    make_slots(dtype=torch.bfloat16).load(0, weights)


def test_integrity_check_sees_a_lost_and_a_shared_page() -> None:
    slots = make_slots()
    load(slots, random_weights(20, seed=1))
    slots._free_pages.pop()
    with pytest.raises(AssertionError, match="pages"):
        slots.check_integrity()
    slots._free_pages.append(0)
    with pytest.raises(AssertionError, match="pages"):
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


def test_pages_in_8_bits_are_the_matrices_to_half_a_step_of_each_rank() -> None:
    weights = random_weights(20, seed=1, linears=["q_proj", "v_proj"])
    slots = make_slots(dtype=torch.int8)
    pages = list(slots.pages_of(load(slots, weights)).ids)
    pools = slots.pools(1, "qkv")
    assert pools.a_scales is not None
    assert pools.b_scales is not None
    for index, linear in ((0, "q_proj"), (2, "v_proj")):
        a, b = weights.tensors[1, linear]
        a_scales, b_scales = (scales[pages, index].flatten()[:20, None] for scales in (pools.a_scales, pools.b_scales))
        held_a = pools.a[pages, index].flatten(0, 1)[:20] * a_scales
        held_b = pools.b[pages].flatten(0, 1)[:20, LAYOUT.group("qkv").columns(linear)] * b_scales
        assert ((held_a - a).abs() <= 0.501 * a_scales).all()
        assert ((held_b - b.T).abs() <= 0.501 * b_scales).all()
    assert not pools.a[pages, 1].any()
