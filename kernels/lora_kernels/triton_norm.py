"""Triton kernel behind `lora_kernels.norm`; imported on the first use on a GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.launch import launch
from lora_kernels.triton_vectors import scale_and_shift
from lora_kernels.vectors import NO_VECTORS, SlotVectors


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    slot_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    width,
    eps,
    stride_x,
    stride_delta,
    BLOCK: tl.constexpr,
):
    """x[row] += delta[row], y[row] = x[row] / sqrt(mean(x[row]^2) + eps) * weight; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    ok = column < width
    x = tl.load(x_ptr + row * stride_x + column, mask=ok, other=0.0)
    if scale_ptr is None:
        weight = tl.load(weight_ptr + column, mask=ok, other=0.0)
    else:
        weight = tl.load(weight_ptr + column, mask=ok & (tl.load(slot_ptr + row) < 0), other=1.0)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + row * stride_delta + column, mask=ok, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(x_ptr + row * stride_x + column, x, mask=ok)
    x = x.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps) * weight.to(tl.float32)
    y = scale_and_shift(y, slot_ptr, scale_ptr, bias_ptr, row, width, column, ok)
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=ok)


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None, tuned: SlotVectors | None = None
) -> Tensor:
    """`lora_kernels.norm.rms_norm`."""
    num_tokens, width = x.shape
    block = triton.next_power_of_2(width)
    y = torch.empty((num_tokens, width), dtype=x.dtype, device=x.device)
    launch(
        _rms_norm_kernel,
        (num_tokens,),
        x,
        delta,
        weight,
        *(tuned or NO_VECTORS),
        y,
        width,
        eps,
        x.stride(0),
        0 if delta is None else delta.stride(0),
        BLOCK=block,
        num_warps=max(1, min(4, block // 256)),
    )
    return y
