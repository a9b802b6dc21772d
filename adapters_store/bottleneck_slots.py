"""Pages of bottleneck adapters on the serving device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from adapters_store.bottleneck_layout import BottleneckLayout, BottleneckPools, BottleneckShape
from adapters_store.lora_layout import num_pages_for
from adapters_store.manifest import BottleneckActivation, BottleneckReads, BottleneckSite
from lora_kernels.segments import AdapterPages


class BottleneckGroup(NamedTuple):
    """Adapters that are computed alike at one site, and the pages of each by its slot."""

    site: BottleneckSite
    reads: BottleneckReads
    activation: BottleneckActivation
    slot_pages: Mapping[int, AdapterPages]


class BottleneckSlots:
    """Who holds which pages, and the pools themselves. One thread only. `all_layers`: [num_layers, num_pages, ...]."""

    def __init__(self, layout: BottleneckLayout, num_pages: int, device: torch.device | str) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.all_layers = BottleneckPools(
            *(
                torch.zeros(layout.num_layers, num_pages, *shape, dtype=kind, device=device)
                for shape, kind in layout.page_arrays
            )
        )
        self._free = list(range(num_pages))  # ascending
        self._held: dict[int, tuple[BottleneckShape, tuple[int, ...]]] = {}  # by adapter slot

    @property
    def num_free(self) -> int:
        """Pages that no adapter has."""
        return len(self._free)

    def num_held(self, slot: int) -> int:
        """Pages of the adapter in a slot."""
        return len(self._held[slot][1]) if slot in self._held else 0

    def pools(self, layer: int) -> BottleneckPools:
        """The pages of one layer."""
        return BottleneckPools(*(array[layer] for array in self.all_layers.arrays))

    def take(self, slot: int, shape: BottleneckShape) -> tuple[int, ...]:
        """Give free pages to the adapter in a slot: the lowest, ascending."""
        pages = tuple(self._free[: shape.num_pages])
        del self._free[: shape.num_pages]
        self._held[slot] = shape, pages
        return pages

    def free(self, slot: int) -> None:
        """Give back the pages of the adapter in a slot, if it has any."""
        if slot in self._held:
            self._free = sorted([*self._free, *self._held.pop(slot)[1]])

    def has_any(self, token_slots: npt.NDArray[np.int32]) -> bool:
        """Whether one of these slots holds a bottleneck adapter."""
        return bool(self._held) and bool(np.isin(token_slots, list(self._held)).any())

    def groups(self, token_slots: npt.NDArray[np.int32]) -> list[BottleneckGroup]:
        """The adapters of a step's tokens, put together where they are computed alike."""
        groups: dict[tuple[BottleneckSite, BottleneckReads, BottleneckActivation], dict[int, AdapterPages]] = {}
        for slot in np.unique(token_slots).tolist():
            for site, pages in self._pages_by_site(slot):
                shape = self._held[slot][0]
                groups.setdefault((site, shape.reads, shape.activation), {})[slot] = pages
        return [BottleneckGroup(*alike, slot_pages) for alike, slot_pages in groups.items()]

    def check_integrity(self) -> None:
        """Assert that every page is either free or held, exactly once."""
        held = [page for _, pages in self._held.values() for page in pages]
        assert sorted([*self._free, *held]) == list(range(self.num_pages)), "bottleneck pages are lost or held twice"

    def _pages_by_site(self, slot: int) -> Iterator[tuple[BottleneckSite, AdapterPages]]:
        if slot not in self._held:
            return
        shape, pages = self._held[slot]
        for site, size in shape.sizes.items():
            own, pages = pages[: num_pages_for(size)], pages[num_pages_for(size) :]
            yield site, AdapterPages(size, own)
