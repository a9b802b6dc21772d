"""A frozen linear that keeps its weight in NF4, for training an adapter on it with `peft` (QLoRA)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels.nf4 import NF4Weight, dequantize_nf4


class _NF4MatMul(torch.autograd.Function):
    """y = x W^T with W dequantized on the fly, in the forward pass and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: NF4Linear) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.dequantized().to(grad.dtype), None


class NF4Linear(nn.Linear):
    """`nn.Linear` over an `NF4Weight`, never trained itself; gradients flow through to its input.

    On CUDA only the packed bytes stay, and each pass dequantizes (arXiv 2305.14314). The CPU, where memory is cheaper
    than time, also keeps the dequantized weight; the numbers are the same.

    x: [..., in] -> [..., out] in x's dtype. dtype is that of the dequantized weight.
    """

    packed: torch.Tensor
    absmax_u8: torch.Tensor
    nested_absmax: torch.Tensor
    nested_offset: torch.Tensor
    nested_code: torch.Tensor
    dense: torch.Tensor | None

    def __init__(self, weight: NF4Weight, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a dense weight
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self._source_dtype = weight.dtype
        for name in ("packed", "absmax_u8", "nested_absmax", "nested_offset", "nested_code"):
            self.register_buffer(name, getattr(weight, name), persistent=False)
        frozen_bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.register_parameter("bias", frozen_bias)
        on_cpu = weight.packed.device.type == "cpu"
        self.register_buffer("dense", dequantize_nf4(weight, dtype) if on_cpu else None, persistent=False)

    @property
    def nf4(self) -> NF4Weight:
        """The packed weight."""
        return NF4Weight(
            packed=self.packed,
            absmax_u8=self.absmax_u8,
            nested_absmax=self.nested_absmax,
            nested_offset=self.nested_offset,
            nested_code=self.nested_code,
            shape=(self.out_features, self.in_features),
            dtype=self._source_dtype,
        )

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The dequantized weight, [out, in]; `peft` reads its device and dtype."""
        return self.dequantized()

    def dequantized(self) -> torch.Tensor:
        """[out, in] in `dtype`."""
        return dequantize_nf4(self.nf4, self.dtype) if self.dense is None else self.dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out]."""
        if self.dense is not None:
            return F.linear(x, self.dense, self.bias)
        y: torch.Tensor = _NF4MatMul.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias
