"""A stored adapter's tensors, as they were uploaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError

from adapters_store.base_spec import BOTTLENECK_TENSORS, bottleneck_tensor_name, factors_name, tensor_name
from adapters_store.errors import AdapterInvalid, AdapterLoadFailed
from adapters_store.manifest import (
    ADAPTER_METADATA_KEY,
    LORETTA_LINEARS,
    PROMPT_TENSOR,
    AdapterSpec,
    Bottleneck,
    BottleneckActivation,
    BottleneckReads,
    BottleneckSite,
    EmbeddingModule,
    TokenRows,
    VectorRole,
    VectorSite,
    VirtualTokens,
)
from adapters_store.plain_lora import Pair, fold_scale, read_pairs, read_train
from adapters_store.tensor_file import ReadMemory, TensorFile


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


def load_weights(path: Path, memory: ReadMemory | None = None) -> AdapterWeights:
    """Read a stored blob, whose own header says ranks and scales. Raises `AdapterLoadFailed`.

    memory: where the file is read to; the weights are good until the thread reads the next one into it.
    """
    try:
        file = TensorFile(path, memory)
        spec = AdapterSpec.model_validate_json(file.metadata()[ADAPTER_METADATA_KEY])
        vectors = {
            (layer, site.module, site.role): _read_vector(file, layer, site)
            for site in spec.vectors
            for layer in site.layers
        }
        virtual = _read_virtual(file, spec.virtual_tokens) if spec.virtual_tokens is not None else None
        tables = tuple(_read_table(file, rows) for rows in spec.token_rows)
        bottleneck = _read_bottleneck(file, spec.bottleneck) if spec.bottleneck is not None else None
        return AdapterWeights(spec.rank, dict(read_pairs(file, spec)), vectors, virtual, tables, bottleneck)
    except (OSError, AdapterInvalid, KeyError, ValidationError) as error:
        raise AdapterLoadFailed(path.name, f"its stored file cannot be read ({error})") from error


def _read_vector(file: TensorFile, layer: int, site: VectorSite) -> torch.Tensor:
    vector = file.get_tensor(tensor_name(layer, site.module, site.tensor))
    return vector.float().flatten() * site.scale


def _read_virtual(file: TensorFile, virtual: VirtualTokens) -> torch.Tensor:
    rows = file.get_tensor(PROMPT_TENSOR)
    return rows if virtual.num_layers is None else rows.view(len(rows), 2 * virtual.num_layers, -1)


def _read_table(file: TensorFile, spec: TokenRows) -> TokenTable:
    rows = file.get_tensor(spec.tensor)
    if spec.ids is None:
        return TokenTable(spec.modules, torch.arange(len(rows)), rows)
    ids, order = torch.tensor(spec.ids).sort()
    return TokenTable(spec.modules, ids, rows[order])


def _read_bottleneck(file: TensorFile, bottleneck: Bottleneck) -> BottleneckWeights:
    tensors = {}
    for layer, site, size in bottleneck.places:
        if bottleneck.name is None:
            down, down_bias, up, up_bias = _read_loretta_bottleneck(file, layer, site, size)
        else:
            down, down_bias, up, up_bias = (
                file.get_tensor(bottleneck_tensor_name(layer, site, bottleneck.name, tensor))
                for tensor in BOTTLENECK_TENSORS
            )
        up, up_bias = fold_scale(up, bottleneck.scale), fold_scale(up_bias, bottleneck.scale)
        tensors[layer, site] = BottleneckTensors(down, down_bias, up, up_bias)
    return BottleneckWeights(bottleneck.reads, bottleneck.activation, tensors)


def _read_loretta_bottleneck(file: TensorFile, layer: int, site: BottleneckSite, size: int) -> Iterator[torch.Tensor]:
    """Each matrix and its bias: a tensor train makes the transpose of a matrix."""
    linear = LORETTA_LINEARS[site]
    for matrix, shape in (("adapter_down", (-1, size)), ("adapter_up", (size, -1))):
        yield read_train(file, factors_name(layer, linear, matrix)).view(shape).T
        yield file.get_tensor(tensor_name(layer, linear, f"{matrix}.layer.bias"))
