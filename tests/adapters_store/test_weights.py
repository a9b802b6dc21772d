"""Weights read back from a stored blob are peft's deltas, scale and all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from adapters_store.base_spec import BaseSpec, module_path
from adapters_store.errors import AdapterLoadFailed
from adapters_store.manifest import ADAPTER_METADATA_KEY
from adapters_store.upload import Staging
from adapters_store.weights import load_weights

from .conftest import save_adapter, stage, tiny_model


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 3},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ],
)
def test_deltas_are_those_of_peft(staging: Staging, tmp_path: Path, base: BaseSpec, options: dict[str, Any]) -> None:
    folder = save_adapter(tmp_path / "adapter", **options)
    weights = load_weights(stage(staging, folder, base).path)
    reference = PeftModel.from_pretrained(tiny_model(), folder)
    layers = {name: module for name, module in reference.named_modules() if isinstance(module, LoraLayer)}
    assert {f"base_model.model.{module_path(*key)}" for key in weights.tensors} == set(layers)
    for key, (a, b) in weights.tensors.items():
        expected = layers[f"base_model.model.{module_path(*key)}"].get_delta_weight("default")
        torch.testing.assert_close(b @ a, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(staging: Staging, tmp_path: Path, base: BaseSpec, dtype: torch.dtype) -> None:
    folder = save_adapter(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    weights = load_weights(stage(staging, folder, base).path)
    assert {tensor.dtype for pair in weights.tensors.values() for tensor in pair} == {dtype}
    assert weights.rank == 4
    assert sum(tensor.nbytes for pair in weights.tensors.values() for tensor in pair) == 896 * dtype.itemsize


def test_the_stored_file_alone_serves_again_as_a_peft_adapter(
    staging: Staging, adapter: Path, base: BaseSpec, tmp_path: Path
) -> None:
    original = load_file(adapter / "adapter_model.safetensors")
    stored = load_file(stage(staging, adapter, base).path)
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in stored)


def test_a_file_without_our_header_fails_to_load(adapter: Path) -> None:
    with pytest.raises(AdapterLoadFailed):
        load_weights(adapter / "adapter_model.safetensors")


def test_a_file_that_lacks_a_tensor_fails_to_load(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    staged = stage(staging, adapter, base)
    tensors = load_file(staged.path)
    tensors.popitem()
    text = staged.manifest.model_dump_json(include={"format", "kind", "base_fingerprint", "deltas"})
    save_file(tensors, staged.path, metadata={ADAPTER_METADATA_KEY: text})
    with pytest.raises(AdapterLoadFailed):
        load_weights(staged.path)


def test_a_truncated_file_fails_to_load(staging: Staging, adapter: Path, base: BaseSpec, tmp_path: Path) -> None:
    path = shutil.copy(stage(staging, adapter, base).path, tmp_path / "copy")
    Path(path).write_bytes(Path(path).read_bytes()[:-1])
    with pytest.raises(AdapterLoadFailed):
        load_weights(Path(path))
