"""The tensors of the paged KV cache."""

from __future__ import annotations

import torch

from gateway.models.config import DecoderConfig
from lora_kernels.layer_cache import LayerCache


class KVCache:
    """Keys and values of every layer: pages of num_blocks + 1 blocks each."""

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # The last block belongs to no sequence: rows that only pad a batch write there.
        self.scratch_slot = num_blocks * block_size
        # Zeros, not garbage: a page's unwritten tail is read by vectorised attention before it is masked.
        self.layers: tuple[LayerCache, ...] = tuple(
            LayerCache.zeros(
                num_blocks + 1, block_size, config.num_kv_heads, config.head_dim, dtype=dtype, device=device
            )
            for _ in range(config.num_layers)
        )
