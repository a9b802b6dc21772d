"""An adapter in host memory as the pools of the device need it: a page is one run of bytes, copied as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from adapters_store.slots import LoRAGroup, LoRALayout, PagePools
from adapters_store.weights import AdapterWeights
from lora_kernels.segments import PAGE_RANK

_LARGEST_FP16: Final = 65504.0


@dataclass(frozen=True, eq=False)
class PageImage:
    """An adapter of `rank`, a page of 16 ranks after the other: each uint8 [page_bytes], as `LoRALayout.split` says."""

    rank: int
    pages: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(page.nbytes for page in self.pages)


def check_weights(weights: AdapterWeights, layout: LoRALayout, dtype: torch.dtype) -> None:
    """Raises ValueError when a matrix does not fit the layout, or B does not fit float16 pages."""
    shapes = {name: (width, group.in_features) for group in layout.groups for name, width in _widths(group).items()}
    for (layer, linear), (a, b) in weights.tensors.items():
        if not 0 <= layer < layout.num_layers or linear not in shapes:
            raise ValueError(f"the base has no {linear} in layer {layer}")
        out_features, in_features = shapes[linear]
        rank = a.shape[0]
        if rank > weights.rank or a.shape != (rank, in_features) or b.shape != (out_features, rank):
            raise ValueError(
                f"{linear} of layer {layer} has A {tuple(a.shape)} and B {tuple(b.shape)}; the base needs"
                f" [r, {in_features}] and [{out_features}, r] with r <= {weights.rank}"
            )
        # Kernels multiply B by the zeros of other rows too. A stored adapter fits bfloat16 (validator.py).
        if dtype == torch.float16 and b.abs().max() > _LARGEST_FP16:
            raise ValueError(f"B of {linear} in layer {layer} is infinite in float16, the engine's dtype")


def fill_pages(pages: tuple[Tensor, ...], weights: AdapterWeights, layout: LoRALayout, dtype: torch.dtype) -> None:
    """Write checked weights into the pages of an image, uint8 [page_bytes] each, whatever they held before.

    A page has 16 rows of A and of B^T of every linear, zeros beyond the adapter's rank and where it has no matrices.
    In int8 each rank of each has a scale of its own.
    """
    for index, page in enumerate(pages):
        page.zero_()
        rows = slice(index * PAGE_RANK, (index + 1) * PAGE_RANK)
        for group, arrays in zip(layout.groups, layout.split(page, dtype), strict=True):
            for layer in range(layout.num_layers):
                for linear in group.linears:
                    if (pair := weights.tensors.get((layer, linear))) is not None:
                        _write(arrays, layer, group, linear, pair[0][rows], pair[1][:, rows].T)


def _write(arrays: PagePools, layer: int, group: LoRAGroup, linear: str, a: Tensor, b: Tensor) -> None:
    """The rows a [r, in] and b [r, out] of one linear into a page of all layers."""
    index, ranks = group.linears.index(linear), len(a)
    to_a, to_b = arrays.a[layer, index, :ranks], arrays.b[layer, :ranks, group.columns(linear)]
    if arrays.a_scales is None or arrays.b_scales is None:
        to_a.copy_(a)
        to_b.copy_(b)
    else:
        _write_int8(a, to_a, arrays.a_scales[layer, index, :ranks])
        _write_int8(b, to_b, arrays.b_scales[layer, index, :ranks])


def _write_int8(rows: Tensor, to_rows: Tensor, to_scales: Tensor) -> None:
    """[r, n] -> int8 [r, n] and fp32 scales [r], symmetric."""
    rows = rows.float()
    torch.div(rows.abs().amax(-1), 127, out=to_scales)
    to_rows.copy_(torch.round(rows / to_scales.clamp_min(1e-30)[:, None]))


def _widths(group: LoRAGroup) -> dict[str, int]:
    return dict(zip(group.linears, group.widths, strict=True))
