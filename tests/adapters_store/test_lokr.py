"""LoKr: peft's deltas exactly where the ranks are allowed, else their best approximation, whose error is stated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoKrConfig as PeftLoKrConfig
from peft import PeftModel
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lokr.layer import factorization
from safetensors.torch import load_file, save_file

from adapters_store.base_spec import BaseSpec, module_path
from adapters_store.errors import AdapterInvalid
from adapters_store.kronecker import Factor, KroneckerProduct
from adapters_store.lokr_config import LoKrConfig
from adapters_store.upload import StagedAdapter, Staging, UploadLimits
from adapters_store.weights import load_weights

from .conftest import save_kind, stage, tiny_model
from .test_export import export, logits

TARGETS = ["q_proj", "v_proj", "down_proj"]


def save_lokr(folder: Path, **options: Any) -> Path:
    return save_kind(folder, PeftLoKrConfig(**{"r": 8, "alpha": 6, "target_modules": TARGETS, **options}))


def dense_deltas(folder: Path) -> dict[str, torch.Tensor]:
    """By module path, as peft makes them."""
    model = PeftModel.from_pretrained(tiny_model(), folder)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoKrLayer)}
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for name, layer in layers.items()
    }


def stage_roughly(folder: Path, base: BaseSpec, root: Path, **options: Any) -> StagedAdapter:
    """Staged whatever the error; its folder is left to pytest."""
    return stage(Staging(root, UploadLimits(max_import_error=0.999)), folder, base, **options)


def relative_errors(staged: StagedAdapter, dense: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of what is served, in the Frobenius norm."""
    served = {module_path(*key): b @ a for key, (a, b) in load_weights(staged.path).tensors.items()}
    assert served.keys() == dense.keys()
    return {path: float((served[path] - delta).norm() / delta.norm()) for path, delta in dense.items()}


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"r": 2}, 8),
        ({"r": 1, "decompose_both": True}, 1),
        ({"r": 3, "decompose_factor": 2}, 6),
        ({"r": 5, "decompose_factor": 4, "target_modules": ["k_proj"]}, 16),
        ({"r": 3, "decompose_factor": 3}, 6),
        ({"r": 2, "decompose_factor": 1}, 2),
        ({"r": 2, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 3, "down_proj": 0.5}}, 8),
    ],
    ids=str,
)
def test_ranks_that_are_allowed_are_served_exactly(
    staging: Staging, tmp_path: Path, base: BaseSpec, options: dict[str, Any], rank: int
) -> None:
    folder = save_lokr(tmp_path / "adapter", **options)
    staged = stage(staging, folder, base)
    assert (staged.manifest.rank, staged.manifest.import_error) == (rank, 0.0)
    assert max(relative_errors(staged, dense_deltas(folder)).values()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_ranks_are_cut_and_the_error_is_the_true_one_of_the_worst_linear(
    tmp_path: Path, base: BaseSpec, dtype: torch.dtype
) -> None:
    folder = save_lokr(tmp_path / "adapter", rank_pattern={"v_proj": 2})
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    staged = stage_roughly(folder, base, tmp_path / "staging", max_rank=9)
    assert {d.linear: (d.rank, d.exact_rank) for d in staged.manifest.deltas} == {
        "q_proj": (9, 32), "v_proj": (8, 8), "down_proj": (9, 32),
    }  # fmt: skip
    dense = dense_deltas(folder)
    errors = relative_errors(staged, dense)
    assert staged.manifest.import_error == pytest.approx(max(errors.values()), rel=1e-5)
    best = {name: torch.linalg.svdvals(delta) for name, delta in dense.items()}
    least = {name: float(values[9:].norm() / values.norm()) for name, values in best.items()}
    assert errors == pytest.approx(least, rel=1e-4, abs=1e-6)


def test_an_error_above_the_limit_is_refused_with_both_ranks_and_both_errors(
    staging: Staging, tmp_path: Path, base: BaseSpec
) -> None:
    folder = save_lokr(tmp_path / "adapter")
    with pytest.raises(AdapterInvalid) as caught:
        stage(staging, folder, base)
    values = torch.linalg.svdvals(dense_deltas(folder)["model.layers.0.self_attn.q_proj"])
    error = float(values[16:].norm() / values.norm())
    assert caught.value.field == "r"
    for part in ("layers.0.self_attn.q_proj", "rank 32", "limit is 16", f"{error:.2%}", "1.00%", "max_import_error"):
        assert part in caught.value.reason


def test_an_error_within_the_limit_is_served_and_stated(staging: Staging, tmp_path: Path, base: BaseSpec) -> None:
    folder = save_lokr(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    faint = torch.tensor([1.0, 0.5, 0.2, 0.1, 1e-3, 1e-3, 1e-4, 0.0])  # of w2's rows: what is beyond 4 is small
    tensors = load_file(path)
    edits = {name: tensor * faint[: len(tensor), None] for name, tensor in tensors.items() if name.endswith("w2")}
    save_file({**tensors, **edits}, path)
    staged = stage(staging, folder, base)
    assert 1e-4 < staged.manifest.import_error < 0.01
    assert staged.manifest.import_error == pytest.approx(max(relative_errors(staged, dense_deltas(folder)).values()))


def test_a_cut_adapter_is_exported_whole_and_has_its_digest_again(tmp_path: Path, base: BaseSpec) -> None:
    folder = save_lokr(tmp_path / "adapter")
    staged = stage_roughly(folder, base, tmp_path / "staging")
    exported = export(staged, base, tmp_path / "export")
    torch.testing.assert_close(logits(exported), logits(folder), rtol=1e-6, atol=1e-6)
    again = stage_roughly(exported, base, tmp_path / "staging")
    assert again.manifest.digest == staged.manifest.digest
    assert stage_roughly(exported, base, tmp_path / "staging", max_rank=8).manifest.digest != staged.manifest.digest


@pytest.mark.parametrize("max_rank", [16, 5])
def test_the_largest_numbers_that_are_accepted_make_finite_pairs(tmp_path: Path, base: BaseSpec, max_rank: int) -> None:
    folder = save_lokr(tmp_path / "adapter", r=2, alpha=1_000_000)
    path = folder / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, 1e6) for name, tensor in load_file(path).items()}, path)
    pairs = load_weights(stage_roughly(folder, base, tmp_path / "staging", max_rank=max_rank).path).tensors
    assert all(torch.isfinite(matrix).all() for pair in pairs.values() for matrix in pair)


