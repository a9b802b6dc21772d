"""NF4 weights (QLoRA, arXiv 2305.14314) laid out as bitsandbytes stores them, and the product with them.

Blocks of 64 consecutive weights share one scale (absmax); the scales are quantized again to 8 bits in blocks of 256
after their mean is taken off ("double quantization"). Everything but `nf4_matmul` is plain PyTorch and runs on the
device of its argument.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
NESTED_BLOCK = 256
TILE_ROWS = 64

# The 16 quantiles of the normal distribution, bitsandbytes' constants.
NF4_CODE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
)

_SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LUT_LAST = 65535


@dataclass(frozen=True)
class NF4Weight:
    """One quantized [out, in] matrix.

    packed: uint8 [out * in / 2], two weights a byte, the first in the high nibble.
    absmax_u8: uint8 [num_blocks], the scale of each 64 weights, quantized.
    nested_absmax: fp32 [ceil(num_blocks / 256)], the scale of each 256 scales.
    nested_offset: fp32 scalar, the mean of the scales.
    nested_code: fp32 [256], the 8-bit dynamic map that absmax_u8 indexes.
    shape: (out, in). dtype: that of the weight before quantization.
    """

    packed: Tensor
    absmax_u8: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor
    nested_code: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    def absmax(self) -> Tensor:
        """The scales, fp32 [num_blocks], with bitsandbytes' rounding (multiply, then add)."""
        nested = self.nested_absmax.repeat_interleave(NESTED_BLOCK)[: self.absmax_u8.numel()]
        return self.nested_code[self.absmax_u8.int()] * nested + self.nested_offset


def quantize_nf4(weight: Tensor) -> NF4Weight:
    """Quantizes weight [out, in] (fp32, bf16 or fp16) to the bits that bitsandbytes makes of it on a CPU.

    Equal to `bitsandbytes.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True, blocksize=64)`.
    Raises ValueError when the weight is not a 2-d float matrix or `in` is not a multiple of 64.
    """
    if weight.ndim != 2 or weight.dtype not in _SOURCE_DTYPES or weight.shape[1] % BLOCK:
        raise ValueError(
            f"NF4 needs an fp32, bf16 or fp16 matrix with columns in multiples of {BLOCK}, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    blocks = weight.reshape(-1, BLOCK).float()
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)
    midpoints = ((NF4_CODE[:-1] + NF4_CODE[1:]) / 2).to(weight.device)
    codes = torch.bucketize(scaled.clamp_(-1, 1).view(-1), midpoints, out_int32=True).to(torch.uint8)
    # The mean is taken on the CPU so that a weight quantized on a GPU has the offset that bitsandbytes' CPU path gives.
    offset = absmax.cpu().mean().to(weight.device)
    absmax_u8, nested_absmax = _quantize_absmax(absmax - offset)
    return NF4Weight(
        packed=(codes[::2] << 4) | codes[1::2],
        absmax_u8=absmax_u8,
        nested_absmax=nested_absmax,
        nested_offset=offset,
        nested_code=dynamic_map().to(weight.device, copy=True),
        shape=(weight.shape[0], weight.shape[1]),
        dtype=weight.dtype,
    )


