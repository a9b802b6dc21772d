"""The tensors of the paged KV cache."""

from __future__ import annotations

import torch

from gateway.config import EngineConfig
from gateway.models.config import DecoderConfig
from gateway.models.decoder import LayerCache

_CPU_TOKENS = 65_536
# Left free on the GPU for activations, the logits of a full batch and the allocator's own waste.
_RESERVED_BYTES = 4 << 30


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


def num_cache_blocks(engine: EngineConfig, config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> int:
    """How many blocks to make: as configured, else what the GPU's free memory allows, else 65,536 tokens' worth."""
    if engine.kv_cache_tokens is not None:
        return max(1, engine.kv_cache_tokens // engine.block_size)
    if device.type != "cuda":
        return _CPU_TOKENS // engine.block_size
    free, total = torch.cuda.mem_get_info(device)
    usable = free - _RESERVED_BYTES - int(total * (1 - engine.gpu_memory_utilization))
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
    return max(1, usable // (token_bytes * engine.block_size))
