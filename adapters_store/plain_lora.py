"""Every additive kind as plain LoRA: what its tensors are contracted to when it is loaded."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Final

import torch

from adapters_store.base_spec import (
    LOHA_A,
    LOHA_B,
    MISS_BLOCK,
    VERA_A,
    VERA_B,
    VERA_LAMBDA_B,
    VERA_LAMBDA_D,
    factors_name,
    lora_tensor_name,
    tensor_name,
)
from adapters_store.kronecker import KroneckerProduct
from adapters_store.manifest import AdapterSpec, LoRADelta
from adapters_store.tensor_file import TensorFile
from adapters_store.tensor_train import factor_names

Pair = tuple[torch.Tensor, torch.Tensor]
"""A [r, in], and B [out, r] with the scale in it."""


def read_pairs(file: TensorFile, spec: AdapterSpec) -> Iterator[tuple[tuple[int, str], Pair]]:
    """The pairs of an open safetensors file by (layer, linear), on the CPU: A as uploaded, B too or in fp32."""
    return _READERS.get(spec.kind, _read_lora)(file, spec.deltas)


def _read_lora(file: TensorFile, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
    for layer, delta in _by_layer(deltas):
        a = file.get_tensor(lora_tensor_name(layer, delta.linear, "A"))
        b = file.get_tensor(lora_tensor_name(layer, delta.linear, "B"))
        yield (layer, delta.linear), (a, fold_scale(b, delta.scale))


def _read_adalora(file: TensorFile, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
    """As plain LoRA: diag(E) A and B, where anything is left of them."""
    for layer, delta in _by_layer(delta for delta in deltas if delta.rank):
        a, e, b = (file.get_tensor(tensor_name(layer, delta.linear, f"lora_{name}")) for name in "AEB")
        yield (layer, delta.linear), (e.float() * a.float(), fold_scale(b, delta.scale))


def _read_vera(file: TensorFile, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
    """As plain LoRA: diag(lambda_d) A and diag(lambda_b) B, of A and B the part that the linear's widths need."""
    a, b = (file.get_tensor(name).float() for name in (VERA_A, VERA_B))
    for layer, delta in _by_layer(deltas):
        of_b, of_d = (
            file.get_tensor(tensor_name(layer, delta.linear, name)).float().unsqueeze(1)
            for name in (VERA_LAMBDA_B, VERA_LAMBDA_D)
        )
        yield (layer, delta.linear), (of_d * a[:, : delta.in_features], of_b * b[: len(of_b)])


def _read_loha(file: TensorFile, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
    """As plain LoRA: (P Q) * (R S) is the sum over i and j of the columns P_i * R_j times the rows Q_i * S_j."""
    for layer, delta in _by_layer(deltas):
        rows, columns = (
            [file.get_tensor(tensor_name(layer, delta.linear, name)).float() for name in names]
            for names in (LOHA_A, LOHA_B)
        )
        a = (rows[0].unsqueeze(1) * rows[1].unsqueeze(0)).flatten(0, 1)
        b = (columns[0].unsqueeze(2) * columns[1].unsqueeze(1)).flatten(1, 2)
        yield (layer, delta.linear), (a, fold_scale(b, delta.scale))


def _read_lokr(file: TensorFile, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
    """As plain LoRA: all singular triplets of the product, or the largest, as many as the spec says.

    Each rank of a tensor-parallel engine does it for itself and serves its own rows or columns of B A, whatever the
    others' A and B are.
    """
    names = set(file.keys())
    for layer, delta in _by_layer(deltas):
        product = KroneckerProduct.read(lambda name: file.get_tensor(name).double().numpy(), names, layer, delta)
        a, b = product.pair(delta.rank)
        b *= delta.scale
        yield (layer, delta.linear), (torch.from_numpy(a.astype("f4")), torch.from_numpy(b.astype("f4")))


def _read_delora(file: TensorFile, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
    """As plain LoRA: A with all that is diagonal, of which the norms are those of A's rows and B's columns."""
    for layer, delta in _by_layer(deltas):
        a, b, strength, widths = (
            file.get_tensor(tensor_name(layer, delta.linear, f"delora_{name}"))
            for name in ("A", "B", "lambda", "w_norm")
        )
        of_a, of_b = (rows.double().norm(dim=1, keepdim=True).clamp_min(1e-4) for rows in (a, b.T))
        ranks = a.double() / of_a / of_b * (strength.double() / delta.rank) * widths.double()
        yield (layer, delta.linear), (ranks.float(), b)


def _read_miss(file: TensorFile, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
    """As plain LoRA, where B A repeats the block over inputs and outputs: its smaller side is the rank.

    The other matrix is of zeros and ones: A adds up every r-th input, or B gives every `mini_r`-th output the same.
    """
    for layer, delta in _by_layer(deltas):
        block = file.get_tensor(tensor_name(layer, delta.linear, MISS_BLOCK))
        in_features, out_features = delta.in_features, delta.out_features or block.shape[1]
        assert in_features is not None, "every delta of MiSS has it"
        ones = torch.eye(delta.rank, dtype=block.dtype)
        if delta.rank == len(block):
            yield (layer, delta.linear), (_repeated(ones, in_features), _repeated(block, out_features).T)
        else:
            yield (layer, delta.linear), (_repeated(block.T, in_features), _repeated(ones, out_features).T)


def _read_loretta(file: TensorFile, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
    """As plain LoRA: a tensor train makes the transpose of A, and of B."""
    for layer, delta in _by_layer(deltas):
        a, b = (read_train(file, factors_name(layer, delta.linear, matrix)) for matrix in ("lora_A", "lora_B"))
        a, b = a.view(-1, delta.rank).T.contiguous(), b.view(delta.rank, -1).T
        yield (layer, delta.linear), (a, fold_scale(b, delta.scale))


def read_train(file: TensorFile, factors: str) -> torch.Tensor:
    """The matrix that a tensor train makes, fp32, flat."""
    parts = [file.get_tensor(name).float() for name in factor_names(factors, frozenset(file.keys()))]
    whole: torch.Tensor = functools.reduce(lambda left, right: torch.tensordot(left, right, dims=1), parts)
    return whole.flatten()


_READERS: Final = {
    "ADALORA": _read_adalora,
    "DELORA": _read_delora,
    "LOHA": _read_loha,
    "LOKR": _read_lokr,
    "LORETTA_REP": _read_loretta,
    "MISS": _read_miss,
    "VERA": _read_vera,
}


def _repeated(columns: torch.Tensor, num_columns: int) -> torch.Tensor:
    """So many columns: these, again and again."""
    return columns.repeat(1, -(-num_columns // columns.shape[1]))[:, :num_columns]


def _by_layer(deltas: Iterable[LoRADelta]) -> Iterator[tuple[int, LoRADelta]]:
    return ((layer, delta) for delta in deltas for layer in delta.layers)


def fold_scale(b: torch.Tensor, scale: float) -> torch.Tensor:
    """B [out, r] times `scale`, exactly: in B's dtype when the scale is a power of two, else in fp32."""
    if scale == 1.0:
        return b
    is_power_of_two = math.frexp(scale)[0] == 0.5
    return b * scale if is_power_of_two else b.float() * scale