def dequantize_nf4(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] in `dtype`: fp32 code times fp32 scale, rounded once."""
    packed, absmax = blocks_of(weight)
    return unpack_nf4(packed, absmax, dtype)


def blocks_of(weight: NF4Weight) -> tuple[Tensor, Tensor]:
    """The factors that the functions below take: packed uint8 [out, in / 64, 32], absmax fp32 [out, in / 64]."""
    out_features, in_features = weight.shape
    num_blocks = in_features // BLOCK
    return weight.packed.view(out_features, num_blocks, BLOCK // 2), weight.absmax().view(out_features, num_blocks)


@dataclass(frozen=True)
class NF4Tiles:
    """A quantized [out, in] matrix in the order in which `nf4_matmul` reads it: tiles of 64 rows by one block of 64.

    tiles: uint8 [ceil(out / 64), in / 64, 2048]. scales: fp32 [ceil(out / 64), in / 64, 64], the absmax expanded: 4.5
    bits a weight in all, against 4.13 double-quantized. Rows beyond `out` are zero. shape: (out, in).

    A tile's bytes are those of bitsandbytes, reordered: four strips of 16 rows, each as the 32 lanes of a warp hold it
    for the matrix unit (mma.m16n8k16's A, PTX ISA 9.7.14.5): lane 4 g + t has 16 bytes, of row g the pairs of columns
    (16 s + 8 h + 2 t, + 1) for s in 0..3 and h in 0..1, then of row g + 8 the same. Scales: (g, strip, g or g + 8).
    """

    tiles: Tensor
    scales: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, packed: Tensor, absmax: Tensor) -> "NF4Tiles":
        """From packed uint8 [out, in / 64, 32] and absmax fp32 [out, in / 64], as `blocks_of` gives them."""
        out_features, num_blocks, _ = packed.shape
        rows = (0, 0, 0, -out_features % TILE_ROWS)
        packed, absmax = F.pad(packed, (0, 0, *rows)), F.pad(absmax, rows)
        tiles = packed.view(-1, 4, 2, 8, num_blocks, 4, 2, 4).permute(0, 4, 1, 3, 7, 2, 5, 6)
        scales = absmax.view(-1, 4, 2, 8, num_blocks).permute(0, 4, 3, 1, 2)
        shape = (out_features, num_blocks * BLOCK)
        return cls(
            tiles.reshape(-1, num_blocks, TILE_ROWS * BLOCK // 2), scales.reshape(-1, num_blocks, TILE_ROWS), shape
        )

    def blocks(self) -> tuple[Tensor, Tensor]:
        """The factors that `of` was given, bit for bit."""
        num_blocks = self.tiles.shape[1]
        packed = self.tiles.view(-1, num_blocks, 4, 8, 4, 2, 4, 2).permute(0, 2, 5, 3, 1, 6, 7, 4)
        absmax = self.scales.view(-1, num_blocks, 8, 4, 2).permute(0, 3, 4, 2, 1)
        return (
            packed.reshape(-1, num_blocks, BLOCK // 2)[: self.shape[0]],
            absmax.reshape(-1, num_blocks)[: self.shape[0]],
        )


def unpack_nf4(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] in `dtype` from packed uint8 [out, in / 64, 32] and absmax fp32 [out, in / 64]."""
    if packed.is_cuda:
        from lora_kernels.triton_nf4 import unpack_nf4_triton

        return unpack_nf4_triton(packed, absmax, dtype)
    return unpack_nf4_ref(packed, absmax, dtype)


def unpack_nf4_ref(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """`unpack_nf4` in plain PyTorch: one look-up of a pair of weights a byte."""
    pairs = _pair_table().to(packed.device)[packed.int()]  # [out, in / 64, 32, 2]
    return (pairs.flatten(2) * absmax.unsqueeze(2)).to(dtype).flatten(1)


def nf4_matmul_ref(x: Tensor, weight: NF4Tiles, bias: Tensor | None = None) -> Tensor:
    """`nf4_matmul` in plain PyTorch: the weight is unpacked to x's dtype, then multiplied."""
    return F.linear(x, unpack_nf4_ref(*weight.blocks(), x.dtype), bias)


def nf4_matmul(x: Tensor, weight: NF4Tiles, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b with an NF4 W, accumulated in fp32.

    x: [num_tokens, in] fp32, bf16 or fp16. bias: [out] in x's dtype, or None. Returns [num_tokens, out] in x's dtype.
    Equal inputs give equal bits. CUDA on a GPU, `nf4_matmul_ref` elsewhere. Raises ValueError on an x of another width.
    """
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} does not fit a weight of {weight.shape[1]} columns")
    if x.is_cuda:
        from lora_kernels.cuda_nf4 import nf4_matmul_cuda

        return nf4_matmul_cuda(x, weight, bias)
    return nf4_matmul_ref(x, weight, bias)


@cache
def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic data type of arXiv 1511.04561, sorted, fp32 [256]."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2
        values += (10 ** (exponent - 6) * means).tolist()
        values += (-(10 ** (exponent - 6)) * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _dynamic_lut() -> Tensor:
    """uint8 [65536]: the code of each of 65,536 even steps over [-1, 1].

    bitsandbytes' CPU path rounds a scale to such a step before it takes the nearest code, so codes that are closer to
    each other than a step (those near zero) are never chosen. Bit equality needs the same detour.
    """
    code = dynamic_map()
    steps = torch.arange(_LUT_LAST + 1, dtype=torch.float32) * 2 / _LUT_LAST - 1
    return torch.bucketize(steps, (code[:-1] + code[1:]) * 0.5).to(torch.uint8)


def _quantize_absmax(values: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes uint8 [n] of centred scales fp32 [n], and the scale fp32 of each 256 of them."""
    blocks = F.pad(values, (0, -values.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    unit = (blocks * (1.0 / absmax).unsqueeze(1)).clamp(-1, 1)
    # fp64 holds the product and the sum exactly, so the cast to fp32 rounds once, like the fused multiply-add there.
    step = ((unit + 1) * 0.5).double() * _LUT_LAST + 0.5
    step = step.float().nan_to_num(nan=0.0).int()  # an all-zero block has no scale; its codes are 0
    codes = _dynamic_lut().to(values.device)[step].view(-1)
    return codes[: values.numel()], absmax


@cache
def _pair_table() -> Tensor:
    """fp32 [256, 2]: the two codes of each packed byte."""
    byte = torch.arange(256)
    return torch.stack([NF4_CODE[byte >> 4], NF4_CODE[byte & 15]], dim=1)
