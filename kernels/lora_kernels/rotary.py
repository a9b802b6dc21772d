"""Queries and keys turned to their positions (arXiv 2104.09864), and keys and values written into the paged cache."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.layer_cache import LayerCache
from lora_kernels.vectors import SlotVectors, scale_and_shift


class HeadNorm(NamedTuple):
    """Qwen3's RMS norms over each head: weight [2, head_dim], the queries' and the keys', contiguous."""

    weight: Tensor
    eps: float


NO_HEAD_NORM = (None, 0.0)


def rotary_store_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: LayerCache,
    slot_mapping: Tensor,
    norm: HeadNorm | None = None,
    vectors: SlotVectors | None = None,
) -> Tensor:
    """`rotary_store` in plain PyTorch; leaves `qkv` as it is."""
    num_kv_heads, head_dim = cache.k.shape[2:]
    if vectors is not None:
        qkv = scale_and_shift(qkv.float(), vectors).to(qkv.dtype)
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    qk, v = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    if norm is not None:
        parts = zip((qk[:, :-num_kv_heads], qk[:, -num_kv_heads:]), norm.weight, strict=True)
        qk = torch.cat([F.rms_norm(part, (head_dim,), weight, norm.eps) for part, weight in parts], dim=1)
    qk = qk * cos + qk.roll(head_dim // 2, dims=-1) * sin
    cache.store(slot_mapping, qk[:, -num_kv_heads:], v)
    return qk[:, :-num_kv_heads]


def rotary_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: LayerCache,
    slot_mapping: Tensor,
    norm: HeadNorm | None = None,
    vectors: SlotVectors | None = None,
) -> Tensor:
    """Rotates queries and keys, writes row i's key and value to cache position slot_mapping[i], returns the queries.

    qkv: [num_tokens, (num_heads + 2 num_kv_heads) * head_dim] fp32, bf16 or fp16, rows contiguous: queries, keys,
    values. Each row's own `vectors` come first (IA3, DoRA, biases: of qkv's width), then `norm`, then the rotation
    x * cos + swap(x) * sin of a head's halves, all in fp32 and rounded once.
    cos, sin: [num_tokens, 1, head_dim], sin with the rotated half's sign: -sin, then sin.
    cache: pages in qkv's dtype, or in fp8 (a scale of its own for each key and value: `layer_cache.quantize`).
    slot_mapping: int64 [num_tokens], block * block_size + offset, all different but for padding rows.
    Returns [num_tokens, num_heads, head_dim]: on a GPU the rotated queries overwrite qkv's. Triton on a GPU,
    `rotary_store_ref` elsewhere.
    """
    if qkv.is_cuda:
        from lora_kernels.triton_rotary import rotary_store_triton

        return rotary_store_triton(qkv, cos, sin, cache, slot_mapping, norm, vectors)
    return rotary_store_ref(qkv, cos, sin, cache, slot_mapping, norm, vectors)