@pytest.mark.parametrize("make", [Factor.whole, Factor.decomposed])
def test_a_product_of_more_ranks_than_its_sides_has_those_of_its_shorter_side(make: Callable[..., Factor]) -> None:
    random = np.random.default_rng(0)
    first, second = random.normal(size=(5, 3)), (random.normal(size=(2, 6)), random.normal(size=(6, 16)))
    a, b = KroneckerProduct(make(first), make(*second)).pair(6)
    assert (a.shape, b.shape) == ((6, 48), (10, 6))
    np.testing.assert_allclose(b @ a, np.kron(first, second[0] @ second[1]), atol=1e-12)


def test_a_delta_of_nothing_has_no_error(tmp_path: Path) -> None:
    product = KroneckerProduct(Factor.decomposed(np.zeros((3, 4))), Factor.decomposed(np.ones((5, 2))))
    a, b = product.pair(2)
    assert (product.error(2), a.shape, b.shape) == (0.0, (2, 8), (15, 2))
    assert not (b @ a).any()


@pytest.mark.parametrize("factor", [-1, 0, 1, 2, 3, 7, 8, 12, 13, 64, 200])
def test_widths_are_divided_as_peft_divides_them(factor: int) -> None:
    config = LoKrConfig(target_modules=["q_proj"], decompose_factor=factor)
    for width in (1, 2, 13, 32, 48, 96, 120, 127, 128, 1024, 4096, 14336):
        assert config._divisors(width) == factorization(width, factor)
