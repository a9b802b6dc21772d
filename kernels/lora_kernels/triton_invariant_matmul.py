"""Triton kernel behind `lora_kernels.invariant.invariant_matmul`; imported on the first use on a GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.launch import launch


@triton.jit(do_not_specialize=("num_tokens",))
def _matmul_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_tokens,
    out_features,
    in_features,
    stride_x,
    stride_weight,
    TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    SPAN: tl.constexpr,
):
    """y[tokens, out] = x[tokens] W[out]^T + bias[out]; one program a tile, which sums all inputs in their order.

    SPAN: so many inputs, where not None, have a sum of their own, which is added to that of those before: one chain of
    14,336 fp32 additions has rounded twice as far as cuBLAS. Tiles of tokens over the same rows of W lie beside each
    other, so that W comes from memory once.
    """
    num_tiles = tl.cdiv(num_tokens, TOKENS)
    token = (tl.program_id(0) % num_tiles * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    out = (tl.program_id(0) // num_tiles * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)
    token_ok, out_ok = token < num_tokens, out < out_features
    x_rows, weight_rows = x_ptr + token * stride_x, weight_ptr + out[:, None] * stride_weight
    if SPAN is None:
        y = _sum(x_rows, weight_rows, token_ok, out_ok, 0, in_features, in_features, TOKENS, BLOCK_OUT, BLOCK_IN)
    else:
        y = tl.zeros((TOKENS, BLOCK_OUT), dtype=tl.float32)
        for begin in range(0, in_features, SPAN):
            end = begin + SPAN
            y += _sum(x_rows, weight_rows, token_ok, out_ok, begin, end, in_features, TOKENS, BLOCK_OUT, BLOCK_IN)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + out, mask=out_ok, other=0.0).to(tl.float32)[None, :]
    to_y = y_ptr + token * out_features + out[None, :]
    tl.store(to_y, y.to(y_ptr.dtype.element_ty), mask=token_ok & out_ok[None, :])


@triton.jit
def _sum(
    x_rows,
    weight_rows,
    token_ok,
    out_ok,
    begin,
    end,
    in_features,
    TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """The products of the inputs from `begin` to `end`."""
    total = tl.zeros((TOKENS, BLOCK_OUT), dtype=tl.float32)
    for first in range(begin, end, BLOCK_IN):
        column = first + tl.arange(0, BLOCK_IN)[None, :]
        column_ok = column < in_features
        x = tl.load(x_rows + column, mask=token_ok & column_ok, other=0.0)
        weight = tl.load(weight_rows + column, mask=out_ok[:, None] & column_ok, other=0.0)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    return total


class _Config(NamedTuple):
    """Tokens, outputs and inputs of a step, warps, pipeline stages and SPAN: the same for every number of tokens."""

    tokens: int
    block_out: int
    block_in: int
    num_warps: int
    num_stages: int
    span: int | None = None


_CONFIG, _CONFIG_FP32 = _Config(64, 128, 64, 4, 4), _Config(32, 64, 32, 4, 3, 512)


def invariant_matmul_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`lora_kernels.invariant.invariant_matmul`."""
    num_tokens, (out_features, in_features) = len(x), weight.shape
    config = _CONFIG_FP32 if x.dtype == torch.float32 else _CONFIG
    y = torch.empty((num_tokens, out_features), dtype=x.dtype, device=x.device)
    launch(
        _matmul_kernel,
        (triton.cdiv(num_tokens, config.tokens) * triton.cdiv(out_features, config.block_out),),
        x,
        weight,
        bias,
        y,
        num_tokens,
        out_features,
        in_features,
        x.stride(0),
        weight.stride(0),
        TOKENS=config.tokens,
        BLOCK_OUT=config.block_out,
        BLOCK_IN=config.block_in,
        SPAN=config.span,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
