"""Root mean square normalisation."""

from __future__ import annotations

import torch

from lora_kernels.norm import rms_norm
from lora_kernels.vectors import SlotVectors


class RMSNorm:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(
        self, x: torch.Tensor, delta: torch.Tensor | None = None, tuned: SlotVectors | None = None
    ) -> torch.Tensor:
        """x: [num_tokens, dim] -> [num_tokens, dim], in x's dtype. A `delta` is first added to x in place.

        tuned: the weights of those rows whose adapter has its own.
        """
        return rms_norm(x, self.weight, self.eps, delta, tuned)
