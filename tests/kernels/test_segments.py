from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_kernels.segments import FIELDS, PAGE_RANK, AdapterPages, LoRASegments, Routing, fixed_size, order_capacity

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
    table = buffer[order_capacity(9) :].reshape(-1, FIELDS)[: 1 + len(routing.table) - 1]
    assert _routed(table.tolist(), buffer.tolist()) == _expected(slots, PAGES)


def test_a_step_without_adapters_has_no_segments() -> None:
    assert LoRASegments.build(np.array([-1, -1], dtype=np.int32), PAGES, "cpu") is None


def test_an_unknown_slot_is_an_error() -> None:
    with pytest.raises(KeyError):
        LoRASegments.build(np.array([7], dtype=np.int32), PAGES, "cpu")
