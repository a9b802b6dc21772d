"""The Triton kernel behind `lora_kernels.nf4.unpack_nf4`; imported on the first use on a GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.launch import launch
from lora_kernels.nf4 import NF4_CODE


@triton.jit
def _unpack_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    out_ptr,
    num_blocks,
    stride_row,
    stride_block,
    stride_absmax_row,
    stride_absmax_block,
    BLOCKS: tl.constexpr,
):
    """out[row, block, 2 i], out[row, block, 2 i + 1] = scale[block] * code[high nibble of byte i], code[low nibble]."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    ok = (block < num_blocks)[:, None]
    byte_of = tl.arange(0, 32)[None, :]
    byte = tl.load(
        packed_ptr + row * stride_row + block.to(tl.int64)[:, None] * stride_block + byte_of, mask=ok, other=0
    )
    scale = tl.load(absmax_ptr + row * stride_absmax_row + block[:, None] * stride_absmax_block, mask=ok, other=0.0)
    index = byte.to(tl.int32)
    high, low = tl.load(code_ptr + (index >> 4)), tl.load(code_ptr + (index & 15))
    out = out_ptr + (row * num_blocks + block[:, None]) * 64 + tl.arange(0, 64)[None, :]
    tl.store(out, tl.interleave(high * scale, low * scale).to(out_ptr.dtype.element_ty), mask=ok)


def unpack_nf4_triton(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """`lora_kernels.nf4.unpack_nf4`, bit for bit."""
    out_features, num_blocks, _ = packed.shape
    out = torch.empty((out_features, num_blocks * 64), dtype=dtype, device=packed.device)
    blocks = min(32, triton.next_power_of_2(num_blocks))
    launch(
        _unpack_kernel,
        (out_features, triton.cdiv(num_blocks, blocks)),
        packed,
        absmax,
        _code(packed.device),
        out,
        num_blocks,
        *packed.stride()[:2],
        *absmax.stride(),
        BLOCKS=blocks,
    )
    return out


@cache
def _code(device: torch.device) -> Tensor:
    return NF4_CODE.to(device)
