"""Adapter slots: paged pools of LoRA matrices on the serving device.

A page holds `PAGE_RANK` rank rows of every linear of every layer, so one page id is valid in all pools (the
unified paging of S-LoRA, arXiv 2311.03285, with the rank as the paged dimension). An adapter of rank r takes
ceil(r / 16).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch

from adapters_store.weights import AdapterWeights
from lora_kernels.segments import PAGE_RANK, AdapterPages

_LARGEST_FP16: Final = 65504.0
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


@dataclass(frozen=True)
class LoRALayout:
    """The groups of one layer (every layer has the same) and the number of layers."""

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
        columns = sum(len(group.linears) * group.in_features + group.out_total for group in self.groups)
        scales = sum(2 * len(group.linears) for group in self.groups) if dtype == torch.int8 else 0
        return self.num_layers * PAGE_RANK * (columns * dtype.itemsize + scales * torch.float32.itemsize)

    def check(self, weights: AdapterWeights, dtype: torch.dtype) -> None:
        """Raises ValueError when a matrix does not fit the layout, or B does not fit float16 where that is `dtype`."""
        shapes = {linear: (w, g.in_features) for g in self.groups for linear, w in _linears(g)}
        for (layer, linear), (a, b) in weights.tensors.items():
            if not 0 <= layer < self.num_layers or linear not in shapes:
                raise ValueError(f"the base has no {linear} in layer {layer}")
            out_features, in_features = shapes[linear]
            rank = a.shape[0]
            if rank > weights.rank or a.shape != (rank, in_features) or b.shape != (out_features, rank):
                raise ValueError(
                    f"{linear} of layer {layer} has A {tuple(a.shape)} and B {tuple(b.shape)}; the base needs"
                    f" [r, {in_features}] and [{out_features}, r] with r <= {weights.rank}"
                )
            # Kernels multiply B by the zeros of other rows too. A stored adapter fits bfloat16 (validator.py).
            if dtype == torch.float16 and b.abs().max() > _LARGEST_FP16:
                raise ValueError(f"B of {linear} in layer {layer} is infinite in float16, the engine's dtype")


@dataclass(frozen=True)
class PagePools:
    """The pages of one layer and group.

    a: [num_pages, slices, PAGE_RANK, in_features]. b: [num_pages, PAGE_RANK, out_total]. a_scales, b_scales: fp32
    [num_pages, slices, PAGE_RANK] where the pages are int8, else None; the largest entry of a rank's row of A, and of a
    rank of B in one linear, is 127 of its scales.
    """

    a: torch.Tensor
    b: torch.Tensor
    a_scales: torch.Tensor | None
    b_scales: torch.Tensor | None

    @classmethod
    def zeros(cls, group: LoRAGroup, num_pages: int, dtype: torch.dtype, device: torch.device | str) -> PagePools:
        """Pools of empty pages."""
        slices = len(group.linears)
        scales = [
            torch.zeros(num_pages, slices, PAGE_RANK, device=device) if dtype == torch.int8 else None for _ in range(2)
        ]
        return cls(
            torch.zeros(num_pages, slices, PAGE_RANK, group.in_features, dtype=dtype, device=device),
            torch.zeros(num_pages, PAGE_RANK, group.out_total, dtype=dtype, device=device),
            *scales,
        )


def num_pages_for(rank: int) -> int:
    """Pages that an adapter of this rank takes."""
    return -(-rank // PAGE_RANK)


class AdapterSlots:
    """Who holds which pages, and the pools themselves. One thread only.

    The pools of each layer and group are in `dtype` on `device`; int8 halves the bytes that the kernels read, at one
    scale a rank. Rows beyond an adapter's rank, and linears that it lacks, are zero.
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
        self._pools = {
            (layer, group.name): PagePools.zeros(group, num_pages, dtype, device)
            for layer in range(layout.num_layers)
            for group in layout.groups
        }
        self._dtype = dtype
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

    def load(self, slot: int, weights: AdapterWeights) -> None:
        """Copy an adapter into a free slot and fresh pages. The caller has made room.

        Raises ValueError, having changed nothing, when a matrix does not fit the layout or B does not fit float16.
        """
        self.layout.check(weights, self._dtype)
        num_pages = num_pages_for(weights.rank)
        assert slot in self._free_slots, f"slot {slot} is taken"
        assert num_pages <= self.num_free_pages, f"{num_pages} pages asked for, {self.num_free_pages} free"
        # The lowest ids, ascending: adapters loaded in turn lie in one run of pages, which the kernels like.
        pages = tuple(self._free_pages[:num_pages])
        for layer in range(self.layout.num_layers):
            for group in self.layout.groups:
                self._copy(layer, group, pages, weights)
        # Only now, so that a copy that raises leaves slots and pages as they were.
        del self._free_pages[:num_pages]
        self._free_slots.remove(slot)
        self._slot_pages[slot] = AdapterPages(weights.rank, pages)
        self._num_loads += 1
        self._generations[slot] = self._num_loads

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

    def _copy(self, layer: int, group: LoRAGroup, pages: tuple[int, ...], weights: AdapterWeights) -> None:
        rows = len(pages) * PAGE_RANK
        # Staged on the host with its zero tails, so that a page is one copy to the device.
        dtype = torch.float32 if self._dtype == torch.int8 else self._dtype
        a_rows = torch.zeros(len(group.linears), rows, group.in_features, dtype=dtype)
        b_rows = torch.zeros(rows, group.out_total, dtype=dtype)
        for index, linear in enumerate(group.linears):
            if (pair := weights.tensors.get((layer, linear))) is not None:
                a, b = pair
                a_rows[index, : a.shape[0]] = a
                b_rows[: b.shape[1], group.columns(linear)] = b.T
        pools = self._pools[layer, group.name]
        if pools.a_scales is not None and pools.b_scales is not None:
            a_rows, a_scales = _to_int8(a_rows)
            parts = [_to_int8(part) for part in b_rows.split_with_sizes(group.widths, 1)]
            b_rows = torch.cat([part for part, _ in parts], 1)
            b_scales = torch.stack([scales for _, scales in parts])
        for index, page in enumerate(pages):
            span = slice(index * PAGE_RANK, (index + 1) * PAGE_RANK)
            pools.a[page].copy_(a_rows[:, span])
            pools.b[page].copy_(b_rows[span])
            if pools.a_scales is not None and pools.b_scales is not None:
                pools.a_scales[page].copy_(a_scales[:, span])
                pools.b_scales[page].copy_(b_scales[:, span])


def _to_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [..., n] -> int8 [..., n] and fp32 scales [...], symmetric."""
    scales = rows.abs().amax(-1) / 127
    return torch.round(rows / scales.clamp_min(1e-30)[..., None]).to(torch.int8), scales


def _linears(group: LoRAGroup) -> Iterator[tuple[str, int]]:
    return zip(group.linears, group.widths, strict=True)
