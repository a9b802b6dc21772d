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
from lora_kernels.layer_cache import LayerCache


@dataclass(frozen=True)
class DecoderLayer:
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    input_norm: RMSNorm
    attention: Attention
    post_norm: RMSNorm
    mlp: GatedMLP

    def __call__(
        self, x: torch.Tensor, delta: torch.Tensor | None, batch: ForwardBatch, cache: LayerCache
    ) -> torch.Tensor:
        """Adds the layer before's `delta` and its own attention to x in place, and returns what else is to be added.

        x, delta: [num_tokens, hidden]. Each addition is the next norm's: one launch for the two.
        """
        attended = self.attention(self.input_norm(x, delta), batch, cache)
        return self.mlp(self.post_norm(x, attended), batch)


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
        """The dtype of activations."""
        return self.embed_tokens.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.device

    def __call__(self, batch: ForwardBatch, caches: Sequence[LayerCache]) -> torch.Tensor:
        """The logits of `batch.last_rows` in the decoder's dtype: [num_sampled, vocab]."""
        x, delta = F.embedding(batch.input_ids, self.embed_tokens), None
        for layer, cache in zip(self.layers, caches, strict=True):
            delta = layer(x, delta, batch, cache)
        if delta is not None and batch.last_rows is not None:
            x, delta = x[batch.last_rows], delta[batch.last_rows]
        return self.lm_head(self.norm(x, delta), batch.invariant)
