"""Adapter slots: paged pools of LoRA matrices on the serving device.

A page holds `PAGE_RANK` rank rows of every linear of every layer, so one page id is valid in all pools (the
unified paging of S-LoRA, arXiv 2311.03285, with the rank as the paged dimension). An adapter of rank r takes
ceil(r / 16).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from adapters_store.page_copier import PageCopier, PageCopy
from lora_kernels.segments import PAGE_RANK, AdapterPages

if TYPE_CHECKING:
    from adapters_store.page_image import PageImage

GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""The linears that read one input, and so share one shrink and one expand."""


@dataclass(frozen=True)
class LoRAGroup:
    """Linears over the same input: their names, output widths, and the input's width."""

    name: str
    linears: tuple[str, ...]
    widths: tuple[int, ...]
    in_features: int

    @property
    def out_total(self) -> int:
        """Width of the group's outputs side by side."""
        return sum(self.widths)

    def columns(self, linear: str) -> slice:
        """Where one linear's outputs lie in the group's."""
        index = self.linears.index(linear)
        start = sum(self.widths[:index])
        return slice(start, start + self.widths[index])

    def page_arrays(self, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of a page's share of one layer: `PagePools`' arrays."""
        slices = len(self.linears)
        matrices = [((slices, PAGE_RANK, self.in_features), dtype), ((PAGE_RANK, self.out_total), dtype)]
        return matrices + [((slices, PAGE_RANK), torch.float32)] * (2 if dtype == torch.int8 else 0)


@dataclass(frozen=True)
class LoRALayout:
    """The groups of one layer (every layer has the same) and the number of layers.

    A page in memory is its groups one after the other, of each the arrays of `PagePools`, of each all layers.
    """

    num_layers: int
    groups: tuple[LoRAGroup, ...]

    @classmethod
    def from_linears(cls, linears: Mapping[str, tuple[int, int]], num_layers: int) -> LoRALayout:
        """Build from {linear: (out_features, in_features)}, as `BaseSpec.linears` gives them."""
        groups = []
        for name, members in GROUPS.items():
            inputs = {linears[linear][1] for linear in members}
            assert len(inputs) == 1, f"the linears of {name} read inputs of different widths: {inputs}"
            widths = tuple(linears[linear][0] for linear in members)
            groups.append(LoRAGroup(name, members, widths, inputs.pop()))
        return cls(num_layers, tuple(groups))

    def group(self, name: str) -> LoRAGroup:
        """The group called `name` ("qkv", "o", "gate_up" or "down")."""
        return next(group for group in self.groups if group.name == name)

    def page_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that one page takes over all layers and groups, with its scales where `dtype` is int8."""
        return sum(sum(self._array_bytes(group, dtype)) for group in self.groups)

    def split(self, page: Tensor, dtype: torch.dtype) -> list[PagePools]:
        """A page, uint8 [page_bytes], as its groups' arrays: views [num_layers, ...]."""
        parts = iter(page.split_with_sizes([size for group in self.groups for size in self._array_bytes(group, dtype)]))
        return [
            PagePools(*(next(parts).view(kind).view(self.num_layers, *shape) for shape, kind in arrays))
            for arrays in (group.page_arrays(dtype) for group in self.groups)
        ]

    def _array_bytes(self, group: LoRAGroup, dtype: torch.dtype) -> list[int]:
        return [self.num_layers * math.prod(shape) * kind.itemsize for shape, kind in group.page_arrays(dtype)]


@dataclass(frozen=True)
class PagePools:
    """Pages of one group: of one layer, [num_pages, ...]; or one page of all layers, [num_layers, ...]; or both.

    a: [..., slices, PAGE_RANK, in_features]. b: [..., PAGE_RANK, out_total]. a_scales, b_scales: fp32
    [..., slices, PAGE_RANK] where the pages are int8, else None; the largest entry of a rank's row of A, and of a
    rank of B in one linear, is 127 of its scales.
    """

    a: Tensor
    b: Tensor
    a_scales: Tensor | None = None
    b_scales: Tensor | None = None

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        """The tensors that there are."""
        return tuple(array for array in (self.a, self.b, self.a_scales, self.b_scales) if array is not None)


def num_pages_for(rank: int) -> int:
    """Pages that an adapter of this rank takes."""
    return -(-rank // PAGE_RANK)


class AdapterSlots:
    """Who holds which pages, and the pools themselves. One thread only.

    The pools of each layer and group are in `dtype` on `device`; int8 halves the bytes that the kernels read, at one
    scale a rank. Rows beyond an adapter's rank, and linears that it lacks, are zero. Bytes arrive beside what the
    device computes (`PageCopier`).
    """

    def __init__(
        self,
        layout: LoRALayout,
        num_slots: int,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self.num_pages = num_pages
        self.dtype = dtype
        # A page of all layers is one strided piece of each tensor, and so a few copies bring it.
        self._all_layers = [
            PagePools(
                *(
                    torch.zeros(layout.num_layers, num_pages, *shape, dtype=kind, device=device)
                    for shape, kind in group.page_arrays(dtype)
                )
            )
            for group in layout.groups
        ]
        self._pools = {
            (layer, group.name): PagePools(*(array[layer] for array in pools.arrays))
            for group, pools in zip(layout.groups, self._all_layers, strict=True)
            for layer in range(layout.num_layers)
        }
        self._copier = PageCopier(layout, dtype, self._all_layers)
        self._free_slots = list(reversed(range(num_slots)))
        self._free_pages = list(range(num_pages))  # ascending
        self._slot_pages: dict[int, AdapterPages] = {}
        self._generations = [0] * num_slots
        self._num_loads = 0

    @property
    def num_free_slots(self) -> int:
        """Slots that hold no adapter."""
        return len(self._free_slots)

    @property
    def num_free_pages(self) -> int:
        """Pages that belong to no slot."""
        return len(self._free_pages)

    @property
    def next_free_slot(self) -> int | None:
        """The slot to load into next; None when every slot is taken."""
        return self._free_slots[-1] if self._free_slots else None

    @property
    def slot_pages(self) -> Mapping[int, AdapterPages]:
        """A live, read-only view of slot -> pages, as `LoRASegments.build` takes it."""
        return MappingProxyType(self._slot_pages)

    def pages_of(self, slot: int) -> AdapterPages:
        """The pages of a loaded slot, in order of rank."""
        return self._slot_pages[slot]

    def generation(self, slot: int) -> int:
        """A number that no other load of any slot has had; zero before the slot's first load.

        What was cached about the slot is stale when it changes.
        """
        return self._generations[slot]

    def pools(self, layer: int, group: str) -> PagePools:
        """The pages of one layer and group."""
        return self._pools[layer, group]

    def load(self, slot: int, image: PageImage) -> PageCopy:
        """Start to copy an adapter into a free slot and fresh pages, for which the caller has made room.

        No step may use the slot, nor may it be freed, before the copy is done or the steps' stream waits for it; steps
        that were launched before may still read what lay in these pages.
        """
        num_pages = len(image.pages)
        assert slot in self._free_slots, f"slot {slot} is taken"
        assert num_pages <= self.num_free_pages, f"{num_pages} pages asked for, {self.num_free_pages} free"
        # The lowest ids, ascending: adapters loaded in turn lie in one run of pages, which the kernels like.
        pages = tuple(self._free_pages[:num_pages])
        copy = self._copier.start(image, pages)
        del self._free_pages[:num_pages]
        self._free_slots.remove(slot)
        self._slot_pages[slot] = AdapterPages(image.rank, pages)
        self._num_loads += 1
        self._generations[slot] = self._num_loads
        return copy

    def close(self) -> None:
        """Wait for the copies under way: the host's memory may go."""
        self._copier.wait()

    def free(self, slot: int) -> None:
        """Give a loaded slot and its pages back. The bytes stay until the next load overwrites them."""
        self._free_pages = sorted([*self._free_pages, *self._slot_pages.pop(slot).ids])
        self._free_slots.append(slot)

    def check_integrity(self) -> None:
        """Assert that every slot and every page is either free or used, exactly once."""
        pages = self._free_pages + [page for held in self._slot_pages.values() for page in held.ids]
        assert sorted(pages) == list(range(self.num_pages)), "pages are lost or held twice"
        assert sorted([*self._free_slots, *self._slot_pages]) == list(range(self.num_slots)), (
            "slots are lost or held twice"
        )
