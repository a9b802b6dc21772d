"""A linear of the base, packed or dense, and the adapters' low-rank delta on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lora_kernels.invariant import invariant_matmul, invariant_nf4_matmul
from lora_kernels.nf4 import NF4Tiles, nf4_matmul, unpack_nf4
from lora_kernels.nf4_lora import nf4_lora_matmul
from lora_kernels.sgmv import sgmv_expand, sgmv_shrink

if TYPE_CHECKING:
    from gateway.layers.forward_batch import ForwardBatch
    from gateway.layers.tensor_parallel import TensorParallel


def dense_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, invariant: bool) -> torch.Tensor:
    """x W^T + b, W [out, in] in x's dtype: [num_tokens, in] -> [num_tokens, out]."""
    multiply = invariant_matmul if invariant else F.linear
    return multiply(x, weight, bias)


class DenseLinear:
    """y = x W^T + b with W [out, in] in the compute dtype.

    On the CPU, W^T is what lies contiguous in memory: all the embedded base's linears took 1.3, 2.3 and 5.2 ms at 1, 8
    and 32 tokens instead of 1.9, 3.1 and 5.9 ms (2 cores, fp32, MKL).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight if weight.is_cuda else weight.t().contiguous().t()
        self.bias = bias

    def __call__(self, x: torch.Tensor, invariant: bool) -> torch.Tensor:
        """x: [num_tokens, in] -> [num_tokens, out]."""
        return dense_matmul(x, self.weight, self.bias, invariant)


class NF4Linear:
    """The same with W kept in NF4 (arXiv 2305.14314)."""

    def __init__(self, weight: NF4Tiles, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor, invariant: bool) -> torch.Tensor:
        """x: [num_tokens, in] -> [num_tokens, out]."""
        multiply = invariant_nf4_matmul if invariant else nf4_matmul
        return multiply(x, self.weight, self.bias)


Linear = DenseLinear | NF4Linear


def fuse_nf4(
    weights: Sequence[tuple[torch.Tensor, torch.Tensor]], bias: torch.Tensor | None, dtype: torch.dtype
) -> Linear:
    """Stack NF4 linears that share their input, each as `blocks_of` gives it, into one.

    On the CPU the weights are expanded once to `dtype`: it has no fast 4-bit path, and memory is cheaper there than
    time. The numbers are those of the packed weights.
    """
    if not weights[0][0].is_cuda:
        return DenseLinear(torch.cat([unpack_nf4(*blocks, dtype) for blocks in weights]), bias)
    packed, absmax = map(torch.cat, zip(*weights, strict=True))
    return NF4Linear(NF4Tiles.of(packed, absmax), bias)


class AdaptedLinear:
    """Linears that share their input ("qkv", "gate_up") or stand alone, and every resident adapter's delta on them.

    y = base(x) + B_slot (A_slot x) for the rows whose slot is not -1; `widths` are the output widths of the linears
    fused here, in order.
    """

    def __init__(self, base: Linear, layer: int, group: str, widths: tuple[int, ...]) -> None:
        self.base = base
        self.layer = layer
        self.group = group
        self.widths = widths

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """x: [num_tokens, in] -> [num_tokens, sum(widths)]."""
        if batch.segments is None:
            return self.base(x, batch.invariant)
        pools = batch.adapters.pools(self.layer, self.group)
        scales = pools.a_scales, pools.b_scales
        if isinstance(self.base, NF4Linear) and not batch.invariant:
            weight, bias = self.base.weight, self.base.bias
            return nf4_lora_matmul(x, weight, bias, pools.a, pools.b, batch.segments, self.widths, *scales)
        y = self.base(x, batch.invariant)
        h = sgmv_shrink(x, pools.a, batch.segments, scales[0])
        sgmv_expand(h, pools.b, batch.segments, y, self.widths, scales[1])
        return y


class RowParallelLinear:
    """A linear of which each rank has a part of the inputs: the ranks' results are added up, adapters' deltas too."""

    def __init__(self, part: AdaptedLinear, ranks: TensorParallel) -> None:
        self.part = part
        self.ranks = ranks

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """x: [num_tokens, in / size] -> [num_tokens, out], the same on every rank."""
        return self.ranks.all_reduce(self.part(x, batch))
