"""The decoder: one definition for the Llama, Mistral, Qwen2 and Qwen3 families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gateway.layers.attention import Attention
from gateway.layers.forward_batch import ForwardBatch
from gateway.layers.linear import DenseLinear
from gateway.layers.mlp import GatedMLP
from gateway.layers.norm import RMSNorm
from gateway.models.config import DecoderConfig

# One layer's pages: keys and values, each [num_blocks, block_size, num_kv_heads, head_dim].
LayerCache = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class DecoderLayer:
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    input_norm: RMSNorm
    attention: Attention
    post_norm: RMSNorm
    mlp: GatedMLP

    def __call__(self, x: torch.Tensor, batch: ForwardBatch, cache: LayerCache) -> torch.Tensor:
        """x: [num_tokens, hidden] -> [num_tokens, hidden]."""
        x = x + self.attention(self.input_norm(x), batch, *cache)
        return x + self.mlp(self.post_norm(x), batch)


@dataclass(frozen=True)
class Decoder:
    """Token ids in, logits out."""

    config: DecoderConfig
    embed_tokens: torch.Tensor  # [vocab, hidden]
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    lm_head: DenseLinear

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and of the KV cache."""
        return self.embed_tokens.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.device

    def __call__(self, batch: ForwardBatch, caches: Sequence[LayerCache]) -> torch.Tensor:
        """The fp32 logits of `batch.last_rows`: [num_sampled, vocab]."""
        x = F.embedding(batch.input_ids, self.embed_tokens)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, batch, cache)
        wanted = x if batch.last_rows is None else x[batch.last_rows]
        return self.lm_head(self.norm(wanted)).float()
