"""Rows of vectors on the device: copied with the pages, given back with the slot."""

from __future__ import annotations

import torch

from adapters_store.page_image import PageImage
from adapters_store.slots import AdapterSlots
from adapters_store.vector_slots import VectorSlots
from adapters_store.weights import AdapterWeights

from .random_adapters import LAYOUT, VECTORS, make_image, random_weights

MAGNITUDE = frozenset({"magnitude"})


def image(seed: int, rank: int = 0, raw: frozenset[str] = frozenset()) -> PageImage:
    row = torch.empty(VECTORS.size)
    vectors = {(1, "k_proj", "out_scale"): torch.full((6,), float(seed))}
    VECTORS.fill(row, AdapterWeights(0, {}, vectors))
    pages = make_image(random_weights(rank, seed)).pages if rank else ()
    return PageImage(rank, pages, row, raw)


def slots(num_rows: int = 2) -> AdapterSlots:
    return AdapterSlots(LAYOUT, 3, 4, torch.float32, "cpu", VectorSlots(VECTORS, num_rows, "cpu"))


def test_a_row_is_copied_to_every_layer_of_its_adapter_and_to_no_other() -> None:
    held = slots()
    assert held.vectors is not None
    for slot in (0, 1):
        held.load(slot, image(seed=5 + slot, rank=4 * slot))
    rows = torch.tensor([held.vector_row(0), held.vector_row(1), -1], dtype=torch.int32)
    vectors = held.vectors.outputs(1, "qkv", rows)
    assert vectors.scale is not None
    assert [vectors.scale[row, 10:16].unique().tolist() for row in rows[:2]] == [[5.0], [6.0]]
    scale_before = held.vectors.outputs(0, "qkv", rows).scale
    assert scale_before is not None
    assert scale_before.unique().tolist() == [1.0]
    held.check_integrity()


def test_room_is_a_slot_pages_and_a_row() -> None:
    held = slots(num_rows=1)
    held.load(0, image(0))
    assert not held.has_room(image(1))
    assert held.has_room(make_image(random_weights(4, 0)))
    held.free(0)
    assert held.has_room(image(1))
    held.check_integrity()


def test_what_is_raw_is_so_until_it_is_resolved_or_freed() -> None:
    held = slots()
    assert held.vectors is not None
    held.load(0, image(0, raw=MAGNITUDE))
    held.load(1, image(1))
    assert held.vectors.raw == {0: MAGNITUDE}
    held.free(0)
    assert held.vectors.raw == {}
    held.check_integrity()


def test_matrices_are_those_of_the_adapter_in_whole_pages() -> None:
    held = slots()
    weights = random_weights(20, 3)
    held.load(0, make_image(random_weights(4, 1)))
    held.load(2, make_image(weights))
    for group in LAYOUT.groups:
        a, b = held.matrices(2, group)
        assert a.shape == (2, len(group.linears), 32, group.in_features)
        for index, linear in enumerate(group.linears):
            for layer in range(2):
                wanted_a, wanted_b = weights.tensors[layer, linear]
                assert torch.equal(a[layer, index, :20], wanted_a)
                assert torch.equal(b[layer, :20, group.columns(linear)], wanted_b.T)
                assert not a[layer, index, 20:].any()
