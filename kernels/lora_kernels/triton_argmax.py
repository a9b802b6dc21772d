"""Triton kernel behind `lora_kernels.argmax`; imported on the first use on a GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.launch import launch

_BLOCK = 8192
_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _argmax_kernel(logits_ptr, highest_ptr, index_ptr, width, stride, BLOCK: tl.constexpr):
    """highest[row] = max(logits[row]), index[row] = the first place where it is; one program a row.

    Each lane keeps the best of its own columns, whose first is the first of equals there.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.where(lane < width, lane, _NOWHERE)
    for first in tl.range(0, width, BLOCK, num_stages=4):
        column = first + lane
        x = tl.load(logits_ptr + row * stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
        # A NaN is not less than or equal to anything.
        is_better = (best == best) & ((x > best) | (x != x))
        best = tl.where(is_better, x, best)
        place = tl.where(is_better, column, place)
    is_nan = best != best
    has_nan = tl.max(is_nan.to(tl.int32), 0) > 0
    highest = tl.max(tl.where(is_nan, float("-inf"), best), 0)
    is_highest = tl.where(has_nan, is_nan, best == highest)
    tl.store(highest_ptr + row, tl.where(has_nan, float("nan"), highest))
    tl.store(index_ptr + row, tl.min(tl.where(is_highest, place, _NOWHERE), 0).to(tl.int64))


def row_argmax_triton(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`lora_kernels.argmax.row_argmax`."""
    num_rows, width = logits.shape
    assert logits.stride(1) == 1, "rows of logits are contiguous"
    highest = torch.empty(num_rows, device=logits.device)
    index = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    block = min(_BLOCK, triton.next_power_of_2(width))
    launch(_argmax_kernel, (num_rows,), logits, highest, index, width, logits.stride(0), BLOCK=block, num_warps=16)
    return highest, index
