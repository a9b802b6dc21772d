"""How adapters lie in memory: the linears that share an input, and a page of 16 ranks of all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lora_kernels.segments import PAGE_RANK

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

    def new_pools(self, num_pages: int, dtype: torch.dtype, device: torch.device | str) -> list[PagePools]:
        """Of each group, in new memory: zeros, [num_layers, num_pages, ...]."""
        return [
            PagePools(
                *(
                    torch.zeros(self.num_layers, num_pages, *shape, dtype=kind, device=device)
                    for shape, kind in group.page_arrays(dtype)
                )
            )
            for group in self.groups
        ]

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
