"""AdapterHub's folder, made up here as its package adapters 1.3.0 writes it: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import AdapterInvalid
from adapters_store.manifest import BottleneckSize
from adapters_store.upload import Staging
from adapters_store.weights import load_weights

from .conftest import refused_here, stage, stage_here
from .test_export import export

WEIGHTS, HIDDEN = "adapter.safetensors", 32
INNER = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.1, "factorized_phm_W": True,
    "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
    "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False,
    "learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False, "mh_adapter": False,
    "non_linearity": "relu", "original_ln_after": True, "original_ln_before": True, "output_adapter": True,
    "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False, "phm_rank": 1,
    "reduction_factor": 8, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False, "shared_phm_rule": True,
    "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
AROUND = {
    "hidden_size": HIDDEN, "model_class": "LlamaForCausalLM", "model_name": "/elsewhere", "model_type": "llama",
    "name": "support", "version": "adapters.1.3.0",
}  # fmt: skip
DOUBLE = {"mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"}


def save(folder: Path, inner: dict[str, Any] | None = None, around: dict[str, Any] | None = None) -> Path:
    """Two layers, with the tensors that `mh_adapter`, `output_adapter` and a size of 4 call for."""
    folder.mkdir(exist_ok=True)
    config = INNER | (inner or {})
    text = json.dumps({**AROUND, "config": config, **(around or {})})
    (folder / "adapter_config.json").write_text(text)
    generator, tensors = torch.Generator().manual_seed(0), {}
    sites = [site for site, has in (("attention", config["mh_adapter"]), ("output", config["output_adapter"])) if has]
    for layer in (0, 1):
        for site in sites:
            name = f"model.layers.{layer}.{site}_adapters.adapters.support"
            for tensor, shape in (
                ("adapter_down.0.weight", (4, HIDDEN)), ("adapter_down.0.bias", (4,)),
                ("adapter_up.weight", (HIDDEN, 4)), ("adapter_up.bias", (HIDDEN,)),
            ):  # fmt: skip
                tensors[f"{name}.{tensor}"] = torch.randn(shape, generator=generator)
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("inner", "sites", "reads", "activation", "scale"),
    [
        ({}, ("output",), "sum", "relu", 1.0),
        (DOUBLE, ("attention", "output"), "block", "silu", 1.0),
        ({"is_parallel": True, "original_ln_before": False, "scaling": 4.0}, ("output",), "stream", "relu", 4.0),
        ({"original_ln_after": False, "residual_before_ln": False, "non_linearity": "gelu"},
         ("output",), "sum", "gelu", 1.0),
        ({"is_parallel": True, "residual_before_ln": "post_add", "non_linearity": "Tanh"},
         ("output",), "stream", "tanh", 1.0),
        ({"non_linearity": "linear", "scaling": 0.3}, ("output",), "sum", "none", 0.3),
    ],
    ids=["seq_bn", "double_seq_bn", "par_bn", "the stream around it", "parallel, to which residuals are nothing",
         "no activation"],
)  # fmt: skip
def test_a_folder_is_accepted_kept_whole_and_exported(
    tmp_path: Path, base: BaseSpec, inner: dict[str, Any], sites: Any, reads: str, activation: str, scale: float
) -> None:
    folder = save(tmp_path / "adapter", inner)
    staged = stage_here(folder, base, weights_file=WEIGHTS)
    own = staged.manifest.bottleneck
    assert own is not None
    assert (staged.manifest.kind, staged.manifest.rank) == ("BOTTLENECK", 0)
    assert (own.sites, own.reads, own.activation, own.scale) == (sites, reads, activation, scale)
    assert own.sizes == (BottleneckSize(size=4, layers=(0, 1)),)
    original, stored = load_file(folder / WEIGHTS), load_file(staged.path)
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in stored)
    loaded = load_weights(staged.path).bottleneck
    assert loaded is not None
    up = original["model.layers.1.output_adapters.adapters.support.adapter_up.weight"]
    assert torch.equal(loaded.tensors[1, "output"].up, scale * up)
    exported = export(staged, base, tmp_path / "export")
    assert {path.name for path in exported.iterdir()} == {"adapter_config.json", WEIGHTS, "patchbay.json"}
    assert stage_here(exported, base, weights_file=WEIGHTS).manifest.digest == staged.manifest.digest


def test_a_folder_is_accepted_under_its_own_names(staging: Staging, tmp_path: Path, base: BaseSpec) -> None:
    manifest = stage(staging, save(tmp_path / "adapter"), base).manifest
    assert [file.name for file in manifest.files] == ["adapter_config.json", WEIGHTS]


@pytest.mark.parametrize(
    ("inner", "sizes"),
    [
        ({"reduction_factor": 7.9}, [(4, (0, 1))]),
        ({"reduction_factor": {"1": 8, "default": 2}, "leave_out": [0]}, [(4, (1,))]),
        ({"reduction_factor": {"0": 8.0, "1": 6.5}}, [(4, (0, 1))]),
    ],
)
def test_sizes_are_the_width_over_the_factor_of_each_layer(
    tmp_path: Path, base: BaseSpec, inner: dict[str, Any], sizes: list[tuple[int, tuple[int, ...]]]
) -> None:
    folder = save(tmp_path / "adapter", inner)
    if inner.get("leave_out"):
        tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "layers.1" in name}
        save_file(tensors, folder / WEIGHTS)
    staged = stage_here(folder, base, weights_file=WEIGHTS)
    assert staged.manifest.bottleneck is not None
    assert [(each.size, each.layers) for each in staged.manifest.bottleneck.sizes] == sizes
    exported = export(staged, base, tmp_path / "export")
    assert stage_here(exported, base, weights_file=WEIGHTS).manifest.digest == staged.manifest.digest


@pytest.mark.parametrize(
    ("inner", "field", "reason"),
    [
        ({"architecture": "lora"}, "architecture", "only bottleneck adapters"),
        ({"ln_before": True}, "ln_before", "norms inside"),
        ({"ln_after": True}, "ln_after", "norms inside"),
        ({"use_gating": True}, "use_gating", "gated"),
        ({"phm_layer": True}, "phm_layer", "PHM"),
        ({"inv_adapter": "nice"}, "inv_adapter", "invertible"),
        ({"cross_adapter": True}, "cross_adapter", "no cross attention"),
        ({"scaling": "learned"}, "scaling", "a number"),
        ({"scaling": "channel"}, "scaling", "a number"),
        ({"scaling": None, "non_linearity": "leakyrelu"}, "non_linearity", "leakyrelu is"),
        ({"non_linearity": "gelu_new"}, "non_linearity", "gelu_python"),
        ({"original_ln_after": False}, "original_ln_after", "leaves the residual stream out"),
        ({"is_parallel": True, "original_ln_after": False, "residual_before_ln": False}, "original_ln_after", "out"),
        ({"residual_before_ln": False}, "residual_before_ln", "twice"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln", "norms after a block"),
        ({"output_adapter": False}, "output_adapter", "there is no adapter"),
        ({"leave_out": [0, 1]}, "leave_out", "every layer"),
        ({"reduction_factor": {"0": 8}}, "reduction_factor", "layer 1"),
        ({"reduction_factor": 0}, "reduction_factor", "greater than"),
        ({"reduction_factor": 1.5}, "reduction_factor", "21 units"),
        ({"reduction_factor": None}, "reduction_factor", "required"),
        ({"new_field": 1}, "new_field", "unknown field"),
        ({"name": "other"}, "name", "not a field of config"),
    ],
)
def test_a_field_at_fault_is_refused_by_name(
    tmp_path: Path, base: BaseSpec, inner: dict[str, Any], field: str, reason: str
) -> None:
    error = refused_here(save(tmp_path / "adapter", inner), base, weights_file=WEIGHTS)
    assert (error.file, error.field) == ("adapter_config.json", field)
    assert reason in error.reason


@pytest.mark.parametrize(
    ("around", "field", "reason"),
    [
        ({"model_type": "qwen2"}, "model_type", "llama and mistral"),
        ({"model_type": "bert"}, "model_type", "bert are"),
        ({"version": "2.1.2"}, "version", "package `adapters`"),
        ({"version": None}, "version", "package `adapters`"),
        ({"hidden_size": 64}, "hidden_size", "the base's is 32"),
        ({"hidden_size": None}, "hidden_size", "required"),
        ({"name": "a.b"}, "name", "pattern"),
        ({"config": "seq_bn"}, "config", "no object"),
        ({"label2id": {"a": 1}}, "label2id", "unknown field"),
    ],
)
def test_a_field_around_config_at_fault_is_refused_by_name(
    tmp_path: Path, base: BaseSpec, around: dict[str, Any], field: str, reason: str
) -> None:
    error = refused_here(save(tmp_path / "adapter", around=around), base, weights_file=WEIGHTS)
    assert (error.file, error.field) == ("adapter_config.json", field)
    assert reason in error.reason


@pytest.mark.parametrize(
    ("tensor", "value", "reason"),
    [
        ("adapter_up.bias", None, "missing"),
        ("adapter_down.0.weight", torch.ones(5, HIDDEN), "[4, 32]"),
        ("adapter_down.0.bias", torch.full((4,), torch.nan), "NaN"),
        ("adapter_up.weight", torch.full((HIDDEN, 4), 2e38), "overflows"),
        ("adapter_norm_after.weight", torch.ones(HIDDEN), "not a tensor"),
    ],
)
def test_a_tensor_at_fault_is_refused_by_name(
    tmp_path: Path, base: BaseSpec, tensor: str, value: torch.Tensor | None, reason: str
) -> None:
    folder = save(tmp_path / "adapter", {"scaling": 4.0})
    name = f"model.layers.0.output_adapters.adapters.support.{tensor}"
    tensors = {**load_file(folder / WEIGHTS), name: value}
    save_file({key: each for key, each in tensors.items() if each is not None}, folder / WEIGHTS)
    error = refused_here(folder, base, weights_file=WEIGHTS)
    assert (error.file, error.field) == (WEIGHTS, name)
    assert reason in error.reason


@pytest.mark.parametrize("name", ["head_config.json", "model_head.safetensors", "pytorch_model_head.bin"])
def test_a_prediction_head_is_refused_with_advice(staging: Staging, name: str) -> None:
    with pytest.raises(AdapterInvalid, match="with_head=False") as caught:
        staging.add_file(name, [b"{}"])
    assert caught.value.file == name


def test_its_pickle_is_refused_with_advice(staging: Staging) -> None:
    with pytest.raises(AdapterInvalid, match="use_safetensors=True") as caught:
        staging.add_file("pytorch_adapter.bin", [b"PK\x03\x04"])
    assert caught.value.file == "pytorch_adapter.bin"


def test_two_files_of_weights_are_refused(staging: Staging, tmp_path: Path, base: BaseSpec) -> None:
    folder = save(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    with pytest.raises(AdapterInvalid) as caught:
        stage(staging, folder, base)
    error = caught.value
    assert (error.file, error.reason) == (
        WEIGHTS,
        "comes beside adapter_model.safetensors; an upload has one of the two",
    )
