"""How bottleneck adapters lie in memory: pages of 16 units of one site, over all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from adapters_store.lora_layout import num_pages_for
from adapters_store.manifest import BOTTLENECK_SITES, BottleneckActivation, BottleneckReads, BottleneckSite
from adapters_store.weights import BottleneckTensors, BottleneckWeights
from lora_kernels.segments import PAGE_RANK

_LARGEST_FP16: Final = 65504.0


@dataclass(frozen=True)
class BottleneckShape:
    """What an adapter computes beside its numbers, and its largest width between the two linears at each site.

    Its pages are those of its sites, one site after the other.
    """

    reads: BottleneckReads
    activation: BottleneckActivation
    sizes: Mapping[BottleneckSite, int]

    @classmethod
    def of(cls, weights: BottleneckWeights) -> BottleneckShape:
        """The shape of these."""
        sizes = {
            site: max(len(tensors.down) for (_, own), tensors in weights.tensors.items() if own == site)
            for site in BOTTLENECK_SITES
            if any(own == site for _, own in weights.tensors)
        }
        return cls(weights.reads, weights.activation, sizes)

    @property
    def num_pages(self) -> int:
        """Of all sites."""
        return sum(map(num_pages_for, self.sizes.values()))


@dataclass(frozen=True)
class BottleneckPools:
    """Pages of one layer, [num_pages, ...]; or one page of all layers, [num_layers, ...]; or both.

    down [..., 1, PAGE_RANK, hidden] and up [..., PAGE_RANK, hidden] as the kernels of LoRA take A and B; down_bias fp32
    [..., 1, PAGE_RANK]; up_bias fp32 [..., hidden], of a site's first page, zeros in the others.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor
    up_bias: Tensor

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.down, self.up, self.down_bias, self.up_bias


@dataclass(frozen=True)
class BottleneckLayout:
    """The pages of a base of this width and number of layers, matrices in `dtype`."""

    num_layers: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def page_arrays(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of a page's share of one layer: `BottleneckPools`' arrays."""
        matrix, hidden = (PAGE_RANK, self.hidden_size), (self.hidden_size,)
        return [
            ((1, *matrix), self.dtype),
            (matrix, self.dtype),
            ((1, PAGE_RANK), torch.float32),
            (hidden, torch.float32),
        ]

    @property
    def page_bytes(self) -> int:
        """Bytes that one page takes over all layers: 8.9 MB at Llama-3.1-8B's shape in bf16."""
        return sum(self._array_bytes)

    def split(self, page: Tensor) -> BottleneckPools:
        """A page, uint8 [page_bytes], as its arrays: views [num_layers, ...]."""
        parts = zip(page.split_with_sizes(self._array_bytes), self.page_arrays, strict=True)
        return BottleneckPools(*(part.view(kind).view(self.num_layers, *shape) for part, (shape, kind) in parts))

    def check(self, weights: BottleneckWeights) -> None:
        """Raises ValueError when an adapter does not fit the base, or float16 pages."""
        hidden = self.hidden_size
        for (layer, site), (down, down_bias, up, up_bias) in weights.tensors.items():
            size = len(down_bias)
            shapes = down.shape, up.shape, up_bias.shape
            if not 0 <= layer < self.num_layers or shapes != ((size, hidden), (hidden, size), (hidden,)):
                raise ValueError(f"the base has no place for the bottleneck at the {site} of layer {layer}: {shapes}")
            if self.dtype == torch.float16 and max(up.abs().max(), up_bias.abs().max()) > _LARGEST_FP16:
                raise ValueError(f"the bottleneck at the {site} of layer {layer} is infinite in float16")

    def fill(self, pages: tuple[Tensor, ...], weights: BottleneckWeights) -> None:
        """Write a checked adapter into the pages of its shape, uint8 [page_bytes] each, whatever they held before."""
        arrays, first = [self.split(page.zero_()) for page in pages], 0
        for site, size in BottleneckShape.of(weights).sizes.items():
            own = arrays[first : first + num_pages_for(size)]
            first += len(own)
            for (layer, where), tensors in weights.tensors.items():
                if where == site:
                    _fill_layer(own, layer, tensors)

    @property
    def _array_bytes(self) -> list[int]:
        return [self.num_layers * math.prod(shape) * kind.itemsize for shape, kind in self.page_arrays]


def _fill_layer(pages: list[BottleneckPools], layer: int, tensors: BottleneckTensors) -> None:
    """The units that this layer has, of the pages' site."""
    pages[0].up_bias[layer] = tensors.up_bias
    for index in range(num_pages_for(len(tensors.down))):
        units = slice(index * PAGE_RANK, (index + 1) * PAGE_RANK)
        page, down = pages[index], tensors.down[units]
        page.down[layer, 0, : len(down)] = down
        page.up[layer, : len(down)] = tensors.up[:, units].T
        page.down_bias[layer, 0, : len(down)] = tensors.down_bias[units]
