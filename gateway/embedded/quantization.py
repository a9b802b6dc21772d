"""NF4 round trips of the base: what the weights are after being packed for serving."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_kernels.nf4 import BLOCK, NF4_CODE, dequantize_nf4, quantize_nf4


def base_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that are served in NF4: all but the head, which is tied to the embedding."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def quantize_base(model: nn.Module) -> None:
    """Replace each linear's weight, in place, by what serving computes with: packed to NF4 and back."""
    for linear in base_linears(model).values():
        weight = linear.weight.data
        linear.weight.data = dequantize_nf4(quantize_nf4(weight), weight.dtype)


def round_trip(weight: Tensor) -> Tensor:
    """NF4 with exact block maxima, in a few fused operations: the forward weights of the last training steps.

    weight: fp32, a multiple of 64 elements. The double quantization of the maxima (under 0.5 %) is left out.
    """
    code = torch.as_tensor(NF4_CODE, dtype=torch.float32, device=weight.device)
    blocks = weight.reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    nearest = torch.bucketize(blocks / absmax, (code[1:] + code[:-1]) / 2)
    return (code[nearest] * absmax).reshape(weight.shape)
