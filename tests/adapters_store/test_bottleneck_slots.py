"""Pages of bottlenecks on the device: copied, found by their slots, and given back with these."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from adapters_store.bottleneck_slots import BottleneckSlots
from adapters_store.slots import AdapterSlots
from lora_kernels.segments import AdapterPages

from .random_adapters import BOTTLENECKS, LAYOUT, bottleneck_image, make_image, random_bottlenecks, random_weights


def slots(num_pages: int = 6) -> AdapterSlots:
    bottlenecks = BottleneckSlots(BOTTLENECKS, num_pages, "cpu")
    return AdapterSlots(LAYOUT, 3, 4, torch.float32, "cpu", bottlenecks=bottlenecks)


def test_pages_are_copied_to_every_layer() -> None:
    held = slots()
    assert held.bottlenecks is not None
    held.load(0, make_image(random_weights(4, 0)))
    weights = random_bottlenecks({"attention": 5, "output": 20})
    held.load(1, bottleneck_image(weights))
    (attention, output) = held.bottlenecks.groups(np.array([1, 0, -1, 1], np.int32))
    assert (attention.slot_pages, output.slot_pages) == ({1: AdapterPages(5, (0,))}, {1: AdapterPages(20, (1, 2))})
    for layer in (0, 1):
        pools = held.bottlenecks.pools(layer)
        assert torch.equal(pools.down[0, 0, :5], weights.tensors[layer, "attention"].down)
        assert torch.equal(pools.up[[1, 2]].flatten(0, 1)[:20], weights.tensors[layer, "output"].up.T)
        assert torch.equal(pools.up_bias[1], weights.tensors[layer, "output"].up_bias)
    assert held.slot_pages[1].ids == ()
    held.check_integrity()


def test_adapters_are_put_together_where_they_are_computed_alike() -> None:
    held = slots()
    assert held.bottlenecks is not None
    for slot, changes in enumerate(({}, {"reads": "block"}, {})):
        held.load(slot, bottleneck_image(replace(random_bottlenecks({"output": 3}), **changes)))
    groups = held.bottlenecks.groups(np.array([0, 1, 2], np.int32))
    assert [(group.reads, list(group.slot_pages)) for group in groups] == [("sum", [0, 2]), ("block", [1])]
    assert held.bottlenecks.has_any(np.array([-1, 2], np.int32))
    assert not held.bottlenecks.has_any(np.array([-1, -1], np.int32))


def test_room_is_a_slot_and_pages_which_come_back_with_it() -> None:
    held = slots(num_pages=3)
    held.load(0, bottleneck_image(random_bottlenecks({"output": 20})))
    small, large = (bottleneck_image(random_bottlenecks({"output": size})) for size in (16, 17))
    assert held.has_room(small)
    assert not held.has_room(large)
    assert held.has_room(make_image(random_weights(60, 0)))
    held.free(0)
    assert held.has_room(large)
    assert held.room().bottleneck_pages == 3
    held.check_integrity()
