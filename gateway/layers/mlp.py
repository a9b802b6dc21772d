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
        gate_up = batch.with_vectors(self._gate_up(x, batch), layer, "gate_up")
        return batch.with_vectors(self.down(silu_mul(gate_up, batch.input_vectors(layer)), batch), layer, "down")

    def _gate_up(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """Outputs of gate, and beside them of up, whose inputs rows' own adapters may change apart.

        All rows go through both linears as gate reads them, and rows with such adapters once more, as up does.
        """
        layer, width = self.gate_up.layer, self.gate_up.widths[0]
        y = self.gate_up(batch.inputs_of("gate", x, layer), batch)
        if (own := batch.split_rows) is not None:
            of_up = self.gate_up.base(batch.inputs_of("up", x, layer)[own], batch.invariant)
            y[own, width:] = of_up[:, width:]
        return y
