"""An adapter in host memory as the pools of the device need it: a page is one run of bytes, copied as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from adapters_store.bottleneck_layout import BottleneckShape
from adapters_store.lora_layout import LoRAGroup, LoRALayout, PagePools, num_pages_for
from adapters_store.manifest import VectorRole
from adapters_store.vector_layout import check_vectors
from adapters_store.weights import AdapterWeights, TokenTable
from lora_kernels.segments import PAGE_RANK

_LARGEST_FP16: Final = 65504.0


@dataclass(frozen=True, eq=False)
class PageImage:
    """An adapter of `rank`, a page of 16 ranks after the other: each uint8 [page_bytes], as `LoRALayout.split` says.

    bottleneck: its shape, where it is of bottlenecks: `pages` are then theirs, as `BottleneckLayout.split` says, and
    rank is 0. vectors: its row, fp32 [size] as `VectorLayout` says, where it has any. raw: as in `VectorSlots.raw`.
    virtual_tokens, token_tables: as `AdapterWeights`.
    """

    rank: int
    pages: tuple[Tensor, ...]
    vectors: Tensor | None = None
    raw: frozenset[VectorRole] = frozenset()
    virtual_tokens: Tensor | None = None
    bottleneck: BottleneckShape | None = None
    token_tables: tuple[TokenTable, ...] = ()

    @property
    def num_pages(self) -> int:
        """Pages of ranks."""
        return len(self.pages) if self.bottleneck is None else 0

    @property
    def num_bottleneck_pages(self) -> int:
        """Pages of bottlenecks."""
        return len(self.pages) if self.bottleneck is not None else 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages and the vectors."""
        return sum(page.nbytes for page in self.pages) + (0 if self.vectors is None else self.vectors.nbytes)

    @property
    def num_own_bytes(self) -> int:
        """Bytes of what no page has room for: virtual tokens and rows of tokens."""
        virtual = 0 if self.virtual_tokens is None else self.virtual_tokens.nbytes
        return virtual + sum(table.rows.nbytes for table in self.token_tables)

    @property
    def num_token_rows(self) -> int:
        """Rows of its own for tokens."""
        return sum(len(table.ids) for table in self.token_tables)


def check_weights(weights: AdapterWeights, layout: LoRALayout, dtype: torch.dtype) -> None:
    """Raises ValueError when a part does not fit the layout, or B does not fit float16 pages."""
    check_vectors(weights, layout)
    _check_virtual_tokens(weights, layout)
    _check_token_tables(weights, layout)
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


def _check_virtual_tokens(weights: AdapterWeights, layout: LoRALayout) -> None:
    virtual, qkv = weights.virtual_tokens, layout.group("qkv")
    if virtual is None:
        return
    shapes = [(qkv.in_features,), (2 * layout.num_layers, _widths(qkv)["k_proj"])]
    if tuple(virtual.shape[1:]) not in shapes:
        raise ValueError(f"virtual tokens are {list(virtual.shape[1:])} each; the base needs {list(map(list, shapes))}")


def _check_token_tables(weights: AdapterWeights, layout: LoRALayout) -> None:
    hidden = layout.group("qkv").in_features
    for modules, ids, rows in weights.token_tables:
        if rows.shape != (len(ids), hidden):
            raise ValueError(f"rows of {' and '.join(modules)} are {list(rows.shape)}; the base needs [n, {hidden}]")


def fill_pages(pages: tuple[Tensor, ...], weights: AdapterWeights, layout: LoRALayout, dtype: torch.dtype) -> None:
    """Write checked weights into the pages of an image, uint8 [page_bytes] each, whatever they held before.

    A page has 16 rows of A and of B^T of every linear, zeros beyond the adapter's rank and where it has no matrices.
    In int8 each rank of each has a scale of its own. All layers of a linear are written at once: every operation gives
    Python's lock away, and beside a busy thread waits milliseconds to have it back.
    """
    arrays = [layout.split(page.zero_(), dtype) for page in pages]
    for place, group in enumerate(layout.groups):
        for linear in group.linears:
            for rank, layers in _layers_by_rank(weights, layout, linear).items():
                pairs = (weights.tensors[layer, linear] for layer in layers)
                a, b = map(torch.stack, zip(*pairs, strict=True))
                for index in range(num_pages_for(rank)):
                    rows = slice(index * PAGE_RANK, (index + 1) * PAGE_RANK)
                    _write(arrays[index][place], layers, group, linear, a[:, rows], b[:, :, rows].transpose(1, 2))


def _layers_by_rank(weights: AdapterWeights, layout: LoRALayout, linear: str) -> dict[int, list[int]]:
    """The layers that have matrices of a linear, those of one rank together."""
    layers: dict[int, list[int]] = {}
    for layer in range(layout.num_layers):
        if (pair := weights.tensors.get((layer, linear))) is not None:
            layers.setdefault(len(pair[0]), []).append(layer)
    return layers


def _write(arrays: PagePools, layers: list[int], group: LoRAGroup, linear: str, a: Tensor, b: Tensor) -> None:
    """The rows a [num_layers, r, in] and b [num_layers, r, out] of these layers of one linear into a page."""
    index, ranks, where = group.linears.index(linear), a.shape[1], torch.tensor(layers)
    to_a, to_b = arrays.a[:, index, :ranks], arrays.b[:, :ranks, group.columns(linear)]
    for rows, to_rows, scales in ((a, to_a, arrays.a_scales), (b, to_b, arrays.b_scales)):
        if scales is not None:
            rows, own = _in_int8(rows)
            scales[:, index, :ranks].index_copy_(0, where, own)
        to_rows.index_copy_(0, where, rows.to(to_rows.dtype))


def _in_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[..., r, n] -> whole numbers of int8's range in fp32 [..., r, n] and fp32 scales [..., r], symmetric."""
    rows = rows.float()
    scales = rows.abs().amax(-1) / 127
    return torch.round(rows / scales.clamp_min(1e-30)[..., None]), scales


def _widths(group: LoRAGroup) -> dict[str, int]:
    return dict(zip(group.linears, group.widths, strict=True))
