"""The device tensors of one engine step, passed down to every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from adapters_store.slots import AdapterSlots
from lora_kernels.attention import AttentionMetadata
from lora_kernels.segments import LoRASegments


class VirtualRows(NamedTuple):
    """Virtual tokens of a step: which rows they are, int64 [n], and their input embeddings, [n, hidden]."""

    rows: torch.Tensor
    embeddings: torch.Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """The tokens of one step, decode rows first, then the prefill chunks; sequences lie back to back.

    input_ids, positions, slot_mapping: int64 [num_tokens]; slot_mapping is where a token's key and value go
    (block * block_size + offset). last_rows: int64 [num_sampled], the rows whose logits are wanted, or None for all.
    cos, sin: [num_tokens, 1, head_dim]. segments is None when no row's adapter has pages. invariant: a row's bits
    are to depend on nothing but its sequence (`lora_kernels.invariant`). virtual: the rows whose input is not the
    embedding of their id, if there are any.
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
