"""One layer's pages of keys and values, in the compute dtype or in fp8, and plain PyTorch's way in and out."""

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_AMAX = 1e-12  # of a vector with a scale of its own: one of zeros wants a scale too


class LayerCache(NamedTuple):
    """One layer's pages; every tensor counts blocks first, so that a block is the same index of each.

    k, v: [num_blocks, block_size, num_kv_heads, head_dim], contiguous.
    scales: None, or of fp8 pages (float8_e4m3fn) what each token's key and value of each head are multiplied with,
    side by side: bf16 [num_blocks, num_kv_heads, block_size, 2].
    """

    k: Tensor
    v: Tensor
    scales: Tensor | None = None

    @classmethod
    def zeros(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Self:
        """Pages of `dtype`, with scales where that is fp8."""
        k, v = (torch.zeros(num_blocks, block_size, num_kv_heads, head_dim, dtype=dtype, device=device) for _ in "kv")
        if dtype != FP8:
            return cls(k, v)
        return cls(k, v, torch.zeros(num_blocks, num_kv_heads, block_size, 2, dtype=torch.bfloat16, device=device))

    @classmethod
    def interleaved(cls, memory: Tensor, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Self:
        """Pages in memory, uint8 [num_bytes], that is there: a block's keys, its values, the next block's keys.

        k, v and the scales that fp8 has count halves of blocks then, of which k's at n and v's at n belong together
        where n is even.
        """
        shape = block_size, num_kv_heads, head_dim
        half = math.prod(shape) * dtype.itemsize
        k, v = (part.view(dtype).view(-1, *shape) for part in (memory, memory[half:]))
        if dtype != FP8:
            return cls(k, v)
        return cls(k, v, memory.new_zeros(len(k), num_kv_heads, block_size, 2, dtype=torch.bfloat16))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a block consists of."""
        return (self.k, self.v) if self.scales is None else (self.k, self.v, self.scales)

    def store(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k, v [n, num_kv_heads, head_dim] to the cache positions `slots` [n], block * block_size + offset."""
        if self.scales is not None:
            (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
            block_size = self.k.shape[1]
            self.scales[slots // block_size, :, slots % block_size] = torch.stack((k_scale, v_scale), -1)
        for pages, rows in zip((self.k, self.v), (k, v), strict=True):
            _opaque(pages).flatten(0, 1).index_copy_(0, slots, _opaque(rows))

    def blocks(self, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the blocks `index` [n], each [n * block_size, num_kv_heads, head_dim] in `dtype`."""
        k, v = (_opaque(pages).index_select(0, index) for pages in (self.k, self.v))
        if self.scales is not None:
            scales = self.scales.index_select(0, index).transpose(1, 2)  # [n, block_size, num_kv_heads, 2]
            k, v = _scaled(k, v, scales, dtype)
        return k.flatten(0, 1), v.flatten(0, 1)

    def tokens(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values at the cache positions `slots` [n], each [n, num_kv_heads, head_dim] in `dtype`."""
        k, v = (_opaque(pages).flatten(0, 1).index_select(0, slots) for pages in (self.k, self.v))
        if self.scales is None:
            return k, v
        block_size = self.k.shape[1]
        return _scaled(k, v, self.scales[slots // block_size, :, slots % block_size], dtype)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] of any float dtype -> fp8 of that shape and a scale, bf16 [...], that gives x back, nearly.

    scale = amax / 448, rounded up to bf16: the largest element becomes fp8's largest, and nothing passes it.
    """
    x = x.float()
    amax = x.abs().amax(-1).clamp(min=SMALLEST_AMAX)
    scale = ((amax * (1 / FP8_MAX)).view(torch.int32) + 0xFFFF & -0x10000).view(torch.float32)
    return (x * (1 / scale).unsqueeze(-1)).to(FP8), scale.to(torch.bfloat16)


def _opaque(x: Tensor) -> Tensor:
    """fp8 as bytes: PyTorch copies no fp8 by index on CUDA."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


def _scaled(k: Tensor, v: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """k, v [..., head_dim], the bytes of fp8, times scales [..., 2], in fp32 and rounded once."""
    k_scale, v_scale = scales.float().unsqueeze(-2).unbind(-1)  # [..., 1]
    return (k.view(FP8).float() * k_scale).to(dtype), (v.view(FP8).float() * v_scale).to(dtype)
