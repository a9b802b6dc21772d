"""Triton kernel behind `lora_kernels.rotary`; imported on the first use on a GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.launch import launch
from lora_kernels.layer_cache import FP8_MAX, SMALLEST_AMAX, LayerCache
from lora_kernels.rotary import NO_HEAD_NORM, HeadNorm
from lora_kernels.triton_vectors import scale_and_shift
from lora_kernels.vectors import NO_VECTORS, SlotVectors

_HEADS = 16
_FP8_MAX, _SMALLEST_AMAX = tl.constexpr(FP8_MAX), tl.constexpr(SMALLEST_AMAX)


@triton.jit
def _rotary_store_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    scales_ptr,
    place_ptr,
    weight_ptr,
    eps,
    slot_ptr,
    scale_ptr,
    bias_ptr,
    num_heads,
    num_kv_heads,
    head_dim,
    stride_qkv,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """(low, high) = (low cos - high sin, high cos + low sin), the halves of a head; one program a (token, HEADS heads).

    Heads of q are turned in place, those of k into the cache, where v's go as they are; into fp8 pages (those with
    scales) both over a scale of their own.
    """
    num_total = num_heads + 2 * num_kv_heads
    tiles = tl.cdiv(num_total, HEADS)
    token = (tl.program_id(0) // tiles).to(tl.int64)
    head = (tl.program_id(0) % tiles * HEADS + tl.arange(0, HEADS))[:, None]
    is_q = head < num_heads
    is_v = head >= num_heads + num_kv_heads
    half = head_dim // 2
    dim = tl.arange(0, HALF)[None, :]
    dim_ok = dim < half
    ok = (head < num_total) & dim_ok
    slot = tl.load(place_ptr + token)
    place = slot * num_kv_heads - num_heads
    row = qkv_ptr + token * stride_qkv + head * head_dim
    low = tl.load(row + dim, mask=ok, other=0.0).to(tl.float32)
    high = tl.load(row + half + dim, mask=ok, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * head_dim + dim, mask=dim_ok, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * head_dim + half + dim, mask=dim_ok, other=0.0).to(tl.float32)
    column = head * head_dim + dim
    low = scale_and_shift(low, slot_ptr, scale_ptr, bias_ptr, token, num_total * head_dim, column, ok)
    high = scale_and_shift(high, slot_ptr, scale_ptr, bias_ptr, token, num_total * head_dim, column + half, ok)
    if weight_ptr is not None:
        inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / head_dim + eps)[:, None]
        weight = weight_ptr + tl.where(is_q, 0, head_dim) + dim
        low_weight = tl.load(weight, mask=dim_ok, other=0.0).to(tl.float32)
        high_weight = tl.load(weight + half, mask=dim_ok, other=0.0).to(tl.float32)
        low = tl.where(is_v, low, low * inverse * low_weight)
        high = tl.where(is_v, high, high * inverse * high_weight)
    turned_low = tl.where(is_v, low, low * cos - high * sin)
    turned_high = tl.where(is_v, high, high * cos + low * sin)
    k_row = k_cache_ptr + (place + head) * head_dim
    v_row = v_cache_ptr + (place - num_kv_heads + head) * head_dim
    if scales_ptr is None:
        target = tl.where(is_q, row, tl.where(is_v, v_row, k_row))
        tl.store(target + dim, turned_low.to(qkv_ptr.dtype.element_ty), mask=ok)
        tl.store(target + half + dim, turned_high.to(qkv_ptr.dtype.element_ty), mask=ok)
    else:
        tl.store(row + dim, turned_low.to(qkv_ptr.dtype.element_ty), mask=ok & is_q)
        tl.store(row + half + dim, turned_high.to(qkv_ptr.dtype.element_ty), mask=ok & is_q)
        low, high, scale = _quantize(turned_low, turned_high)
        target = tl.where(is_v, v_row, k_row)
        tl.store(target + dim, low, mask=ok & ~is_q)
        tl.store(target + half + dim, high, mask=ok & ~is_q)
        kv_head = head - num_heads - tl.where(is_v, num_kv_heads, 0)
        scale_place = (slot // BLOCK_SIZE * num_kv_heads + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
        tl.store(scales_ptr + scale_place * 2 + is_v.to(tl.int32), scale, mask=(head < num_total) & ~is_q)


@triton.jit
def _quantize(low, high):
    """`layer_cache.quantize` of heads in halves, to the bit: fp8 halves, and scales [heads, 1]."""
    amax = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))[:, None]
    scale = tl.maximum(amax, _SMALLEST_AMAX) * (1 / _FP8_MAX)
    scale = ((scale.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(1.0, scale)
    return (low * inverse).to(tl.float8e4nv), (high * inverse).to(tl.float8e4nv), scale.to(tl.bfloat16)


def rotary_store_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: LayerCache,
    slot_mapping: Tensor,
    norm: HeadNorm | None = None,
    vectors: SlotVectors | None = None,
) -> Tensor:
    """`lora_kernels.rotary.rotary_store`."""
    num_tokens, (block_size, num_kv_heads, head_dim) = qkv.shape[0], cache.k.shape[1:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    launch(
        _rotary_store_kernel,
        (num_tokens * triton.cdiv(num_heads + 2 * num_kv_heads, _HEADS),),
        qkv,
        cos,
        sin,
        *cache,
        slot_mapping,
        *(norm or NO_HEAD_NORM),
        *(vectors or NO_VECTORS),
        num_heads,
        num_kv_heads,
        head_dim,
        qkv.stride(0),
        BLOCK_SIZE=block_size,
        HEADS=_HEADS,
        HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
    )
    return qkv.view(num_tokens, -1, head_dim)[:, :num_heads]
