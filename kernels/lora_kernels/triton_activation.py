"""Triton kernel behind `lora_kernels.activation`; imported on the first use on a GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.launch import launch
from lora_kernels.triton_vectors import scale_and_shift
from lora_kernels.vectors import NO_VECTORS, SlotVectors

_BLOCK = 1024


@triton.jit
def _silu_mul_kernel(gate_up_ptr, slot_ptr, scale_ptr, bias_ptr, y_ptr, width, stride_gate_up, BLOCK: tl.constexpr):
    """y[row] = gate[row] / (1 + exp(-gate[row])) * up[row]; one program a (row, tile of columns)."""
    tiles = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    ok = column < width
    gate_place = gate_up_ptr + row * stride_gate_up + column
    gate = tl.load(gate_place, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(gate_place + width, mask=ok, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    y = scale_and_shift(y, slot_ptr, scale_ptr, bias_ptr, row, width, column, ok)
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=ok)


def silu_mul_triton(gate_up: Tensor, vectors: SlotVectors | None = None) -> Tensor:
    """`lora_kernels.activation.silu_mul`."""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((num_tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_tokens * triton.cdiv(width, _BLOCK),)
    launch(
        _silu_mul_kernel,
        grid,
        gate_up,
        *(vectors or NO_VECTORS),
        y,
        width,
        gate_up.stride(0),
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return y
