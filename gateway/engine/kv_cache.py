"""The tensors of the paged KV cache."""

from __future__ import annotations

import torch

from gateway.models.config import DecoderConfig
from gateway.models.decoder import LayerCache


class KVCache:
    """Keys and values of every layer: per layer two tensors [num_blocks + 1, block_size, num_kv_heads, head_dim]."""

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        # The last block belongs to no sequence: rows that only pad a batch write there.
        shape = (num_blocks + 1, block_size, config.num_kv_heads, config.head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.scratch_slot = num_blocks * block_size
        # Zeros, not garbage: a page's unwritten tail is read by vectorised attention before it is masked.
        self.layers: tuple[LayerCache, ...] = tuple(
            (torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
            for _ in range(config.num_layers)
        )

    def copy_blocks(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy blocks into others, in every layer: one gather and one scatter for each tensor, in stream order.

        sources, targets: int64 [num_copies], on the cache's device; no target is twice in `targets`.
        """
        for layer in self.layers:
            for tensor in layer:
                tensor[targets] = tensor[sources]
