"""One rank's share of a decoder's linears (Megatron-LM, arXiv 1909.08053)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from adapters_store.base_spec import NORMS
from adapters_store.blobs import BlobStore
from adapters_store.host_cache import read_adapter
from adapters_store.lora_layout import LoRALayout
from adapters_store.page_image import check_weights
from adapters_store.weights import AdapterWeights

_INPUTS_SPLIT: Final = frozenset({"o_proj", "down_proj"})


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`: its outputs of q, k, v, gate and up, and its inputs of o and down.

    o and down read what the rank itself has computed, so that their results, and nothing before, are to be added up
    over the ranks. Widths are multiples of `size`.
    """

    rank: int = 0
    size: int = 1

    def part(self, tensor: Tensor, dim: int) -> Tensor:
        """The rank's share along a dimension: a view."""
        width = tensor.shape[dim] // self.size
        return tensor.narrow(dim, self.rank * width, width)

    def weight(self, linear: str, weight: Tensor) -> Tensor:
        """Of a matrix [out, in]; of [out, in / 64, ...] likewise, in blocks of NF4."""
        return self.part(weight, 1 if linear in _INPUTS_SPLIT else 0)

    def bias(self, linear: str, bias: Tensor) -> Tensor | None:
        """Of a bias [out]; one that follows the sum over ranks is added by the first."""
        if linear in _INPUTS_SPLIT:
            return bias if self.rank == 0 else None
        return self.part(bias, 0)

    def lora(self, weights: AdapterWeights) -> AdapterWeights:
        """Of an adapter, views: y_r = W_r x_r + B_r (A_r x_r), with B whole where inputs are split, and A elsewhere."""
        if self.size == 1:
            return weights
        tensors = {
            (layer, linear): (self.part(a, 1), b) if linear in _INPUTS_SPLIT else (a, self.part(b, 0))
            for (layer, linear), (a, b) in weights.tensors.items()
        }
        virtual = weights.virtual_tokens
        if virtual is not None and virtual.dim() == 3:  # keys and values, head by head; embeddings are whole
            virtual = self.part(virtual, 2)
        vectors = {key: self._vector(*key, vector) for key, vector in weights.vectors.items()}
        return replace(weights, tensors=tensors, vectors=vectors, virtual_tokens=virtual)

    def _vector(self, _: int, module: str, role: str, vector: Tensor) -> Tensor:
        """Whole where it acts on what the ranks have added up."""
        is_whole = module in NORMS or (module in _INPUTS_SPLIT and role != "in_scale")
        return vector if is_whole else self.part(vector, 0)


def read_share(blobs: BlobStore, digest: str, *, shard: Shard, whole: LoRALayout, dtype: torch.dtype) -> AdapterWeights:
    """The rank's share of a stored adapter, which is checked against the whole base's layout first.

    So every rank takes it or none: raises ValueError as `check_weights`, else as `read_adapter`. dtype: of the pages.
    """
    weights = read_adapter(blobs, digest)
    check_weights(weights, whole, dtype)
    return shard.lora(weights)
