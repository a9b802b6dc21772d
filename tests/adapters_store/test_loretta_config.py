"""LoRETTA's two kinds of folders, made up here as the package `loretta` 0.1.0 writes them: read, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import AdapterLoadFailed
from adapters_store.manifest import ADAPTER_METADATA_KEY
from adapters_store.upload import Staging
from adapters_store.weights import load_weights
from tests.tiny import save_loretta_bottleneck

from .conftest import edit_config, refused_here, stage, stage_here
from .test_export import export

WEIGHTS = "adapter_model.safetensors"
V0 = "base_model.model.model.layers.0.self_attn.v_proj"
SHAPES = {"q_proj": ([4, 8, 4], [4, 8, 4]), "v_proj": ([4, 8, 4], [4, 4, 2, 2])}  # 32 x 4 and 4 x 32; 32 x 4 and 4 x 16
CONFIG = {
    "base_model_name_or_path": "/elsewhere", "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
    "inference_mode": True, "lora_alpha": 6, "lora_dropout": 0.1, "merge_weights": False, "modules_to_save": None,
    "peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "tensor_rank": 3,
}  # fmt: skip


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "loretta"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in (0, 1):
        for linear, sides in SHAPES.items():
            for side, sizes in zip("AB", sides, strict=True):
                ranks = [1, *[3] * (len(sizes) - 1), 1]
                for i, size in enumerate(sizes):
                    name = f"base_model.model.model.layers.{layer}.self_attn.{linear}.lora_{side}.layer.tensor.factors"
                    tensors[f"{name}.{i}"] = torch.randn(ranks[i], size, ranks[i + 1], generator=generator)
    save_file(tensors, folder / WEIGHTS)
    return folder


def edit_weights(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / WEIGHTS), name: tensor}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


def test_its_factors_become_matrices_when_it_is_loaded(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    staged = stage(staging, adapter, base)
    assert (staged.manifest.kind, staged.manifest.rank, staged.manifest.tensor_rank) == ("LORETTA_REP", 4, 3)
    files, weights = load_file(adapter / WEIGHTS), load_weights(staged.path)
    assert weights.tensors.keys() == {(layer, linear) for layer in (0, 1) for linear in SHAPES}
    a, b = weights.tensors[0, "v_proj"]
    down = [files[f"{V0}.lora_A.layer.tensor.factors.{i}"] for i in range(3)]
    up = [files[f"{V0}.lora_B.layer.tensor.factors.{i}"] for i in range(4)]
    wanted_a = torch.einsum("aib,bjc,ckd->ijk", *down).reshape(32, 4)
    wanted_b = torch.einsum("aib,bjc,ckd,dle->ijkl", *up).reshape(4, 16)
    torch.testing.assert_close(a, wanted_a.T)
    torch.testing.assert_close(b, 1.5 * wanted_b.T)


def test_its_export_uploaded_again_is_the_same_adapter(adapter: Path, base: BaseSpec, tmp_path: Path) -> None:
    staged = stage_here(adapter, base)
    exported = export(staged, base, tmp_path / "export")
    config = json.loads((exported / "adapter_config.json").read_text())
    assert {key: config[key] for key in ("peft_type", "r", "lora_alpha", "tensor_rank", "bias")} == {
        "peft_type": "LORA", "r": 4, "lora_alpha": 6, "tensor_rank": 3, "bias": "none"
    }  # fmt: skip
    assert stage_here(exported, base).manifest.digest == staged.manifest.digest


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"enable_lora": [True, False, True]}, "enable_lora", "several in one"),
        ({"bias": "lora_only"}, "bias", "trained biases"),
        ({"modules_to_save": ["norm"]}, "modules_to_save", "not served"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out", "transposed"),
        ({"lora_alpha": None}, "lora_alpha", "required"),
        ({"tensor_rank": 65}, "tensor_rank", "64"),
        ({"tensor_rank": None}, "tensor_rank", "required"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules", "lm_head"),
        ({"use_dora": True}, "use_dora", "unknown field"),
        ({"r": 17}, "r", "limit of 16"),
    ],
)
def test_a_field_at_fault_is_refused_by_name(
    adapter: Path, base: BaseSpec, changes: dict[str, Any], field: str, reason: str
) -> None:
    edit_config(adapter, **changes)
    error = refused_here(adapter, base)
    assert (error.file, error.field) == ("adapter_config.json", field)
    assert reason in error.reason


@pytest.mark.parametrize(
    ("factor", "value", "field", "reason"),
    [
        ("lora_A.layer.tensor.factors.0", None, "lora_A.layer.tensor.factors.0", "missing"),
        ("lora_A.layer.tensor.factors.2", None, "lora_A.layer.tensor.factors", "multiply to 32; "),
        ("lora_B.layer.tensor.factors.3", torch.ones(3, 4, 1), "lora_B.layer.tensor.factors", "need 64"),
        ("lora_B.layer.tensor.factors.1", torch.ones(2, 4, 3), "lora_B.layer.tensor.factors.1", "need [3, 4, 3]"),
        ("lora_A.layer.tensor.factors.0", torch.ones(4, 3), "lora_A.layer.tensor.factors", "multiply to 32; "),
        ("lora_B.layer.tensor.factors.5", torch.ones(1, 1, 1), "lora_B.layer.tensor.factors.5", "do not call for"),
        ("lora_B.layer.tensor.factors.3", torch.full((3, 2, 1), 1e20), "lora_B.layer.tensor.factors.3", "overflows"),
        ("lora_A.layer.tensor.factors.0", torch.full((1, 4, 3), torch.nan), "lora_A.layer.tensor.factors.0", "NaN"),
    ],
)  # fmt: skip
def test_a_factor_at_fault_is_refused_by_name(
    adapter: Path, base: BaseSpec, factor: str, value: Any, field: str, reason: str
) -> None:
    edit_weights(adapter, f"{V0}.{factor}", value)
    error = refused_here(adapter, base)
    assert (error.file, error.field) == (WEIGHTS, f"{V0}.{field}")
    assert reason in error.reason


def test_a_config_without_its_rank_is_read_as_pefts_and_its_factors_refused(adapter: Path, base: BaseSpec) -> None:
    config = {key: value for key, value in CONFIG.items() if key not in ("tensor_rank", "merge_weights", "enable_lora")}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    error = refused_here(adapter, base)
    assert "tensor train" in error.reason


def test_a_stored_file_without_a_factor_fails_to_load(adapter: Path, base: BaseSpec) -> None:
    staged = stage_here(adapter, base)
    tensors = load_file(staged.path)
    del tensors[f"{V0}.lora_A.layer.tensor.factors.0"]
    text = staged.manifest.model_dump_json(include={"format", "kind", "base_fingerprint", "deltas", "tensor_rank"})
    save_file(tensors, staged.path, metadata={ADAPTER_METADATA_KEY: text})
    with pytest.raises(AdapterLoadFailed):
        load_weights(staged.path)


D0 = "base_model.model.model.layers.0.mlp.down_proj"


@pytest.fixture
def bottleneck(tmp_path: Path) -> Path:
    modules = ["0.mlp.down_proj", "1.mlp.down_proj"]
    return save_loretta_bottleneck(tmp_path / "loretta_adp", 32, ["down_proj"], modules, 4, 0)


@pytest.mark.parametrize(
    ("target_modules", "places"),
    [
        (["down_proj"], {(0, "output"): "0.mlp.down_proj", (1, "output"): "1.mlp.down_proj"}),
        (["gate_proj", "1.mlp.up_proj", "0.mlp.down_proj"],
         {(0, "gate"): "0.mlp.gate_proj", (0, "output"): "0.mlp.down_proj", (1, "gate"): "1.mlp.gate_proj",
          (1, "up"): "1.mlp.up_proj"}),
    ],
    ids=["behind down", "before gate and up, of some layers"],
)  # fmt: skip
def test_factors_of_a_bottleneck_become_matrices_and_are_exported(
    base: BaseSpec, tmp_path: Path, target_modules: list[str], places: dict[tuple[int, str], str]
) -> None:
    folder = save_loretta_bottleneck(tmp_path / "loretta_adp", 32, target_modules, list(places.values()), 4, 0)
    staged = stage_here(folder, base)
    assert (staged.manifest.kind, staged.manifest.tensor_rank) == ("LORETTA_ADP", 3)
    files, weights = load_file(folder / WEIGHTS), load_weights(staged.path).bottleneck
    assert weights is not None
    assert (weights.reads, weights.activation, weights.tensors.keys()) == ("block", "tanh", places.keys())
    for place, module in places.items():
        down, down_bias, up, up_bias = weights.tensors[place]  # type: ignore[index]
        own = {
            name.removeprefix(f"base_model.model.model.layers.{module}."): tensor
            for name, tensor in files.items()
            if module in name
        }
        wanted_down, wanted_up = (
            torch.einsum("aib,bjc,ckd->ijk", *(own[f"{matrix}.layer.tensor.factors.{i}"] for i in range(3)))
            for matrix in ("adapter_down", "adapter_up")
        )
        torch.testing.assert_close(down, wanted_down.reshape(32, 4).T)
        torch.testing.assert_close(up, 0.3 * wanted_up.reshape(4, 32).T)
        assert torch.equal(down_bias, own["adapter_down.layer.bias"])
        assert torch.equal(up_bias, 0.3 * own["adapter_up.layer.bias"])
    exported = export(staged, base, tmp_path / "export")
    assert (exported / WEIGHTS).exists()
    assert stage_here(exported, base).manifest.digest == staged.manifest.digest


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"target_modules": ["down_proj", "q_proj"]}, "target_modules", "no such adapters on q_proj"),
        ({"use_parallel_adapter": True}, "use_parallel_adapter", "parallel"),
        ({"bias": "adapter_only"}, "bias", "trained biases"),
        ({"modules_to_save": ["norm"]}, "modules_to_save", "not served"),
        ({"scaling": "learned"}, "scaling", "a number"),
        ({"non_linearity": "mish"}, "non_linearity", "mish is"),
        ({"tensorized": False}, "tensorized", "True"),
        ({"bottleneck_size": 17}, "bottleneck_size", "17 units"),
    ],
)
def test_a_field_of_a_bottleneck_at_fault_is_refused_by_name(
    bottleneck: Path, base: BaseSpec, changes: dict[str, Any], field: str, reason: str
) -> None:
    edit_config(bottleneck, **changes)
    error = refused_here(bottleneck, base)
    assert (error.file, error.field) == ("adapter_config.json", field)
    assert reason in error.reason


@pytest.mark.parametrize(
    ("tensor", "value", "reason"),
    [
        ("adapter_up.layer.bias", None, "missing"),
        ("adapter_up.layer.tensor.factors.0", None, "missing"),
        ("adapter_down.layer.bias", torch.ones(5), "[4]"),
        ("adapter_up.layer.tensor.factors.1", torch.ones(3, 8, 2), "need [3, 8, 3]"),
    ],
)
def test_a_tensor_of_a_bottleneck_at_fault_is_refused_by_name(
    bottleneck: Path, base: BaseSpec, tensor: str, value: torch.Tensor | None, reason: str
) -> None:
    edit_weights(bottleneck, f"{D0}.{tensor}", value)
    error = refused_here(bottleneck, base)
    assert (error.file, error.field) == (WEIGHTS, f"{D0}.{tensor}")
    assert reason in error.reason
