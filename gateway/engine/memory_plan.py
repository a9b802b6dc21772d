"""How much of its device's memory an engine gives to adapters and the KV cache, once the base is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

import torch

from adapters_store.lora_layout import num_pages_for
from gateway.config import EngineConfig
from gateway.engine.host_blocks import least_fetch
from gateway.engine.host_tier import STAGING_BYTES
from gateway.engine.kv_cache import block_bytes, cache_dtype, half_bytes
from gateway.errors import ConfigInvalid
from gateway.models.config import DecoderConfig
from gateway.models.decoder import Decoder
from gateway.models.loader import resolve_adapter_dtype

_CPU_TOKENS: Final = 65_536
# For activations, the logits of a full batch, recorded graphs and the allocator's own waste.
_RESERVED_BYTES: Final = 4 << 30
# At 8B in bf16 32,768 tokens, many times what is preempted at once; pinned memory is lost to all else on the machine.
_HOST_BYTES: Final = 4 << 30
_ADAPTERS_SHARE: Final = 2  # adapters take half of what is free at most, unless a number of pages is asked for


@dataclass(frozen=True)
class MemoryPlan:
    """Pages of adapters, blocks of the KV cache beside them, the bytes of one of each, and a block's tokens.

    page_bytes: with the scales of blocks that take a page's place. num_host_blocks: of the cache's second tier;
    least_fetch: the fewest that are fetched from there.
    """

    num_adapter_pages: int
    page_bytes: int
    num_blocks: int
    block_bytes: int
    block_size: int
    num_host_blocks: int = 0
    least_fetch: int = 1

    @classmethod
    def measure(cls, engine: EngineConfig, decoder: Decoder) -> Self:
        """The plan for what is free on the device now. Raises `ConfigInvalid` when what is asked for does not fit."""
        config, device = decoder.config, decoder.device
        adapter_dtype = resolve_adapter_dtype(engine, decoder.dtype)
        kv_dtype = cache_dtype(engine, decoder.dtype, device)
        per_block = block_bytes(config, engine.block_size, kv_dtype)
        bare_block = 2 * config.num_layers * half_bytes(config, engine.block_size, kv_dtype)
        page_bytes = decoder.lora_layout.page_bytes(adapter_dtype) * per_block // bare_block
        least = least_fetch(per_block, _operations(config) * engine.block_size, device.type)
        num_host_blocks = _host_bytes(engine, device) // per_block if least is not None else 0
        usable = None
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            usable = free - _RESERVED_BYTES - int(total * (1 - engine.gpu_memory_utilization))
            # Adapters come in through a page of their own, and blocks through staging.
            usable -= decoder.lora_layout.page_bytes(adapter_dtype) + (2 * STAGING_BYTES if num_host_blocks else 0)
            usable -= _vector_bytes(engine, decoder)
            usable -= engine.num_usable_bottleneck_pages * decoder.bottleneck_layout.page_bytes
            usable -= engine.num_usable_token_rows * config.hidden_size * decoder.dtype.itemsize
        plan = cls.of(engine, page_bytes, per_block, usable)
        return replace(plan, num_host_blocks=num_host_blocks, least_fetch=least or 1)

    @classmethod
    def of(cls, engine: EngineConfig, page_bytes: int, block_bytes: int, free_bytes: int | None) -> Self:
        """What is configured as it is; of the rest, adapters what all slots may need, half at most; the cache all.

        free_bytes: what they share; None where it is not measured (on the CPU). Raises `ConfigInvalid` when they are
        more than that, or leave no room for an adapter of the highest rank or for a block.
        """
        largest = num_pages_for(engine.max_lora_rank)
        pages = engine.num_adapter_pages or engine.num_adapter_slots * largest
        if engine.num_adapter_pages is None and free_bytes is not None:
            pages = min(pages, max(free_bytes // _ADAPTERS_SHARE // page_bytes, largest))
        if engine.kv_cache_tokens is not None:
            blocks = max(1, engine.kv_cache_tokens // engine.block_size)
        elif free_bytes is None:
            blocks = _CPU_TOKENS // engine.block_size
        else:
            blocks = max(1, (free_bytes - pages * page_bytes) // block_bytes)
        plan = cls(pages, page_bytes, blocks, block_bytes, engine.block_size)
        if free_bytes is not None and plan.adapter_bytes + plan.cache_bytes > free_bytes:
            raise ConfigInvalid(
                f"The device has {_gib(free_bytes)} left beside the base; {plan} need more. Lower num_adapter_pages, "
                "num_adapter_slots, num_vector_slots, num_bottleneck_pages, num_token_rows, max_lora_rank or "
                "kv_cache_tokens, or raise gpu_memory_utilization.",
                param="engine",
            )
        return plan

    @classmethod
    def smallest(cls, plans: Sequence[Self]) -> Self:
        """What fits on every rank; pages and blocks are as large on each, and the second tiers alike."""
        pages, blocks = min(p.num_adapter_pages for p in plans), min(p.num_blocks for p in plans)
        return replace(plans[0], num_adapter_pages=pages, num_blocks=blocks)

    @property
    def adapter_bytes(self) -> int:
        """Of all pages."""
        return self.num_adapter_pages * self.page_bytes

    @property
    def cache_bytes(self) -> int:
        """Of all blocks."""
        return self.num_blocks * self.block_bytes

    @property
    def host_bytes(self) -> int:
        """Of all blocks of the second tier."""
        return self.num_host_blocks * self.block_bytes

    def __str__(self) -> str:
        """One line for an operator."""
        line = (
            f"{self.num_adapter_pages} adapter pages of 16 ranks ({_gib(self.adapter_bytes)}) and a KV cache of "
            f"{self.num_blocks * self.block_size:,} tokens ({_gib(self.cache_bytes)})"
        )
        if self.num_host_blocks:
            line += f", with {self.num_host_blocks * self.block_size:,} more in host memory ({_gib(self.host_bytes)})"
        return line


def _host_bytes(engine: EngineConfig, device: torch.device) -> int:
    """A rank's part of the second tier."""
    if not engine.enable_prefix_caching:
        return 0
    default = _HOST_BYTES if device.type == "cuda" else 0
    whole = engine.kv_host_bytes if engine.kv_host_bytes is not None else default
    return whole // engine.tensor_parallel_size


def _vector_bytes(engine: EngineConfig, decoder: Decoder) -> int:
    """Of all rows for adapters' vectors, and of the one that they come in through."""
    rows = engine.num_vector_rows
    return (rows + 1) * decoder.vector_layout.row_bytes if rows else 0


def _operations(config: DecoderConfig) -> int:
    """Of one token's linears; attention's, which grow with the context, are left out."""
    return 2 * config.num_layers * sum(rows * columns for rows, columns in config.linears.values())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
