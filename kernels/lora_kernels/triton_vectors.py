"""Triton kernels behind `lora_kernels.vectors`; imported on the first use on a GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.launch import launch
from lora_kernels.vectors import SlotVectors

_BLOCK = 2048


@triton.jit
def scale_and_shift(y, slot_ptr, scale_ptr, bias_ptr, row, width, column, ok):
    """y * scale[slot[row], column] + bias[slot[row], column]; nothing is read, and y stays, where the slot is -1."""
    if slot_ptr is not None:
        slot = tl.load(slot_ptr + row).to(tl.int64)
        own = ok & (slot >= 0)
        if scale_ptr is not None:
            y *= tl.load(scale_ptr + slot * width + column, mask=own, other=1.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + slot * width + column, mask=own, other=0.0).to(tl.float32)
    return y


@triton.jit
def _apply_vectors_kernel(y_ptr, slot_ptr, scale_ptr, bias_ptr, width, stride_y, BLOCK: tl.constexpr):
    """y[row] = y[row] * scale[slot] + bias[slot]; one program a (row, tile of columns)."""
    tiles = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    ok = (column < width) & (tl.load(slot_ptr + row) >= 0)
    place = y_ptr + row * stride_y + column
    y = tl.load(place, mask=ok, other=0.0).to(tl.float32)
    y = scale_and_shift(y, slot_ptr, scale_ptr, bias_ptr, row, width, column, ok)
    tl.store(place, y.to(y_ptr.dtype.element_ty), mask=ok)


def apply_vectors_triton(y: Tensor, vectors: SlotVectors) -> None:
    """`lora_kernels.vectors.apply_vectors`."""
    num_tokens, width = y.shape
    grid = (num_tokens * triton.cdiv(width, _BLOCK),)
    launch(_apply_vectors_kernel, grid, y, *vectors, width, y.stride(0), BLOCK=_BLOCK, num_warps=4)
