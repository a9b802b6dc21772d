"""What the attention kernels share: the running softmax, and how a cache is addressed."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)
# Parts of one transfer: how a step's sizes align them must not decide which variant of a kernel is compiled.
PACKED = ("context_len_ptr", "prefix_len_ptr", "query_start_ptr")


@triton.jit
def soften(score, v, peak, total, acc, scale):
    """The running softmax of FlashAttention (arXiv 2205.14135): takes in one more tile of scores and values.

    peak is that of the unscaled scores, so that scaling is one multiply-add with the shift. scale: times log2 e.
    """
    new_peak = tl.maximum(peak, tl.max(score, 1))
    # A row that has seen no key yet keeps a peak of -inf; 0 in its place keeps the exponentials at 0, not NaN.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) * scale
    weight = tl.exp2(score * scale - base[:, None])
    shrink = tl.exp2(peak * scale - base)
    total = total * shrink + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_peak, total, acc


def is_wide(q: Tensor) -> bool:
    """Whether a key is so many bytes that the usual tiles would not fit."""
    return q.dtype == torch.float32 or q.shape[-1] > 128


def cache_offset(cache: Tensor) -> tl.dtype:
    """What counts a cache's elements; 32 bits save 3 % of a prefill, 1 % of a decode step."""
    return tl.int32 if cache.numel() < 2**31 else tl.int64
