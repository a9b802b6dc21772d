"""Causal grouped-query attention over a paged KV cache."""

from __future__ import annotations

import torch

from gateway.layers.forward_batch import ForwardBatch
from gateway.layers.linear import AdaptedLinear
from gateway.layers.norm import RMSNorm
from gateway.layers.rotary import rotate
from lora_kernels.attention import paged_attention
from lora_kernels.kv_store import store_kv


class Attention:
    """One layer's attention. `q_norm` and `k_norm` are Qwen3's norms over each head, None elsewhere.

    k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], this layer's pages.
    """

    def __init__(
        self,
        qkv: AdaptedLinear,
        o: AdaptedLinear,
        *,
        head_dim: int,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        sliding_window: int | None,
    ) -> None:
        self.qkv = qkv
        self.o = o
        self.head_dim = head_dim
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.sliding_window = sliding_window
        self.scale = head_dim**-0.5

    def __call__(
        self, x: torch.Tensor, batch: ForwardBatch, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> torch.Tensor:
        """x: [num_tokens, hidden] -> [num_tokens, hidden]."""
        num_tokens = x.shape[0]
        qkv = self.qkv(x, batch).view(num_tokens, -1, self.head_dim)
        num_heads, num_kv_heads = (width // self.head_dim for width in self.qkv.widths[:2])
        qk, v = qkv[:, :-num_kv_heads], qkv[:, -num_kv_heads:]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :num_heads]), self.k_norm(qk[:, num_heads:])), dim=1)
        qk = rotate(qk, batch.cos, batch.sin)
        q, k = qk[:, :num_heads], qk[:, num_heads:]
        store_kv(k, v, k_cache, v_cache, batch.slot_mapping)
        attended = paged_attention(q, k_cache, v_cache, batch.attention, self.scale, self.sliding_window)
        return self.o(attended.reshape(num_tokens, -1), batch)
