"""A stored adapter's tensors, as they were uploaded."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from adapters_store.base_spec import (
    BOTTLENECK_TENSORS,
    LOHA_A,
    LOHA_B,
    MISS_BLOCK,
    VERA_A,
    VERA_B,
    VERA_LAMBDA_B,
    VERA_LAMBDA_D,
    bottleneck_tensor_name,
    factors_name,
    lora_tensor_name,
    tensor_name,
)
from adapters_store.errors import AdapterLoadFailed
from adapters_store.kronecker import KroneckerProduct
from adapters_store.manifest import (
    ADAPTER_METADATA_KEY,
    PROMPT_TENSOR,
    AdapterSpec,
    Bottleneck,
    BottleneckActivation,
    BottleneckReads,
    BottleneckSite,
    EmbeddingModule,
    LoRADelta,
    TokenRows,
    VectorRole,
    VectorSite,
    VirtualTokens,
)
from adapters_store.tensor_train import factor_names

Pair = tuple[torch.Tensor, torch.Tensor]


class BottleneckTensors(NamedTuple):
    """One bottleneck adapter: down [size, hidden], up [hidden, size], biases [size] and [hidden]; up with its scale."""

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor


@dataclass(frozen=True)
class BottleneckWeights:
    """Bottleneck adapters by (layer, site), alike in what they read and in their activation."""

    reads: BottleneckReads
    activation: BottleneckActivation
    tensors: Mapping[tuple[int, BottleneckSite], BottleneckTensors]


class TokenTable(NamedTuple):
    """Rows of its own for tokens in `modules`: ids int64 [n], ascending, and rows [n, hidden] as uploaded."""

    modules: tuple[EmbeddingModule, ...]
    ids: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class AdapterWeights:
    """LoRA matrices by (layer, linear): A [r, in] and B [out, r] with the LoRA scale already in B; and vectors.

    rank: the largest r, 0 where there are none. vectors: fp32 [width] by (layer, module, role), the last norm's of
    layer 0. virtual_tokens: what comes before every prompt, as uploaded: input embeddings [num_tokens, hidden], or keys
    and values [num_tokens, 2 * num_layers, kv_width], a layer's keys before its values. Tensors are on the CPU: A as
    uploaded (fp32, bf16 or fp16), B too or in fp32 (`fold_scale`). token_tables: no module is in two of them.
    """

    rank: int
    tensors: Mapping[tuple[int, str], Pair]
    vectors: Mapping[tuple[int, str, VectorRole], torch.Tensor] = field(default_factory=dict)
    virtual_tokens: torch.Tensor | None = None
    token_tables: tuple[TokenTable, ...] = ()
    bottleneck: BottleneckWeights | None = None

    @property
    def raw(self) -> frozenset[VectorRole]:
        """The roles among the vectors that only the base turns into scales and biases."""
        return frozenset(role for _, _, role in self.vectors if role in ("magnitude", "own_bias"))


def load_weights(path: Path) -> AdapterWeights:
    """Read a stored blob, whose own header says ranks and scales. Raises `AdapterLoadFailed`."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            spec = AdapterSpec.model_validate_json((file.metadata() or {})[ADAPTER_METADATA_KEY])
            read_pairs = _READERS.get(spec.kind, _read_lora)
            vectors = {
                (layer, site.module, site.role): _read_vector(file, layer, site)
                for site in spec.vectors
                for layer in site.layers
            }
            virtual = _read_virtual(file, spec.virtual_tokens) if spec.virtual_tokens is not None else None
            tables = tuple(_read_table(file, rows) for rows in spec.token_rows)
            bottleneck = _read_bottleneck(file, spec.bottleneck) if spec.bottleneck is not None else None
            pairs = dict(read_pairs(file, spec.deltas))
            return AdapterWeights(spec.rank, pairs, vectors, virtual, tables, bottleneck)
    except (OSError, SafetensorError, KeyError, ValidationError) as error:
        raise AdapterLoadFailed(path.name, f"its stored file cannot be read ({error})") from error


