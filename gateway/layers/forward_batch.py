"""The device tensors of one engine step, passed down to every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapters_store.slots import AdapterSlots
from lora_kernels.attention import AttentionMetadata
from lora_kernels.segments import LoRASegments


@dataclass(frozen=True)
class ForwardBatch:
    """The tokens of one step, decode rows first, then the prefill chunks; padding, if any, lies between the two.

    input_ids, positions, slot_mapping: int64 [num_tokens]; slot_mapping is where a token's key and value go
    (block * block_size + offset). last_rows: int64 [num_sampled], the rows whose logits are wanted, or None for all.
    cos, sin: [num_tokens, 1, head_dim]. segments is None when no row has an adapter. invariant: a row's bits are to
    depend on nothing but its sequence (`lora_kernels.invariant`).
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
