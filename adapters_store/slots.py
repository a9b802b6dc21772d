"""Adapter slots: paged pools of LoRA matrices on the serving device.

A page holds `PAGE_RANK` rank rows of every linear of every layer, so one page id is valid in all pools (the
unified paging of S-LoRA, arXiv 2311.03285, with the rank as the paged dimension). An adapter of rank r takes
ceil(r / 16).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters_store.bottleneck_slots import BottleneckSlots
from adapters_store.lora_layout import LoRAGroup, LoRALayout, PagePools
from adapters_store.page_copier import PageCopier, PageCopy
from adapters_store.page_image import PageImage
from adapters_store.page_supply import PageSupply
from adapters_store.token_pool import TokenPool
from adapters_store.vector_slots import VectorSlots
from lora_kernels.segments import AdapterPages


class Room(NamedTuple):
    """Slots, pages of ranks, rows of vectors, pages of bottlenecks, a run of rows of tokens: free, held or needed."""

    slots: int
    pages: int
    rows: int
    bottleneck_pages: int
    token_rows: int

    @classmethod
    def needed(cls, image: PageImage) -> Self:
        """By an adapter that is to be loaded."""
        has_vectors = int(image.vectors is not None)
        return cls(1, image.num_pages, has_vectors, image.num_bottleneck_pages, image.num_token_rows)

    def plus(self, other: Room) -> Room:
        """Both; of token rows, which are no run together, none."""
        return Room(*map(operator.add, self, other))._replace(token_rows=0)

    def covers(self, needed: Room) -> bool:
        """Whether there is as much of each."""
        return all(map(operator.ge, self, needed))

    def helps(self, free: Room, needed: Room) -> bool:
        """Whether it has some of what is needed and not free."""
        return any(own and wanted > there for own, there, wanted in zip(self, free, needed, strict=True))


class Place(NamedTuple):
    """Where an adapter lies that other ranks put there too: its pages of ranks, and the first of its rows of tokens.

    Rows of vectors and pages of bottlenecks are each as good as any other, and every rank chooses its own: who holds
    no more than another rank has as many free. A run of rows may not fit where others lie otherwise.
    """

    pages: tuple[int, ...]
    token_row: int = -1


class AdapterSlots:
    """Who holds which pages, and the pools themselves. One thread only.

    The pools of each layer and group are in `dtype` on `device`; int8 halves the bytes that the kernels read, at one
    scale a rank. Rows beyond an adapter's rank, and linears that it lacks, are zero. Bytes arrive beside what the
    device computes (`PageCopier`). vectors, bottlenecks, tokens: for those adapters that have any; without it none can
    be loaded. pools: of each group, [num_layers, num_pages, ...]; by default in memory of their own.
    """

    def __init__(
        self,
        layout: LoRALayout,
        num_slots: int,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device | str,
        vectors: VectorSlots | None = None,
        bottlenecks: BottleneckSlots | None = None,
        tokens: TokenPool | None = None,
        pools: Sequence[PagePools] | None = None,
    ) -> None:
        self.layout = layout
        self.vectors = vectors
        self.bottlenecks = bottlenecks
        self.tokens = tokens
        self.num_slots = num_slots
        self.dtype = dtype
        self.pages = PageSupply(num_pages)
        # A page of all layers is one strided piece of each tensor, and so a few copies bring it.
        self._all_layers = pools if pools is not None else layout.new_pools(num_pages, dtype, device)
        self._pools = {
            (layer, group.name): PagePools(*(array[layer] for array in pools.arrays))
            for group, pools in zip(layout.groups, self._all_layers, strict=True)
            for layer in range(layout.num_layers)
        }
        self._copier = PageCopier(layout, dtype, self._all_layers, vectors, bottlenecks, tokens)
        self._free_slots = list(reversed(range(num_slots)))
        self._slot_pages: dict[int, AdapterPages] = {}
        self._virtual_tokens: dict[int, Tensor] = {}
        self._generations = [0] * num_slots
        self._num_loads = 0

    @property
    def num_free_slots(self) -> int:
        """Slots that hold no adapter."""
        return len(self._free_slots)

    @property
    def num_pages(self) -> int:
        """Pages of ranks, free or not."""
        return self.pages.num_pages

    @property
    def num_free_pages(self) -> int:
        """Pages that can be taken for another slot."""
        return self.pages.num_free

    def has_room(self, image: PageImage) -> bool:
        """Whether the adapter can be loaded now."""
        return self.would_have_room(image, ())

    def would_have_room(self, image: PageImage, given_back: Collection[int], more_pages: int = 0) -> bool:
        """Whether it could be if these slots were free, and so many pages more."""
        room = self.room(given_back)
        return room._replace(pages=room.pages + more_pages).covers(Room.needed(image))

    def recall_pages(self, image: PageImage, given_back: Collection[int]) -> bool:
        """Have pages that are lent emptied, where the adapter would lack some even if these slots were free.

        Returns as `PageSupply.recall`.
        """
        missing = image.num_pages - sum(len(self.pages_of(slot)) for slot in given_back)
        return missing > self.num_free_pages and self.pages.recall(missing)

    def lacks_for(self, image: PageImage, slot: int) -> bool:
        """Whether anything that there is no room for now would come free with this slot."""
        return self.held_room(slot).helps(self.room(), Room.needed(image))

    def room(self, given_back: Collection[int] = ()) -> Room:
        """What no adapter has, if these slots were free."""
        bottleneck_pages = self.bottlenecks.num_free if self.bottlenecks is not None else 0
        free = Room(self.num_free_slots, self.num_free_pages, self.num_free_rows, bottleneck_pages, 0)
        token_rows = self.tokens.longest_run(given_back) if self.tokens is not None else 0
        return functools.reduce(Room.plus, map(self.held_room, given_back), free)._replace(token_rows=token_rows)

    def held_room(self, slot: int) -> Room:
        """What the adapter in a slot has."""
        bottleneck_pages = self.bottlenecks.num_held(slot) if self.bottlenecks is not None else 0
        token_rows = self.tokens.num_held(slot) if self.tokens is not None else 0
        return Room(1, len(self.pages_of(slot)), int(self.vector_row(slot) >= 0), bottleneck_pages, token_rows)

    @property
    def num_bottleneck_pages(self) -> int:
        """Pages of bottlenecks, free or not."""
        return self.bottlenecks.num_pages if self.bottlenecks is not None else 0

    @property
    def num_free_rows(self) -> int:
        """Rows for vectors that no adapter has."""
        return self.vectors.num_free if self.vectors is not None else 0

    def vector_row(self, slot: int) -> int:
        """The row of the vectors of the adapter in a slot; -1 where it has none, and for the bare base."""
        return self.vectors.row(slot) if self.vectors is not None else -1

    def vector_rows(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.int32] | None:
        """`vector_row` of each; None where none has any."""
        if self.vectors is None or not self.vectors.num_held:
            return None
        used, places = np.unique(slots, return_inverse=True)
        rows = np.array([self.vectors.row(slot) for slot in used.tolist()], np.int32)
        return rows[places] if (rows >= 0).any() else None

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

    def place(self, slot: int) -> Place:
        """Where the adapter in a loaded slot lies."""
        return Place(self.pages_of(slot).ids, self.tokens.row(slot) if self.tokens is not None else -1)

    def virtual_tokens(self, slot: int) -> Tensor | None:
        """What comes before the prompts of a slot's adapter, in host memory, as `AdapterWeights`; mostly nothing.

        It is sent when a prompt needs it: the KV cache keeps what becomes of it.
        """
        return self._virtual_tokens.get(slot)

    def generation(self, slot: int) -> int:
        """A number that no other load of any slot has had; zero before the slot's first load.

        What was cached about the slot is stale when it changes.
        """
        return self._generations[slot]

    def pools(self, layer: int, group: str) -> PagePools:
        """The pages of one layer and group."""
        return self._pools[layer, group]

    def matrices(self, slot: int, group: LoRAGroup) -> tuple[Tensor, Tensor]:
        """A group's A [num_layers, slices, r, in] and B [num_layers, r, out_total] of a loaded slot, copied.

        r is 16 ranks a page, of which there are some; in the pools' dtype, or fp32 where that is int8.
        """
        pools = self._all_layers[self.layout.groups.index(group)]
        # Not by an index on the device, which the host would have to send.
        pages = [[array[:, page] for page in self.pages_of(slot).ids] for array in pools.arrays]
        a, b, *scales = (torch.stack(array, dim=1) for array in pages)
        if scales:
            a_scales, b_scales = scales  # [num_layers, num_pages, slices, PAGE_RANK]
            columns = [b_scales[:, :, i, :, None].expand(-1, -1, -1, width) for i, width in enumerate(group.widths)]
            a, b = a * a_scales[..., None], b * torch.cat(columns, dim=-1)
        return a.transpose(1, 2).flatten(2, 3), b.flatten(1, 2)

    def load(self, slot: int, image: PageImage, place: Place | None = None) -> PageCopy:
        """Start to copy an adapter into a free slot and fresh pages, for which the caller has made room.

        place: where, all of it free; None leaves the choice to the supplies.
        No step may use the slot, nor may it be freed, before the copy is done or the steps' stream waits for it; steps
        that were launched before may still read what lay in these pages.
        """
        assert slot in self._free_slots, f"slot {slot} is taken"
        assert self.has_room(image), f"{Room.needed(image)} asked for, {self.room()} free"
        if place is None:
            pages = self.pages.take(image.num_pages)
        else:
            pages = place.pages
            self.pages.take_these(pages)
        row = -1
        if image.vectors is not None and self.vectors is not None:
            row = self.vectors.take(slot, image.raw)
        bottleneck_pages: tuple[int, ...] = ()
        if image.bottleneck is not None and self.bottlenecks is not None:
            bottleneck_pages = self.bottlenecks.take(slot, image.bottleneck)
        token_row = -1
        if image.token_tables and self.tokens is not None:
            token_row = self.tokens.take(slot, image.token_tables, place.token_row if place is not None else None)
        copy = self._copier.start(image, pages or bottleneck_pages, row, token_row)
        self._free_slots.remove(slot)
        self._slot_pages[slot] = AdapterPages(image.rank, pages)
        if image.virtual_tokens is not None:
            self._virtual_tokens[slot] = image.virtual_tokens
        self._num_loads += 1
        self._generations[slot] = self._num_loads
        return copy

    def close(self) -> None:
        """Wait for the copies under way: the host's memory may go."""
        self._copier.wait()

    def free(self, slot: int) -> None:
        """Give a loaded slot, its pages and its row back. The bytes stay until the next load overwrites them."""
        self.pages.give_back(tuple(self._slot_pages.pop(slot).ids))
        self._virtual_tokens.pop(slot, None)
        if self.vectors is not None:
            self.vectors.free(slot)
        if self.bottlenecks is not None:
            self.bottlenecks.free(slot)
        if self.tokens is not None:
            self.tokens.free(slot)
        self._free_slots.append(slot)

    def check_integrity(self) -> None:
        """Assert that every slot and every page is either free or used, exactly once."""
        self.pages.check_integrity([page for held in self._slot_pages.values() for page in held.ids])
        assert self._virtual_tokens.keys() <= self._slot_pages.keys(), "a free slot holds virtual tokens"
        assert sorted([*self._free_slots, *self._slot_pages]) == list(range(self.num_slots)), (
            "slots are lost or held twice"
        )
        if self.vectors is not None:
            self.vectors.check_integrity()
        if self.bottlenecks is not None:
            self.bottlenecks.check_integrity()
        if self.tokens is not None:
            self.tokens.check_integrity()