def _read_lora(file: Any, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
    for layer, delta in _by_layer(deltas):
        a: torch.Tensor = file.get_tensor(lora_tensor_name(layer, delta.linear, "A"))
        b: torch.Tensor = file.get_tensor(lora_tensor_name(layer, delta.linear, "B"))
        yield (layer, delta.linear), (a, fold_scale(b, delta.scale))


def _read_adalora(file: Any, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
    """As plain LoRA: diag(E) A and B, where anything is left of them."""
    for layer, delta in _by_layer(delta for delta in deltas if delta.rank):
        a, e, b = (file.get_tensor(tensor_name(layer, delta.linear, f"lora_{name}")) for name in "AEB")
        yield (layer, delta.linear), (e.float() * a.float(), fold_scale(b, delta.scale))


def _read_vera(file: Any, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
    """As plain LoRA: diag(lambda_d) A and diag(lambda_b) B, of A and B the part that the linear's widths need."""
    a, b = (file.get_tensor(name).float() for name in (VERA_A, VERA_B))
    for layer, delta in _by_layer(deltas):
        of_b, of_d = (
            file.get_tensor(tensor_name(layer, delta.linear, name)).float().unsqueeze(1)
            for name in (VERA_LAMBDA_B, VERA_LAMBDA_D)
        )
        yield (layer, delta.linear), (of_d * a[:, : delta.in_features], of_b * b[: len(of_b)])


def _read_loha(file: Any, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
    """As plain LoRA: (P Q) * (R S) is the sum over i and j of the columns P_i * R_j times the rows Q_i * S_j."""
    for layer, delta in _by_layer(deltas):
        rows, columns = (
            [file.get_tensor(tensor_name(layer, delta.linear, name)).float() for name in names]
            for names in (LOHA_A, LOHA_B)
        )
        a = (rows[0].unsqueeze(1) * rows[1].unsqueeze(0)).flatten(0, 1)
        b = (columns[0].unsqueeze(2) * columns[1].unsqueeze(1)).flatten(1, 2)
        yield (layer, delta.linear), (a, fold_scale(b, delta.scale))


def _read_lokr(file: Any, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
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


def _read_delora(file: Any, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
    """As plain LoRA: A with all that is diagonal, of which the norms are those of A's rows and B's columns."""
    for layer, delta in _by_layer(deltas):
        a, b, strength, widths = (
            file.get_tensor(tensor_name(layer, delta.linear, f"delora_{name}"))
            for name in ("A", "B", "lambda", "w_norm")
        )
        of_a, of_b = (rows.double().norm(dim=1, keepdim=True).clamp_min(1e-4) for rows in (a, b.T))
        ranks = a.double() / of_a / of_b * (strength.double() / delta.rank) * widths.double()
        yield (layer, delta.linear), (ranks.float(), b)


def _read_miss(file: Any, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
    """As plain LoRA: A of zeros and ones adds up every r-th input."""
    for layer, delta in _by_layer(deltas):
        block: torch.Tensor = file.get_tensor(tensor_name(layer, delta.linear, MISS_BLOCK))
        assert delta.in_features is not None, "every delta of MiSS has it"
        sums = torch.eye(delta.rank, dtype=block.dtype).repeat(1, -(-delta.in_features // delta.rank))
        yield (layer, delta.linear), (sums[:, : delta.in_features], block.T)


def _read_loretta(file: Any, deltas: Iterable[LoRADelta]) -> Iterator[tuple[tuple[int, str], Pair]]:
    """As plain LoRA: a tensor train makes the transpose of A, and of B."""
    for layer, delta in _by_layer(deltas):
        a, b = (_read_train(file, factors_name(layer, delta.linear, matrix)) for matrix in ("lora_A", "lora_B"))
        a, b = a.view(-1, delta.rank).T.contiguous(), b.view(delta.rank, -1).T
        yield (layer, delta.linear), (a, fold_scale(b, delta.scale))


def _read_train(file: Any, factors: str) -> torch.Tensor:
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


def _by_layer(deltas: Iterable[LoRADelta]) -> Iterator[tuple[int, LoRADelta]]:
    return ((layer, delta) for delta in deltas for layer in delta.layers)


def _read_vector(file: Any, layer: int, site: VectorSite) -> torch.Tensor:
    vector: torch.Tensor = file.get_tensor(tensor_name(layer, site.module, site.tensor))
    return vector.float().flatten() * site.scale


def _read_virtual(file: Any, virtual: VirtualTokens) -> torch.Tensor:
    rows: torch.Tensor = file.get_tensor(PROMPT_TENSOR)
    return rows if virtual.num_layers is None else rows.view(len(rows), 2 * virtual.num_layers, -1)


def _read_table(file: Any, spec: TokenRows) -> TokenTable:
    rows: torch.Tensor = file.get_tensor(spec.tensor)
    if spec.ids is None:
        return TokenTable(spec.modules, torch.arange(len(rows)), rows)
    ids, order = torch.tensor(spec.ids).sort()
    return TokenTable(spec.modules, ids, rows[order])


def _read_bottleneck(file: Any, bottleneck: Bottleneck) -> BottleneckWeights:
    tensors = {}
    for size, layer in ((each.size, layer) for each in bottleneck.sizes for layer in each.layers):
        for site in bottleneck.sites:
            if bottleneck.name is None:
                down, down_bias, up, up_bias = _read_loretta_bottleneck(file, layer, size)
            else:
                down, down_bias, up, up_bias = (
                    file.get_tensor(bottleneck_tensor_name(layer, site, bottleneck.name, tensor))
                    for tensor in BOTTLENECK_TENSORS
                )
            up, up_bias = fold_scale(up, bottleneck.scale), fold_scale(up_bias, bottleneck.scale)
            tensors[layer, site] = BottleneckTensors(down, down_bias, up, up_bias)
    return BottleneckWeights(bottleneck.reads, bottleneck.activation, tensors)


def _read_loretta_bottleneck(file: Any, layer: int, size: int) -> Iterator[torch.Tensor]:
    """Each matrix and its bias: a tensor train makes the transpose of a matrix."""
    for matrix, shape in (("adapter_down", (-1, size)), ("adapter_up", (size, -1))):
        yield _read_train(file, factors_name(layer, "down_proj", matrix)).view(shape).T
        yield file.get_tensor(tensor_name(layer, "down_proj", f"{matrix}.layer.bias"))


def fold_scale(b: torch.Tensor, scale: float) -> torch.Tensor:
    """B [out, r] times `scale`, exactly: in B's dtype when the scale is a power of two, else in fp32."""
    if scale == 1.0:
        return b
    is_power_of_two = math.frexp(scale)[0] == 0.5
    return b * scale if is_power_of_two else b.float() * scale
