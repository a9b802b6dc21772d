"""The tensors of the paged KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Self

import torch

from gateway.config import EngineConfig
from gateway.errors import ConfigInvalid
from gateway.models.config import DecoderConfig
from lora_kernels.layer_cache import FP8, LayerCache

_FP8_CAPABILITY: Final = (8, 9)  # of the first cards that convert e4m3


class KVCache:
    """Keys and values of every layer.

    scratch_block: belongs to no sequence; rows that only pad a batch write there.
    """

    def __init__(self, layers: Sequence[LayerCache], scratch_block: int) -> None:
        self.layers = tuple(layers)
        self.block_size = layers[0].k.shape[1]
        self.scratch_slot = scratch_block * self.block_size

    @classmethod
    def zeros(
        cls, config: DecoderConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> Self:
        """Blocks that are numbered from 0 on, in memory of their own."""
        shape = block_size, config.num_kv_heads, config.head_dim
        layers = [
            LayerCache.zeros(num_blocks + 1, *shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]
        return cls(layers, scratch_block=num_blocks)

    def copy_blocks(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy blocks into others, in every layer: one gather and one scatter for each tensor, in stream order.

        sources, targets: int64 [num_copies], on the cache's device; no target is twice in `targets`.
        """
        for layer in self.layers:
            for tensor in layer.tensors:
                blocks = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor  # CUDA copies no fp8 by an index
                blocks.index_copy_(0, targets, blocks.index_select(0, sources))


def cache_dtype(config: EngineConfig, compute: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of keys and values. Raises `ConfigInvalid` where the card, or what else is asked for, has no fp8."""
    if config.kv_cache_dtype == "auto":
        return compute
    if config.batch_invariant:
        raise ConfigInvalid(
            'engine.batch_invariant has no attention over fp8 pages; set engine.kv_cache_dtype to "auto".',
            param="engine.kv_cache_dtype",
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        raise ConfigInvalid(
            f"{torch.cuda.get_device_name(device)} has no fp8 (Ada, Hopper and later cards have it); "
            'set engine.kv_cache_dtype to "auto".',
            param="engine.kv_cache_dtype",
        )
    return FP8


def half_bytes(config: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of a block's keys, or of its values, in one layer."""
    return block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def block_bytes(config: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block in all layers, with the scales that fp8 has beside it."""
    memory = torch.empty(2 * half_bytes(config, block_size, dtype), dtype=torch.uint8, device="meta")
    block = LayerCache.interleaved(memory, block_size, config.num_kv_heads, config.head_dim, dtype)
    return config.num_layers * (memory.nbytes + (block.scales.nbytes if block.scales is not None else 0))
