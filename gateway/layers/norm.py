"""Root mean square normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class RMSNorm:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., dim] -> [..., dim], in x's dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
