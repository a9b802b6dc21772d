"""Copies beside the device's own work: the bytes of the CPU's path, after what was launched before, without a wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from adapters_store.host_pages import HostPages
from adapters_store.lora_layout import LoRALayout
from adapters_store.page_image import PageImage, fill_pages
from adapters_store.slots import AdapterSlots

from .random_adapters import LAYOUT, SHAPES, make_image, random_weights

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
# 6 MB a page: a copy that takes a while.
LARGE = LoRALayout.from_linears({name: (64 * out, 64 * inner) for name, (out, inner) in SHAPES.items()}, 16)
LONG_KERNEL = 200_000_000  # clock ticks, a tenth of a second


def make_slots(device: str, dtype: torch.dtype, layout: LoRALayout = LAYOUT) -> AdapterSlots:
    return AdapterSlots(layout, num_slots=3, num_pages=5, dtype=dtype, device=device)


def all_arrays(slots: AdapterSlots) -> list[torch.Tensor]:
    layers, groups = range(slots.layout.num_layers), slots.layout.groups
    return [array for layer in layers for group in groups for array in slots.pools(layer, group.name).arrays]


def constant_image(memory: HostPages, value: int) -> PageImage:
    image = memory.take(PageImage(16, ()))
    assert image is not None
    image.pages[0].fill_(value)
    return image


@contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_are_bit_for_bit_those_of_the_cpu_s_path(dtype: torch.dtype, pinned: bool) -> None:
    memory = HostPages(8 * LAYOUT.page_bytes(dtype), LAYOUT.page_bytes(dtype), pinned=pinned)
    there, here = make_slots("cuda", dtype), make_slots("cpu", dtype)
    copies = []
    for seed, rank in enumerate([40, 4, 16, 17]):
        if seed == 3:
            there.close()
            for slots in (there, here):
                slots.free(0)
        weights = random_weights(rank, seed)
        image = memory.take(PageImage(rank, ()))
        assert image is not None
        fill_pages(image.pages, weights, LAYOUT, dtype)
        slot = there.next_free_slot
        assert slot is not None
        copies.append(there.load(slot, image))
        here.load(slot, make_image(weights, dtype))
    there.close()
    for array, wanted in zip(all_arrays(there), all_arrays(here), strict=True):
        assert torch.equal(array.cpu().view(torch.uint8), wanted.view(torch.uint8))


def test_steps_launched_before_read_what_lay_there_and_later_ones_the_copy() -> None:
    page_bytes = LARGE.page_bytes(torch.bfloat16)
    memory = HostPages(2 * page_bytes, page_bytes, pinned=True)
    slots = make_slots("cuda", torch.bfloat16, LARGE)
    old, new = (constant_image(memory, value) for value in (1, 2))
    slots.load(0, old)
    slots.close()
    slots.free(0)
    arrays = [array[0] for array in all_arrays(slots)]
    before = [torch.empty_like(array) for array in arrays]
    torch.cuda._sleep(LONG_KERNEL)
    for array, target in zip(arrays, before, strict=True):
        target.copy_(array)
    with no_waits():
        copy = slots.load(0, new)
        is_done_at_once = copy.is_done
    while not copy.is_done:
        pass
    after = [array.clone() for array in arrays]
    assert not is_done_at_once
    assert {value for array in before for value in array.view(torch.uint8).unique().tolist()} == {1}
    assert {value for array in after for value in array.view(torch.uint8).unique().tolist()} == {2}


def test_several_pages_and_adapters_share_the_staging_page_in_turn() -> None:
    page_bytes = LARGE.page_bytes(torch.bfloat16)
    memory = HostPages(5 * page_bytes, page_bytes, pinned=True)
    slots = make_slots("cuda", torch.bfloat16, LARGE)
    value, copies = 0, []
    with no_waits():
        for slot, rank in enumerate([32, 48]):
            image = memory.take(PageImage(rank, ()))
            assert image is not None
            for page in image.pages:
                value += 1
                page.fill_(value)
            copies.append(slots.load(slot, image))
    slots.close()
    assert all(copy.is_done for copy in copies)
    for array in all_arrays(slots):
        assert [page.view(torch.uint8).unique().tolist() for page in array] == [[1], [2], [3], [4], [5]]


def test_memory_is_unpinned_when_it_is_closed_and_may_be_pinned_again() -> None:
    memory = HostPages(1 << 20, 1 << 16, pinned=True)
    image = memory.take(PageImage(16, ()))
    assert image is not None
    assert image.pages[0].is_pinned()
    memory.close()
    assert not image.pages[0].is_pinned()
    memory.close()
