"""Triton kernels behind `lora_kernels.nf4`; imported on the first use on a GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.nf4 import NF4_CODE

_SUM_BLOCK = 1024


class _Config(NamedTuple):
    """How many rows of W a program takes, its warps and pipeline stages, and the programs that fill the GPU."""

    block_out: int
    num_warps: int
    num_stages: int
    num_programs: int


# By rows of x, up to and including. Beyond the last, unpacking to a buffer and a dense product is faster.
_CONFIGS = {16: _Config(64, 2, 5, 260), 32: _Config(64, 2, 3, 512), 64: _Config(128, 4, 5, 130)}
MAX_FUSED_TOKENS = max(_CONFIGS)


@triton.jit
def _decode(byte, code_ptr, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """(codes of the high nibbles, of the low nibbles) of packed bytes, in DTYPE; by look-ups in memory without ASM."""
    if ASM is None:
        index = byte.to(tl.int32)
        return tl.load(code_ptr + (index >> 4)).to(DTYPE), tl.load(code_ptr + (index & 15)).to(DTYPE)
    else:  # noqa: RET505 - Triton compiles the one branch or the other
        high, low = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,r", [byte], dtype=(tl.int16, tl.int16), is_pure=True, pack=4
        )
        return high.to(DTYPE, bitcast=True), low.to(DTYPE, bitcast=True)


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
    index = tl.arange(0, 32)[None, :]
    byte = tl.load(packed_ptr + row * stride_row + block.to(tl.int64)[:, None] * stride_block + index, mask=ok, other=0)
    scale = tl.load(absmax_ptr + row * stride_absmax_row + block[:, None] * stride_absmax_block, mask=ok, other=0.0)
    high, low = _decode(byte, code_ptr, None, tl.float32)
    out = out_ptr + (row * num_blocks + block[:, None]) * 64 + tl.arange(0, 64)[None, :]
    tl.store(out, tl.interleave(high * scale, low * scale).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _matmul_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    code_ptr,
    out_ptr,
    num_tokens,
    out_features,
    num_blocks,
    blocks_a_split,
    stride_x,
    stride_row,
    stride_block,
    stride_absmax_row,
    stride_absmax_block,
    ASM: tl.constexpr,
    DTYPE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[split] = sum over the split's blocks of scale[block] * (x[block] code[block]^T): [num_tokens, out_features].

    W is the left operand: its tile then fills the matrix unit however few rows x has. The scale of a block of 64
    weights multiplies the block's fp32 sum and not each weight. Even and odd columns of a block are the high and the
    low nibbles of its bytes: two products, of x's even and of its odd columns, and nothing is interleaved. With ASM, x
    comes as pairs of 16-bit numbers in an int32, else as numbers.
    """
    row = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_read = tl.minimum(row, out_features - 1).to(tl.int64)
    split = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    token_ok = (token < num_tokens)[:, None]
    index = tl.arange(0, 32)
    packed_row = packed_ptr + row_read[:, None] * stride_row + index[None, :]
    absmax_row = absmax_ptr + row_read * stride_absmax_row
    x_row = x_ptr + token.to(tl.int64)[:, None] * stride_x
    acc = tl.zeros((BLOCK_OUT, TOKENS), dtype=tl.float32)
    first = split * blocks_a_split
    for block in tl.range(first, tl.minimum(first + blocks_a_split, num_blocks), num_stages=STAGES):
        byte = tl.load(packed_row + block * stride_block)
        scale = tl.load(absmax_row + block * stride_absmax_block)
        high, low = _decode(byte, code_ptr, ASM, DTYPE)
        if ASM is None:
            even = tl.load(x_row + block * 64 + 2 * index[None, :], mask=token_ok, other=0.0)
            odd = tl.load(x_row + block * 64 + 2 * index[None, :] + 1, mask=token_ok, other=0.0)
        else:
            pair = tl.load(x_row + block * 32 + index[None, :], mask=token_ok, other=0)
            even = (pair & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
            odd = (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        part = tl.dot(high, tl.trans(even), input_precision="ieee")
        part = tl.dot(low, tl.trans(odd), part, input_precision="ieee")
        acc += part * scale[:, None]
    out = out_ptr + (split.to(tl.int64) * num_tokens + token[None, :]) * out_features + row[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(row < out_features)[:, None] & tl.trans(token_ok))


@triton.jit
def _sum_splits_kernel(parts_ptr, out_ptr, numel, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of parts [NUM_SPLITS, numel], always in the same order."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = index < numel
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        total += tl.load(parts_ptr + split * numel + index, mask=ok, other=0.0)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=ok)


def unpack_nf4_triton(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """`lora_kernels.nf4.unpack_nf4`, bit for bit."""
    out_features, num_blocks, _ = packed.shape
    out = torch.empty((out_features, num_blocks * 64), dtype=dtype, device=packed.device)
    blocks = min(32, triton.next_power_of_2(num_blocks))
    _unpack_kernel[(out_features, triton.cdiv(num_blocks, blocks))](
        packed, absmax, _code(packed.device), out, num_blocks, *packed.stride()[:2], *absmax.stride(), BLOCKS=blocks
    )
    return out


def nf4_matmul_triton(x: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
    """`lora_kernels.nf4.nf4_matmul`; above MAX_FUSED_TOKENS rows the weight is unpacked to a buffer and multiplied.

    Splits over the input features are summed afterwards in a fixed order, so equal inputs give equal bits.
    """
    if x.shape[0] > MAX_FUSED_TOKENS:
        return F.linear(x, unpack_nf4_triton(packed, absmax, x.dtype))
    config = next(config for most, config in _CONFIGS.items() if x.shape[0] <= most)
    return _fused_matmul(x, packed, absmax, config)


def _fused_matmul(x: Tensor, packed: Tensor, absmax: Tensor, config: _Config) -> Tensor:
    (num_tokens, _), (out_features, num_blocks, _) = x.shape, packed.shape
    asm = _decode_asm(x.dtype) if x.is_cuda and x.dtype != torch.float32 else None
    if x.stride(1) != 1 or x.stride(0) % 2 or x.storage_offset() % 2:
        x = x.contiguous()
    num_tiles = triton.cdiv(out_features, config.block_out)
    blocks_a_split = _blocks_a_split(num_blocks, num_tiles, config.num_programs)
    num_splits = triton.cdiv(num_blocks, blocks_a_split)
    out = torch.empty((num_tokens, out_features), dtype=x.dtype, device=x.device)
    parts = out if num_splits == 1 else out.new_empty((num_splits, *out.shape), dtype=torch.float32)
    source = x if asm is None else x.view(torch.int32)
    _matmul_kernel[(num_tiles, num_splits)](
        source,
        packed,
        absmax,
        _code(x.device),
        parts,
        num_tokens,
        out_features,
        num_blocks,
        blocks_a_split,
        source.stride(0),
        *packed.stride()[:2],
        *absmax.stride(),
        ASM=asm,
        DTYPE=_DTYPES[x.dtype],
        TOKENS=max(16, triton.next_power_of_2(num_tokens)),
        BLOCK_OUT=config.block_out,
        # Look-ups of codes would be pipelined through shared memory: several times slower.
        STAGES=config.num_stages if asm else 1,
        num_warps=config.num_warps,
    )
    if num_splits > 1:
        numel = out.numel()
        _sum_splits_kernel[(triton.cdiv(numel, _SUM_BLOCK),)](
            parts, out, numel, NUM_SPLITS=num_splits, BLOCK=_SUM_BLOCK
        )
    return out


def _blocks_a_split(num_blocks: int, num_tiles: int, num_programs: int) -> int:
    """Blocks that a program goes through: a power of two of splits, enough to fill the GPU, none under four blocks."""
    num_splits = triton.next_power_of_2(triton.cdiv(num_programs, num_tiles))
    return max(int(triton.cdiv(num_blocks, num_splits)), min(4, num_blocks))


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@cache
def _code(device: torch.device) -> Tensor:
    return NF4_CODE.to(device)


@cache
def _decode_asm(dtype: torch.dtype) -> str:
    """PTX that turns four packed bytes ($4) into the 16-bit codes of their high ($0, $1) and low ($2, $3) nibbles.

    The table's sixteen entries lie in immediates, their low and high bytes apart. `prmt` looks four nibbles up at once,
    in the table's first half and in its second; the nibbles' highest bits choose between the two, and a last `prmt`
    joins low bytes and high ones. A look-up in memory takes two to three times as long.
    """
    entries = [bits & 0xFFFF for bits in NF4_CODE.to(dtype).view(torch.int16).tolist()]
    lows, highs = _words([entry & 0xFF for entry in entries]), _words([entry >> 8 for entry in entries])
    lines = [
        ".reg .b32 index0, index1, half0, half1, first, second, low, high;",
        "and.b32 index0, $4, 0x77777777;",
        "shr.u32 half0, $4, 1;",
        "lop3.b32 half0, half0, 0x44444444, 0x32103210, 0xEA;",  # (half0 & 0x4444...) | 0x3210...
        "shr.u32 index1, index0, 16;",
        "shr.u32 half1, half0, 16;",
    ]
    for pair in (0, 1):
        for table, name in ((lows, "low"), (highs, "high")):
            lines += [
                f"prmt.b32 first, {table[0]}, {table[1]}, index{pair};",
                f"prmt.b32 second, {table[2]}, {table[3]}, index{pair};",
                f"prmt.b32 {name}, first, second, half{pair};",
            ]
        lines += [f"prmt.b32 ${pair}, low, high, 0x7351;", f"prmt.b32 ${pair + 2}, low, high, 0x6240;"]
    return "\n".join(["{", *lines, "}"])


def _words(entries: list[int]) -> list[str]:
    """Sixteen bytes as four 32-bit literals, the first byte lowest."""
    return [f"0x{sum(byte << 8 * i for i, byte in enumerate(entries[at : at + 4])):08x}" for at in range(0, 16, 4)]
