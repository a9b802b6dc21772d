"""What only the base turns into scales and biases: DoRA's magnitudes, and biases trained in the place of the base's."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F

from adapters_store.lora_layout import LoRAGroup
from adapters_store.slots import AdapterSlots
from adapters_store.vector_slots import VectorSlots
from gateway.layers.linear import Linear, NF4Linear
from gateway.models.decoder import Decoder
from lora_kernels.nf4 import nf4_matmul, unpack_nf4

_RANKS_AT_ONCE: Final = 512  # of all layers: what lies in memory meanwhile is about 0.3 GB at Llama-3.1-8B's shape
_ROW_PARALLEL: Final = frozenset({"o", "down"})


class RawVectors:
    """Resolves the rows of `VectorSlots.raw` on the device, each once a load; the host waits for nothing.

    DoRA (arXiv 2402.09353): y = m / ||W + B A|| (W x + B A x) + b, with the norm of each row of the dequantized W. It
    needs no W + B A: ||W + B A||^2 = ||W||^2 + sum_r B_r (2 W A_r + B A A_r), where W A^T is the base's own product. In
    bf16 that is off by 2^-9 in the smaller term; sums are fp32. ||W|| is taken at the start: 0.4 s at 8B on an H200.

    Across ranks the sums over the inputs of o and down are added up, so that every rank must resolve the same slots in
    the same order: those of a step, before it.
    """

    def __init__(self, decoder: Decoder, slots: AdapterSlots, vectors: VectorSlots) -> None:
        self._decoder = decoder
        self._slots = slots
        self._vectors = vectors
        # ||W||^2 of this rank's inputs, by group: [num_layers, out_total].
        self._squares = {group.name: self._square(group) for group in slots.layout.groups}

    def resolve(self, slot: int) -> None:
        """Make scales and biases of the row of a slot, which has been copied and which no step has used yet."""
        roles = self._vectors.raw.pop(slot)
        for group in self._slots.layout.groups:
            self._resolve(group, slot, has_magnitudes="magnitude" in roles)

    def _resolve(self, group: LoRAGroup, slot: int, *, has_magnitudes: bool) -> None:
        row = self._vectors.row(slot)
        scale, bias = (self._vectors.pools[f"{group.name}.{part}"][:, row] for part in ("scale", "bias"))
        magnitude, own = (self._mark(group, part, row) for part in ("magnitude", "own_bias"))
        if has_magnitudes:
            norms = self._sum(group, self._squares[group.name] + self._gain(group, slot)).sqrt()
            scale.copy_(torch.where(magnitude, scale / norms, scale))
        base_bias = self._base_bias(group)
        if base_bias is not None:
            # The row makes scale (W x + b) + bias of W x + b: DoRA does not scale b, and an own bias is instead of it.
            # Elsewhere the scale is 1, and nothing changes.
            bias.add_(((~own).float() - scale) * base_bias)

    def _mark(self, group: LoRAGroup, part: str, row: int) -> torch.Tensor:
        """Where a group's outputs have such a vector: bool [num_layers, out_total]."""
        marks = self._vectors.pools[f"{group.name}.{part}"][:, row] > 0
        return torch.cat([marks[:, i : i + 1].expand(-1, width) for i, width in enumerate(group.widths)], dim=1)

    def _sum(self, group: LoRAGroup, x: torch.Tensor) -> torch.Tensor:
        ranks = self._decoder.ranks
        return x if ranks is None or group.name not in _ROW_PARALLEL else ranks.all_reduce(x)

    def _base_bias(self, group: LoRAGroup) -> torch.Tensor | None:
        """The biases of a group, [num_layers, out_total], the same on every rank; None where there are none."""
        biases = [base.bias for base in self._bases(group)]
        present = [bias.float() for bias in biases if bias is not None]
        if present:
            return self._sum(group, torch.stack(present))
        if self._decoder.ranks is None or group.name not in _ROW_PARALLEL:
            return None
        # Another rank may have them.
        return self._sum(group, torch.zeros(len(biases), group.out_total, device=self._decoder.device))

    def _bases(self, group: LoRAGroup) -> list[Linear]:
        return [linear.base for linear in self._decoder.linears(group.name)]

    def _square(self, group: LoRAGroup) -> torch.Tensor:
        return torch.stack([_row_norms(base, self._decoder.dtype) for base in self._bases(group)]).square()

    def _gain(self, group: LoRAGroup, slot: int) -> torch.Tensor:
        """||W + B A||^2 - ||W||^2 of this rank's inputs, [num_layers, out_total]."""
        a, b = self._slots.matrices(slot, group)
        size = max(1, _RANKS_AT_ONCE // a.shape[2])
        bases = self._bases(group)
        parts = [slice(start, start + size) for start in range(0, len(bases), size)]
        return torch.cat([self._gain_of_layers(group, bases[part], a[part], b[part]) for part in parts])

    def _gain_of_layers(self, group: LoRAGroup, bases: list[Linear], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a: [num_layers, num_linears, r, in]. b: [num_layers, r, out_total]. Returns [num_layers, out_total]."""
        rank = a.shape[2]
        rows = a.to(self._decoder.dtype).flatten(1, 2)
        products = torch.stack([_product(base, x) for base, x in zip(bases, rows, strict=True)])
        gains = []
        for index, linear in enumerate(group.linears):
            columns = group.columns(linear)
            a_own, b_own = a[:, index].float(), b[:, :, columns].float()
            product = products[:, index * rank : (index + 1) * rank, columns].float()
            gains.append((b_own * (2 * product + a_own @ a_own.mT @ b_own)).sum(1))
        return torch.cat(gains, dim=1)


def _product(base: Linear, x: torch.Tensor) -> torch.Tensor:
    """x W^T, without the bias."""
    return nf4_matmul(x, base.weight) if isinstance(base, NF4Linear) else F.linear(x, base.weight)


def _row_norms(base: Linear, dtype: torch.dtype) -> torch.Tensor:
    """||W|| of each row: fp32 [out_total]."""
    weight = unpack_nf4(*base.weight.blocks(), dtype) if isinstance(base, NF4Linear) else base.weight
    norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    return norms
