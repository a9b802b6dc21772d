"""The decoder: one definition for the Llama, Mistral, Qwen2 and Qwen3 families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from adapters_store.bottleneck_layout import BottleneckLayout
from adapters_store.lora_layout import LoRALayout
from adapters_store.vector_layout import VectorLayout
from gateway.layers.attention import Attention
from gateway.layers.forward_batch import ForwardBatch, OwnTokens
from gateway.layers.linear import AdaptedLinear, DenseLinear, RowParallelLinear, dense_matmul
from gateway.layers.mlp import GatedMLP
from gateway.layers.norm import RMSNorm
from gateway.layers.tensor_parallel import TensorParallel
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
        layer = self.attention.qkv.layer
        attended = self.attention(self.input_norm(x, delta, batch.tuned_norm(layer, "input_layernorm")), batch, cache)
        attended = batch.with_bottlenecks(attended, x, layer, "attention")
        fed = self.mlp(self.post_norm(x, attended, batch.tuned_norm(layer, "post_attention_layernorm")), batch)
        return batch.with_bottlenecks(fed, x, layer, "output")


@dataclass(frozen=True)
class Decoder:
    """Token ids in, logits out.

    ranks: who else has a part of it, if anybody: `config` and the linears are then this rank's share, lm_head its rows
    of the vocabulary, zeros behind the last. Embeddings are whole: a step reads but its tokens' rows, and a split
    table would add an exchange to every step.
    """

    config: DecoderConfig
    embed_tokens: torch.Tensor  # [vocab, hidden]
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    lm_head: DenseLinear
    ranks: TensorParallel | None = None

    def abridged(self) -> Decoder:
        """With one layer of each kind, which runs the same kernels."""
        return replace(self, layers=tuple({layer.attention.sliding_window: layer for layer in self.layers}.values()))

    def linears(self, group: str) -> list[AdaptedLinear]:
        """This rank's part of a group ("qkv", "o", "gate_up" or "down") in every layer."""
        linears = [getattr(layer.attention if group in ("qkv", "o") else layer.mlp, group) for layer in self.layers]
        return [linear.part if isinstance(linear, RowParallelLinear) else linear for linear in linears]

    @property
    def lora_layout(self) -> LoRALayout:
        """What of an adapter goes with these linears."""
        return LoRALayout.from_linears(self.config.linears, self.config.num_layers)

    @property
    def vector_layout(self) -> VectorLayout:
        """What of an adapter's vectors goes with these linears and norms."""
        norms = {
            "input_layernorm": torch.stack([layer.input_norm.weight for layer in self.layers]),
            "post_attention_layernorm": torch.stack([layer.post_norm.weight for layer in self.layers]),
            "norm": self.norm.weight[None],
        }
        return VectorLayout(self.lora_layout, {name: weight.float().cpu() for name, weight in norms.items()})

    @property
    def bottleneck_layout(self) -> BottleneckLayout:
        """How bottleneck adapters lie in memory, which are whole on every rank, as the residual stream is."""
        return BottleneckLayout(self.config.num_layers, self.embed_tokens.shape[1], self.dtype)

    @property
    def num_logits(self) -> int:
        """Logits of each row on this rank: the whole vocabulary's on the first, none on others."""
        return self.config.vocab_size if self.ranks is None or self.ranks.shard.rank == 0 else 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.embed_tokens.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.device

    def __call__(self, batch: ForwardBatch, caches: Sequence[LayerCache]) -> torch.Tensor:
        """The logits of `batch.last_rows` in the decoder's dtype: [num_sampled, num_logits]."""
        x, delta = self._embed(batch), None
        for layer, cache in zip(self.layers, caches, strict=True):
            delta = layer(x, delta, batch, cache)
        tuned = batch.tuned_norm(0, "norm")
        if delta is not None and batch.last_rows is not None:
            x, delta = x[batch.last_rows], delta[batch.last_rows]
            tuned = tuned and tuned._replace(token_slots=tuned.token_slots[batch.last_rows])
        hidden = self.norm(x, delta, tuned)
        logits = self.lm_head(hidden, batch.invariant)
        if self.ranks is not None:
            logits = self.ranks.gather(logits)[:, : self.config.vocab_size]
        if batch.own_tokens is not None and self.num_logits:
            self._add_own_logits(logits, hidden, batch, batch.own_tokens)
        return logits

    def _embed(self, batch: ForwardBatch) -> torch.Tensor:
        """What the layers read: [num_tokens, hidden]."""
        x = F.embedding(batch.input_ids, self.embed_tokens)
        if batch.own_tokens is not None and batch.adapters.tokens is not None:
            batch.adapters.tokens.embed(x, batch.input_ids, batch.own_tokens.token_slots)
        if batch.virtual is not None:
            x.index_copy_(0, *batch.virtual)
        return x

    def _add_own_logits(self, logits: torch.Tensor, hidden: torch.Tensor, batch: ForwardBatch, own: OwnTokens) -> None:
        """Overwrite the logits of tokens for which a row's adapter has a row of lm_head, an adapter after the other."""
        assert batch.adapters.tokens is not None
        for slot, sampled in own.heads:
            head = batch.adapters.tokens.head(slot)
            assert head is not None
            theirs = dense_matmul(hidden[sampled], head.rows, None, batch.invariant)
            if len(head.ids) == logits.shape[1]:
                logits.index_copy_(0, sampled, theirs)
            else:
                logits[sampled.unsqueeze(1), head.ids] = theirs
