"""Rotary position embedding (arXiv 2104.09864), in Hugging Face's half-split layout."""

from __future__ import annotations

import torch


class RotaryTable:
    """Cosines and signed sines of every position up to `max_len`, gathered once a step and shared by all layers.

    The sine table carries the sign of the rotated halves, so that a rotation is `x * cos + swap(x) * sin`.
    """

    def __init__(
        self, inv_freq: torch.Tensor, scaling: float, max_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        angles = torch.arange(max_len, dtype=torch.float32)[:, None] * inv_freq.cpu()[None, :]
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        # [max_len, 1, head_dim]
        self._cos = torch.cat((cos, cos), dim=-1)[:, None].to(device, dtype)
        self._sin = torch.cat((-sin, sin), dim=-1)[:, None].to(device, dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions: int64 [num_tokens] -> (cos, sin), each [num_tokens, 1, head_dim]."""
        return self._cos[positions], self._sin[positions]
