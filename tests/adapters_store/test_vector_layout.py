"""A row of vectors: what changes nothing, and where each vector goes."""

from __future__ import annotations

import pytest
import torch

from adapters_store.manifest import VectorRole
from adapters_store.vector_layout import VectorLayout, check_vectors
from adapters_store.weights import AdapterWeights

from .random_adapters import BASE_NORMS, LAYOUT, VECTORS


def filled(vectors: dict[tuple[int, str, VectorRole], torch.Tensor]) -> dict[str, torch.Tensor]:
    row = torch.full((VECTORS.size,), 7.0)
    VECTORS.fill(row, AdapterWeights(0, {}, vectors))
    return VECTORS.split(row)


def test_without_vectors_a_row_is_ones_zeros_and_the_base_s_norms() -> None:
    for name, part in filled({}).items():
        if name in BASE_NORMS:
            assert torch.equal(part, BASE_NORMS[name])
        else:
            assert part.unique().tolist() == [1.0 if name.endswith(("scale", "inputs")) else 0.0], name


@pytest.mark.parametrize(
    ("key", "part", "columns"),
    [
        ((1, "k_proj", "out_scale"), "qkv.scale", slice(10, 16)),
        ((0, "up_proj", "out_scale"), "gate_up.scale", slice(20, 42)),
        ((1, "v_proj", "bias"), "qkv.bias", slice(16, 24)),
        ((1, "down_proj", "in_scale"), "down.inputs", slice(0, 20)),
        ((1, "post_attention_layernorm", "norm"), "post_attention_layernorm", slice(0, 12)),
        ((0, "norm", "norm"), "norm", slice(0, 12)),
    ],
)
def test_a_vector_is_where_it_acts_and_nowhere_else(
    key: tuple[int, str, VectorRole], part: str, columns: slice
) -> None:
    vector = torch.randn(columns.stop - columns.start)
    parts, neutral = filled({key: vector}), filled({})
    assert torch.equal(parts[part][key[0], columns], vector)
    parts[part][key[0], columns] = neutral[part][key[0], columns]
    assert all(torch.equal(parts[name], neutral[name]) for name in parts)


def test_biases_of_one_linear_add_up_and_the_own_one_is_marked() -> None:
    added, own = torch.randn(2, 10)
    parts = filled({(0, "q_proj", "bias"): added, (0, "q_proj", "own_bias"): own})
    assert torch.equal(parts["qkv.bias"][0, :10], added + own)
    assert parts["qkv.own_bias"].tolist() == [[1, 0, 0], [0, 0, 0]]


def test_a_magnitude_stands_in_the_scale_s_place_and_is_marked() -> None:
    parts = filled({(1, "up_proj", "magnitude"): torch.full((22,), 3.0)})
    assert parts["gate_up.scale"][1].unique().tolist() == [1.0, 3.0]
    assert parts["gate_up.magnitude"].tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("key", [(2, "k_proj", "bias"), (0, "v_proj", "bias"), (0, "k_proj", "in_scale")])
def test_a_vector_that_does_not_fit_the_base_is_refused(key: tuple[int, str, VectorRole]) -> None:
    with pytest.raises(ValueError, match=key[1]):
        check_vectors(AdapterWeights(0, {}, {key: torch.zeros(6)}), LAYOUT)


def test_a_row_at_8b_s_shape_is_14_mb() -> None:
    linears = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
               "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}  # fmt: skip
    norms = {name: torch.empty(norm.shape[0] * 16, 4096) for name, norm in BASE_NORMS.items() if name != "norm"}
    layout = VectorLayout(LAYOUT.from_linears(linears, 32), norms | {"norm": torch.empty(1, 4096)})
    assert layout.row_bytes == pytest.approx(13.9e6, rel=0.01)
