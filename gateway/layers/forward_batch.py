"""The device tensors of one engine step, passed down to every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from adapters_store.manifest import BottleneckSite
from adapters_store.slots import AdapterSlots
from gateway.layers.bottleneck import BottleneckRows
from lora_kernels.attention import AttentionMetadata
from lora_kernels.segments import LoRASegments
from lora_kernels.vectors import SlotVectors, apply_vectors


class VirtualRows(NamedTuple):
    """Virtual tokens of a step: which rows they are, int64 [n], and their input embeddings, [n, hidden]."""

    rows: torch.Tensor
    embeddings: torch.Tensor


class OwnTokens(NamedTuple):
    """Who in a step has rows of embed_tokens and lm_head (`AdapterSlots.tokens`).

    token_slots: int64 [num_tokens], each token's adapter slot, -1 for the bare base. heads: slots with rows of lm_head,
    and which of the sampled rows are theirs, int64 [n].
    """

    token_slots: torch.Tensor
    heads: tuple[tuple[int, torch.Tensor], ...]


@dataclass(frozen=True)
class ForwardBatch:
    """The tokens of one step, decode rows first, then the prefill chunks; padding, if any, lies between the two.

    input_ids, positions, slot_mapping: int64 [num_tokens]; slot_mapping is where a token's key and value go
    (block * block_size + offset). last_rows: int64 [num_sampled], the rows whose logits are wanted, or None for all.
    cos, sin: [num_tokens, 1, head_dim]. segments is None when no row has a low-rank delta. invariant: a row's bits are
    to depend on nothing but its sequence (`lora_kernels.invariant`). virtual: the rows whose input is not the embedding
    of their id, if there are any. vector_rows: int32 [num_tokens], where in `adapters.vectors` each token's are, -1 for
    none; None when no token has any. own_tokens: None when no token's adapter has rows of its own for tokens.
    bottlenecks: the rows that have bottleneck adapters. split_rows: int64 [n], ascending, those whose adapters change
    what gate or up reads; None where there are none.
    """

    input_ids: torch.Tensor
    slot_mapping: torch.Tensor
    attention: AttentionMetadata
    cos: torch.Tensor
    sin: torch.Tensor
    last_rows: torch.Tensor | None
    adapters: AdapterSlots
    segments: LoRASegments | None
    invariant: bool
    virtual: VirtualRows | None = None
    vector_rows: torch.Tensor | None = None
    own_tokens: OwnTokens | None = None
    bottlenecks: tuple[BottleneckRows, ...] = ()
    split_rows: torch.Tensor | None = None

    def output_vectors(self, layer: int, group: str) -> SlotVectors | None:
        """What scales and shifts the outputs of a group of linears."""
        vectors = self.adapters.vectors
        return vectors.outputs(layer, group, self.vector_rows) if vectors and self.vector_rows is not None else None

    def input_vectors(self, layer: int) -> SlotVectors | None:
        """What scales the inputs of down_proj."""
        vectors = self.adapters.vectors
        return vectors.inputs(layer, self.vector_rows) if vectors and self.vector_rows is not None else None

    def tuned_norm(self, layer: int, norm: str) -> SlotVectors | None:
        """What stands for a norm's weight."""
        vectors = self.adapters.vectors
        return vectors.norm(layer, norm, self.vector_rows) if vectors and self.vector_rows is not None else None

    def with_vectors(self, y: torch.Tensor, layer: int, group: str) -> torch.Tensor:
        """y, a group's outputs, each row scaled and shifted in place by its own adapter's vectors."""
        if (vectors := self.output_vectors(layer, group)) is not None:
            apply_vectors(y, vectors)
        return y

    def with_bottlenecks(
        self, block: torch.Tensor, stream: torch.Tensor, layer: int, site: BottleneckSite
    ) -> torch.Tensor:
        """block, what the residual stream will be added, with what rows' own adapters make of the two, in place."""
        for rows in self.bottlenecks:
            if rows.site == site:
                assert self.adapters.bottlenecks is not None
                rows.add(stream, block, self.adapters.bottlenecks.pools(layer))
        return block

    def inputs_of(self, site: Literal["gate", "up"], x: torch.Tensor, layer: int) -> torch.Tensor:
        """What gate or up reads of x, which both read where no row's own adapter comes between; x stays as it is."""
        has_own = any(rows.site == site for rows in self.bottlenecks)
        return self.with_bottlenecks(x.clone(), x, layer, site) if has_own else x
