"""Triton kernels behind `lora_kernels.nf4`; imported on the first use on a GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.nf4 import NF4_CODE

# Beyond this many rows unpacking to a buffer and a dense product is faster. On one H200, the four fused linears of an
# 8B layer: 214 us fused against 332 us at 1 row, 303 against 300 at 64.
MAX_FUSED_TOKENS = 64
_TARGET_PROGRAMS = 512
_BLOCK_OUT = 64
_UNPACK_BYTES = 1024


@triton.jit
def _unpack_kernel(packed_ptr, absmax_ptr, code_ptr, out_ptr, num_bytes, BLOCK_BYTES: tl.constexpr):
    """out[2 i], out[2 i + 1] = code[high nibble of byte i], code[low nibble], each times its block's scale."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_BYTES
    index = start + tl.arange(0, BLOCK_BYTES)
    byte = tl.load(packed_ptr + index, mask=index < num_bytes, other=0).to(tl.int32)
    scale = tl.load(absmax_ptr + index // 32, mask=index < num_bytes, other=0.0)
    weight = tl.interleave(tl.load(code_ptr + (byte >> 4)) * scale, tl.load(code_ptr + (byte & 15)) * scale)
    out = 2 * start + tl.arange(0, 2 * BLOCK_BYTES)
    tl.store(out_ptr + out, weight.to(out_ptr.dtype.element_ty), mask=out < 2 * num_bytes)


@triton.jit
def _nf4_matmul_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    code_ptr,
    out_ptr,
    num_tokens,
    out_features,
    in_features,
    stride_x,
    split_features,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """out[split] = x W^T over the input features of one split: [num_splits, num_tokens, out_features].

    W is the left operand: its tile then fills the matrix unit however few rows x has. BLOCK_IN divides in_features.
    """
    row = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    split = tl.program_id(1)
    token = tl.arange(0, BLOCK_TOKENS)
    row_ok = (row < out_features)[:, None]
    token_ok = (token < num_tokens)[:, None]
    packed = packed_ptr + row.to(tl.int64)[:, None] * (in_features // 2) + tl.arange(0, BLOCK_IN // 2)[None, :]
    absmax = absmax_ptr + row.to(tl.int64)[:, None] * (in_features // 64) + tl.arange(0, BLOCK_IN // 64)[None, :]
    x_row = x_ptr + token.to(tl.int64)[:, None] * stride_x + tl.arange(0, BLOCK_IN)[None, :]
    first = split * split_features
    acc = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), dtype=tl.float32)
    for start in range(first, tl.minimum(first + split_features, in_features), BLOCK_IN):
        byte = tl.load(packed + start // 2, mask=row_ok, other=0).to(tl.int32)
        scale = tl.load(absmax + start // 64, mask=row_ok, other=0.0)
        x = tl.load(x_row + start, mask=token_ok, other=0.0)
        code = tl.interleave(tl.load(code_ptr + (byte >> 4)), tl.load(code_ptr + (byte & 15)))
        weight = tl.reshape(code, (BLOCK_OUT, BLOCK_IN // 64, 64)) * scale[:, :, None]
        weight = tl.reshape(weight, (BLOCK_OUT, BLOCK_IN)).to(x.dtype)
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
    out = (split.to(tl.int64) * num_tokens + token[None, :]) * out_features + row[:, None]
    tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=row_ok & tl.trans(token_ok))


def unpack_nf4_triton(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """`lora_kernels.nf4.unpack_nf4`, bit for bit."""
    packed, absmax = packed.contiguous(), absmax.contiguous()
    out = torch.empty((packed.shape[0], packed.shape[1] * 2), dtype=dtype, device=packed.device)
    grid = (triton.cdiv(packed.numel(), _UNPACK_BYTES),)
    _unpack_kernel[grid](packed, absmax, _code(packed.device), out, packed.numel(), BLOCK_BYTES=_UNPACK_BYTES)
    return out


def nf4_matmul_triton(x: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
    """`lora_kernels.nf4.nf4_matmul`; above MAX_FUSED_TOKENS rows the weight is unpacked to a buffer and multiplied.

    Splits over the input features are summed afterwards in a fixed order, so equal inputs give equal bits.
    """
    num_tokens, in_features = x.shape
    if num_tokens > MAX_FUSED_TOKENS:
        return F.linear(x, unpack_nf4_triton(packed, absmax, x.dtype))
    if x.stride(1) != 1:
        x = x.contiguous()
    out_features = packed.shape[0]
    block_tokens = max(16, triton.next_power_of_2(num_tokens))
    block_in = 128 if block_tokens == 16 and in_features % 128 == 0 else 64
    num_tiles = triton.cdiv(out_features, _BLOCK_OUT)
    split_features = _split_features(in_features, num_tiles, block_in)
    num_splits = triton.cdiv(in_features, split_features)
    out = torch.empty(
        (num_splits, num_tokens, out_features), dtype=x.dtype if num_splits == 1 else torch.float32, device=x.device
    )
    _nf4_matmul_kernel[(num_tiles, num_splits)](
        x,
        packed.contiguous(),
        absmax.contiguous(),
        _code(x.device),
        out,
        num_tokens,
        out_features,
        in_features,
        x.stride(0),
        split_features,
        BLOCK_TOKENS=block_tokens,
        BLOCK_OUT=_BLOCK_OUT,
        BLOCK_IN=block_in,
        num_warps=4,
        num_stages=1,  # more would pipeline the look-ups of codes through shared memory: several times slower
    )
    return out[0] if num_splits == 1 else out.sum(0).to(x.dtype)


def _split_features(in_features: int, num_tiles: int, block_in: int) -> int:
    """Input features a program goes through: enough splits to fill the GPU, none shorter than four tiles."""
    num_blocks = in_features // block_in
    num_splits = max(1, min(_TARGET_PROGRAMS // num_tiles, num_blocks // 4))
    return int(triton.cdiv(num_blocks, num_splits)) * block_in


@cache
def _code(device: torch.device) -> Tensor:
    return NF4_CODE.to(device)
