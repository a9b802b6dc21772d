"""The device memory of adapters' pages and of the KV cache, where a page and blocks of the cache are the same bytes."""

from __future__ import annotations

import math
from itertools import chain
from typing import Final, NamedTuple

import torch
from torch import Tensor

from adapters_store.lora_layout import LoRALayout, PagePools
from gateway.engine.kv_cache import KVCache, half_bytes
from gateway.engine.memory_plan import MemoryPlan
from gateway.models.decoder import Decoder
from lora_kernels.layer_cache import LayerCache

_ALIGNMENT: Final = 256


class _PageArray(NamedTuple):
    """One of the arrays of a layer's pages: where it begins, and a page's part of it."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Arena:
    """One piece of memory a layer, blocks of the cache from end to end, the first of them in the place of all pages.

    Kernels find both as they find tensors of their own: the blocks are in one piece, and so is each array of the pages
    (`PagePools`). A block is two halves, keys and values, and its number counts halves: it is even. Every layer is laid
    out alike, so that a page lies over the same blocks in each.

    pools: of each group, [num_layers, num_pages, ...]. own_blocks: those that no page lies over.
    """

    def __init__(self, decoder: Decoder, plan: MemoryPlan, adapter_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        config, layout, num_pages = decoder.config, decoder.lora_layout, plan.num_adapter_pages
        half = half_bytes(config, plan.block_size, kv_dtype)
        groups, end = _page_arrays(layout, adapter_dtype, num_pages)
        under_pages = -(-end // (2 * half))
        scratch = 2 * (under_pages + plan.num_blocks)
        self.own_blocks = range(2 * under_pages, scratch, 2)
        memory = torch.zeros((layout.num_layers, (scratch + 2) * half), dtype=torch.uint8, device=decoder.device)
        self.pools = [PagePools(*(_view(memory, array, num_pages) for array in arrays)) for arrays in groups]
        layers = [
            LayerCache.interleaved(layer, plan.block_size, config.num_kv_heads, config.head_dim, kv_dtype)
            for layer in memory.unbind()
        ]
        self.cache = KVCache(layers, scratch_block=scratch)
        self._arrays = list(chain.from_iterable(groups))
        self._block_bytes = 2 * half

    def blocks_under(self, page: int) -> list[int]:
        """The blocks that a page lies over, wholly or in part."""
        blocks: set[int] = set()
        for array in self._arrays:
            first, size = array.start + page * array.page_bytes, self._block_bytes
            blocks.update(range(first // size * 2, -(-(first + array.page_bytes) // size) * 2, 2))
        return sorted(blocks)


def _page_arrays(layout: LoRALayout, dtype: torch.dtype, num_pages: int) -> tuple[list[list[_PageArray]], int]:
    """Each group's arrays, one behind the other, and where they end."""
    groups, end = [], 0
    for group in layout.groups:
        arrays = []
        for shape, kind in group.page_arrays(dtype):
            array = _PageArray(-(-end // _ALIGNMENT) * _ALIGNMENT, shape, kind)
            arrays.append(array)
            end = array.start + num_pages * array.page_bytes
        groups.append(arrays)
    return groups, end


def _view(memory: Tensor, array: _PageArray, num_pages: int) -> Tensor:
    """[num_layers, num_pages, ...] of memory [num_layers, bytes]."""
    part = memory[:, array.start : array.start + num_pages * array.page_bytes]
    return part.view(array.dtype).view(len(memory), num_pages, *array.shape)
