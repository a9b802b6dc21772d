"""Rows of vectors on the serving device, for those adapters that have any."""

from __future__ import annotations

import torch
from torch import Tensor

from adapters_store.manifest import VectorRole
from adapters_store.vector_layout import INPUTS, VectorLayout
from lora_kernels.vectors import SlotVectors


class VectorSlots:
    """Who holds which row, and the pools themselves: each part of a row as [num_layers, num_rows, width], fp32.

    One thread only. fp32, since a scale near 1 in bf16 is off by up to 0.4 % in the same direction for every token;
    a step reads few of these bytes beside those of low ranks.
    """

    def __init__(self, layout: VectorLayout, num_rows: int, device: torch.device | str) -> None:
        self.layout = layout
        self.num_rows = num_rows
        self.pools = {
            name: torch.zeros(layers, num_rows, width, device=device) for name, (layers, width) in layout.shapes.items()
        }
        self._free = list(reversed(range(num_rows)))
        self._rows: dict[int, int] = {}  # by adapter slot
        self.raw: dict[int, frozenset[VectorRole]] = {}
        """Adapter slots whose row holds what only the base turns into scales and biases; who has the base, does so."""

    @property
    def num_free(self) -> int:
        """Rows that no adapter has."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Adapters that have a row."""
        return len(self._rows)

    def row(self, slot: int) -> int:
        """The row of the adapter in a slot, -1 where it has none."""
        return self._rows.get(slot, -1)

    def take(self, slot: int, raw: frozenset[VectorRole]) -> int:
        """Give a free row to the adapter in a slot."""
        row = self._rows[slot] = self._free.pop()
        if raw:
            self.raw[slot] = raw
        return row

    def free(self, slot: int) -> None:
        """Give back the row of the adapter in a slot, if it has one."""
        self.raw.pop(slot, None)
        if slot in self._rows:
            self._free.append(self._rows.pop(slot))

    def outputs(self, layer: int, group: str, token_rows: Tensor) -> SlotVectors:
        """What scales and shifts a group's outputs."""
        return SlotVectors(token_rows, self.pools[f"{group}.scale"][layer], self.pools[f"{group}.bias"][layer])

    def inputs(self, layer: int, token_rows: Tensor) -> SlotVectors:
        """What scales the inputs of down_proj."""
        return SlotVectors(token_rows, self.pools[INPUTS][layer])

    def norm(self, layer: int, norm: str, token_rows: Tensor) -> SlotVectors:
        """What stands for a norm's weight."""
        return SlotVectors(token_rows, self.pools[norm][layer])

    def check_integrity(self) -> None:
        """Assert that every row is either free or held, exactly once."""
        assert sorted([*self._free, *self._rows.values()]) == list(range(self.num_rows)), "rows are lost or held twice"
        assert self.raw.keys() <= self._rows.keys()
