"""Causal grouped-query attention over a paged KV cache."""

from __future__ import annotations

import torch

from gateway.layers.forward_batch import ForwardBatch
from gateway.layers.linear import AdaptedLinear, RowParallelLinear
from gateway.layers.norm import RMSNorm
from lora_kernels.attention import paged_attention
from lora_kernels.invariant import invariant_attention
from lora_kernels.layer_cache import LayerCache
from lora_kernels.rotary import HeadNorm, rotary_store


class Attention:
    """One layer's attention. `q_norm` and `k_norm` are Qwen3's norms over each head, None elsewhere."""

    def __init__(
        self,
        qkv: AdaptedLinear,
        o: AdaptedLinear | RowParallelLinear,
        *,
        head_dim: int,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        sliding_window: int | None,
    ) -> None:
        self.qkv = qkv
        self.o = o
        self.head_norm = (
            HeadNorm(torch.stack((q_norm.weight, k_norm.weight)), q_norm.eps) if q_norm and k_norm else None
        )
        self.sliding_window = sliding_window
        self.scale = head_dim**-0.5

    def __call__(self, x: torch.Tensor, batch: ForwardBatch, cache: LayerCache) -> torch.Tensor:
        """x: [num_tokens, hidden] -> [num_tokens, hidden]. cache: this layer's pages."""
        qkv, layer = self.qkv(x, batch), self.qkv.layer
        vectors = batch.output_vectors(layer, "qkv")
        q = rotary_store(qkv, batch.cos, batch.sin, cache, batch.slot_mapping, self.head_norm, vectors)
        attend = invariant_attention if batch.invariant else paged_attention
        attended = attend(q, cache, batch.attention, self.scale, self.sliding_window)
        return batch.with_vectors(self.o(attended.reshape(len(x), -1), batch), layer, "o")
