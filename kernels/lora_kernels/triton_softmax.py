"""What the attention kernels share: the running softmax, and how a cache is addressed."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.layer_cache import LayerCache
from lora_kernels.triton_fp8 import split_pairs, split_scales

LOG2_E = math.log2(math.e)
# Parts of one transfer: how a step's sizes align them must not decide which variant of a kernel is compiled.
PACKED = ("context_len_ptr", "prefix_len_ptr", "query_start_ptr")


@triton.jit
def score_keys(q, q_odd, power, k, scales):
    """q K^T; over fp8 pages times the powers that `split_queries` took out, and the keys' scales."""
    if scales is None:
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        k_scale, _ = split_scales(scales)
        even, odd = split_pairs(k)
        score = tl.dot(q, tl.trans(even.to(q.dtype)), input_precision="ieee")
        score = tl.dot(q_odd, tl.trans(odd.to(q.dtype)), score, input_precision="ieee")
        score = score * power[:, None] * k_scale[None, :]
    return score


@triton.jit
def soften(score, v, scales, peak, total, acc, acc_odd, scale, dtype: tl.constexpr):
    """The running softmax of FlashAttention (arXiv 2205.14135): takes in one more tile of scores and values.

    peak is that of the unscaled scores, so that scaling is one multiply-add with the shift. scale: times log2 e.
    Over fp8 pages: `_soften_fp8`.
    """
    if scales is None:
        new_peak = tl.maximum(peak, tl.max(score, 1))
        # A row that has seen no key yet keeps a peak of -inf; 0 in its place keeps the exponentials at 0, not NaN.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak) * scale
        weight = tl.exp2(score * scale - base[:, None])
        shrink = tl.exp2(peak * scale - base)
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(dtype), v, acc * shrink[:, None], input_precision="ieee")
    else:
        new_peak, total, acc, acc_odd = _soften_fp8(score, v, scales, peak, total, acc, acc_odd, dtype)
    return new_peak, total, acc, acc_odd


@triton.jit
def _soften_fp8(score, v, scales, peak, total, acc, acc_odd, dtype: tl.constexpr):
    """The same of scaled scores and fp8 values; acc, acc_odd: of the even and of the odd elements.

    fp16 must hold a weight, 2^(score - peak) v_scale, whatever the values' size: the peak is that of score + log2
    v_scale, rounded down, so that the heaviest weight is below 2, and of one key alone exact.
    """
    _, v_scale = split_scales(scales)
    exponent = (v_scale.to(tl.int32, bitcast=True) >> 23) - 127
    new_peak = tl.maximum(peak, tl.max(score + exponent.to(tl.float32)[None, :], 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = tl.exp2(score - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weight, 1)
    weight = (weight * v_scale[None, :]).to(dtype)
    even, odd = split_pairs(v)
    acc = tl.dot(weight, even.to(dtype), acc * shrink[:, None], input_precision="ieee")
    acc_odd = tl.dot(weight, odd.to(dtype), acc_odd * shrink[:, None], input_precision="ieee")
    return new_peak, total, acc, acc_odd


def is_wide(q: Tensor) -> bool:
    """Whether a key is so many bytes that the usual tiles would not fit."""
    return q.dtype == torch.float32 or q.shape[-1] > 128


def tile_width(cache: LayerCache) -> int:
    """head_dim up to a power of two, and to the 16 numbers of a page (of fp8 pairs) that the matrix unit wants."""
    width: int = triton.next_power_of_2(cache.k.shape[-1])
    return max(16 if cache.scales is None else 32, width)


def cache_offset(cache: Tensor) -> tl.dtype:
    """What counts a cache's elements; 32 bits save 3 % of a prefill, 1 % of a decode step."""
    return tl.int32 if cache.numel() < 2**31 else tl.int64
