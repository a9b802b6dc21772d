"""Triton kernels behind `lora_kernels.attention`; imported on the first use on a GPU."""

import torch
from torch import Tensor

from lora_kernels.attention import AttentionMetadata
from lora_kernels.layer_cache import LayerCache
from lora_kernels.triton_decode import decode
from lora_kernels.triton_prefill import prefill


def paged_attention_triton(
    q: Tensor, cache: LayerCache, meta: AttentionMetadata, scale: float, sliding_window: int | None
) -> Tensor:
    """`lora_kernels.attention.paged_attention`: one launch for the decode rows, one for the longer sequences."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if meta.num_decodes:
        decode(q, cache, out, meta, scale, sliding_window)
    if meta.num_longer:
        prefill(q, cache, out, meta, scale, sliding_window)
    return out
