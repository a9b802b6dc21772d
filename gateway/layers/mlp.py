"""The gated feed-forward block."""

from __future__ import annotations

import torch

from gateway.layers.forward_batch import ForwardBatch
from gateway.layers.linear import AdaptedLinear, RowParallelLinear
from lora_kernels.activation import silu_mul


class GatedMLP:
    """y = down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, gate_up: AdaptedLinear, down: AdaptedLinear | RowParallelLinear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """x: [num_tokens, hidden] -> [num_tokens, hidden]."""
        layer = self.gate_up.layer
        gate_up = batch.with_vectors(self.gate_up(x, batch), layer, "gate_up")
        return batch.with_vectors(self.down(silu_mul(gate_up, batch.input_vectors(layer)), batch), layer, "down")
