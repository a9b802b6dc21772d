from collections.abc import Mapping
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_kernels.segments import (
    FEW_PAGES,
    FIELDS,
    PAGE_RANK,
    AdapterPages,
    DeviceRouting,
    LoRASegments,
    Routing,
    fixed_size,
    order_capacity,
)

PAGES = {
    0: AdapterPages(16, (3,)),
    1: AdapterPages(20, (4, 9)),
    2: AdapterPages(64, (1, 2, 7, 11)),
    3: AdapterPages(1, (12,)),
}
SLOTS = st.lists(st.integers(-1, 3), max_size=80)


def _routed(table: list[list[int]], order: list[int]) -> dict[int, tuple[int, ...]]:
    """token -> its pages, as the kernels read the table."""
    (num_chunks, num_rows, num_vectors, *_), *rows = table
    assert num_rows == len(rows)
    routed = {}
    for number, (first, length, rank, token, page, nth, more, _) in enumerate(rows[:num_chunks]):
        assert (length == 1) == (number < num_vectors)
        assert (nth, token) == (0, order[first])
        further = rows[more : more + -(-rank // PAGE_RANK) - 1]
        assert [row[5] for row in further] == list(range(1, len(further) + 1))
        assert all(row[:4] == [first, length, rank, token] for row in further)
        for token in order[first : first + length]:
            assert token not in routed
            routed[token] = (page, *(row[4] for row in further))
    return routed


def _expected(slots: list[int], pages: Mapping[int, AdapterPages]) -> dict[int, tuple[int, ...]]:
    return {token: pages[slot].ids for token, slot in enumerate(slots) if slot >= 0}


@given(SLOTS)
def test_every_adapter_token_is_in_one_chunk_with_its_own_pages(slots: list[int]) -> None:
    segments = LoRASegments.build(np.array(slots, dtype=np.int32), PAGES, "cpu")
    if segments is None:
        assert not _expected(slots, PAGES)
        return
    assert _routed(segments.routing.table.tolist(), segments.routing.token_order.tolist()) == _expected(slots, PAGES)
    assert (segments.routing.table[1:, 1] <= segments.routing.chunk_tokens).all()
    assert segments.routing.table[0, :2].tolist() == [segments.routing.most_chunks, segments.routing.most_rows]


def test_a_long_step_is_cut_into_longer_chunks() -> None:
    slots = [0] * 700
    segments = LoRASegments.build(np.array(slots, dtype=np.int32), PAGES, "cpu")
    assert segments is not None
    assert segments.routing.most_chunks == 11
    assert _routed(segments.routing.table.tolist(), segments.routing.token_order.tolist()) == _expected(slots, PAGES)


def test_a_routing_that_is_packed_and_unpacked_is_the_same_routing() -> None:
    slots = [2, 0, -1, 0, 1]
    routing = Routing.of(np.array(slots, dtype=np.int32), len(slots), PAGES)
    buffer = np.full(fixed_size(9, 4), -1, np.int32)
    packed = routing.packed(order_capacity(9))
    buffer[: len(packed)] = packed
    there = DeviceRouting.of(torch.from_numpy(buffer), 5, order_capacity(9), most_chunks=5, most_rows=20)
    table = there.table[: len(routing.table)].tolist()
    assert _routed(table, there.token_order.tolist()) == _expected(slots, PAGES)
    assert there.page_ids[: routing.num_pages].tolist() == routing.page_ids.tolist()


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=60).filter(lambda slots: max(slots) >= 0))
def test_a_routing_names_every_page_once_and_where_it_is(slots: list[int]) -> None:
    routing = Routing.of(np.array(slots, np.int32), len(slots), PAGES)
    assert sorted(routing.page_ids) == sorted(chain(*(PAGES[slot].ids for slot in set(slots) if slot >= 0)))
    assert routing.table[0, 4] == routing.num_pages
    assert (routing.page_ids[routing.table[1:, 7]] == routing.table[1:, 4]).all()
    packed = routing.packed(order_capacity(len(slots)))
    sent = packed[order_capacity(len(slots)) :][:FEW_PAGES]
    assert sent[: routing.num_pages].tolist() == routing.page_ids[:FEW_PAGES].tolist()
    assert (packed[order_capacity(len(slots)) + FEW_PAGES :].reshape(-1, FIELDS) == routing.table).all()


def test_the_columns_of_a_step_are_zeros_once_and_shared_by_all_layers() -> None:
    segments = LoRASegments.build(np.array([0, 1, -1], np.int32), PAGES, "cpu")
    assert segments is not None
    columns = segments.columns(2, torch.float32)
    assert columns.shape == (3, 2, 8 * PAGE_RANK)
    assert not columns.any()
    columns += 1
    assert segments.columns(2, torch.float32) is columns
    assert segments.columns(1, torch.float32).shape == (3, 1, 8 * PAGE_RANK)


def test_a_step_without_adapters_has_no_segments() -> None:
    assert LoRASegments.build(np.array([-1, -1], dtype=np.int32), PAGES, "cpu") is None


def test_an_unknown_slot_is_an_error() -> None:
    with pytest.raises(KeyError):
        LoRASegments.build(np.array([7], dtype=np.int32), PAGES, "cpu")


@given(SLOTS)
def test_an_adapter_without_pages_is_as_the_bare_base(slots: list[int]) -> None:
    without = {**PAGES, 0: AdapterPages(0, ()), 3: AdapterPages(0, ())}
    bare = [-1 if slot in (0, 3) else slot for slot in slots]
    got, wanted = (Routing.of(np.array(kept, np.int32), 80, pages) for kept, pages in ((slots, without), (bare, PAGES)))
    assert got.table.tolist() == wanted.table.tolist()
    assert got.token_order.tolist() == wanted.token_order.tolist()
    built = LoRASegments.build(np.array(slots, np.int32), without, "cpu")
    assert (built is None) == (got.num_pages == 0) == (max(bare, default=-1) < 0)
