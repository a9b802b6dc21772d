"""How an adapter's vectors lie in memory: one row of numbers over all layers, for every place that may have one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from adapters_store.base_spec import NORMS
from adapters_store.lora_layout import LoRAGroup, LoRALayout
from adapters_store.weights import AdapterWeights

INPUTS: Final = "down.inputs"
_MARKS: Final = ("magnitude", "own_bias")


@dataclass(frozen=True, eq=False)
class VectorLayout:
    """The parts of a row and what they hold for the bare base.

    Of each group of linears "<group>.scale" and "<group>.bias" [num_layers, out_total], which act on its outputs, and
    "<group>.magnitude" and "<group>.own_bias" [num_layers, num_linears], 1 for the linears whose scale is still DoRA's
    magnitude, and whose bias takes the place of the base's (`VectorSlots.raw`); "down.inputs" [num_layers, in], which
    scales what down_proj reads; and a norm's weight under its name, [num_layers, hidden], of the last norm [1, hidden].

    norms: the base's own weights in these shapes. An adapter's vectors are 14 MB at Llama-3.1-8B's shape.
    """

    lora: LoRALayout
    norms: Mapping[str, Tensor]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The parts in their order."""
        shapes = {}
        for group in self.lora.groups:
            for part in ("scale", "bias"):
                shapes[f"{group.name}.{part}"] = (self.lora.num_layers, group.out_total)
            for part in _MARKS:
                shapes[f"{group.name}.{part}"] = (self.lora.num_layers, len(group.linears))
        shapes[INPUTS] = (self.lora.num_layers, self.lora.group("down").in_features)
        return shapes | {norm: (self.norms[norm].shape[0], self.norms[norm].shape[1]) for norm in NORMS}

    @property
    def size(self) -> int:
        """Numbers in a row."""
        return sum(layers * width for layers, width in self.shapes.values())

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.size * torch.float32.itemsize

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """A row, fp32 [size], as its parts: views."""
        parts = row.split_with_sizes([layers * width for layers, width in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    @cached_property
    def neutral(self) -> Tensor:
        """The row that changes nothing: fp32 [size] on the CPU."""
        row = torch.zeros(self.size)
        for name, part in self.split(row).items():
            if name in self.norms:
                part.copy_(self.norms[name])
            elif name == INPUTS or name.endswith(".scale"):
                part.fill_(1.0)
        return row

    def fill(self, row: Tensor, weights: AdapterWeights) -> None:
        """Write an adapter's vectors, which fit the base, into a row, whatever it held before."""
        row.copy_(self.neutral)
        parts = self.split(row)
        for (layer, module, role), vector in weights.vectors.items():
            if role == "norm":
                parts[module][layer] = vector
            elif role == "in_scale":
                parts[INPUTS][layer] = vector
            else:
                self._fill_outputs(parts, layer, module, role, vector)

    def _fill_outputs(self, parts: dict[str, Tensor], layer: int, linear: str, role: str, vector: Tensor) -> None:
        group = group_of(self.lora, linear)
        columns = group.columns(linear)
        if role in _MARKS:
            parts[f"{group.name}.{role}"][layer, group.linears.index(linear)] = 1.0
        if role in ("out_scale", "magnitude"):
            parts[f"{group.name}.scale"][layer, columns] = vector
        else:
            parts[f"{group.name}.bias"][layer, columns] += vector


def group_of(layout: LoRALayout, linear: str) -> LoRAGroup:
    """The group that a linear is in."""
    return next(group for group in layout.groups if linear in group.linears)


def check_vectors(weights: AdapterWeights, layout: LoRALayout) -> None:
    """Raises ValueError when a vector does not fit the base of this layout."""
    for (layer, module, role), vector in weights.vectors.items():
        width = _width(layout, module, role)
        if not 0 <= layer < layout.num_layers or vector.shape != (width,):
            raise ValueError(f"the base has no {role} of {tuple(vector.shape)} for {module} in layer {layer}")


def _width(layout: LoRALayout, module: str, role: str) -> int:
    if module in NORMS:
        return layout.group("qkv").in_features
    group = group_of(layout, module)
    return group.in_features if role == "in_scale" else group.widths[group.linears.index(module)]
