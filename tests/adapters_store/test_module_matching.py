"""Targets, ranks and scales: the same as peft's, for each way of writing them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from adapters_store.base_spec import BaseSpec
from adapters_store.config_schema import parse_config
from adapters_store.errors import AdapterInvalid
from adapters_store.lora_config import LoRAConfig

from .conftest import save_adapter, tiny_model

CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 5, "use_rslora": True},
    {"target_modules": "all-linear"},
    {"target_modules": r".*\.(q|k)_proj"},
    {"target_modules": r"model\.layers\.1\.mlp\.(gate|up)_proj"},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "self_attn.o_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "x|model.layers"},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["model.layers.0.self_attn.k_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.1.*"},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 7, "q_proj": 2}},
    {"target_modules": ["q_proj"], "rank_pattern": {r"^model.layers.0.self_attn.q_proj": 5}},
    {"target_modules": ["q_proj"], "rank_pattern": {"_proj": 5}, "alpha_pattern": {"q_proj|v_proj": 9}},
    {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"x|v_proj": 9}, "rank_pattern": {"proj|q": 3}},
]


def peft_targets(options: dict[str, Any]) -> dict[str, tuple[int, float]]:
    model = get_peft_model(tiny_model(), LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    return {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize("options", CONFIGS, ids=json.dumps)
def test_targets_are_those_of_peft(tmp_path: Path, base: BaseSpec, options: dict[str, Any]) -> None:
    folder = save_adapter(tmp_path, torch.float32, **options)
    config = parse_config((folder / "adapter_config.json").read_bytes())
    assert isinstance(config, LoRAConfig)
    ours = config.targets(base)
    assert {path: (target.rank, pytest.approx(target.scale)) for path, target in ours.items()} == peft_targets(options)


def test_all_linear_as_a_text_takes_the_seven_linears_of_every_layer(base: BaseSpec) -> None:
    assert len(LoRAConfig(target_modules="all-linear").targets(base)) == 14


def test_a_target_that_matches_nothing_is_refused(base: BaseSpec) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        LoRAConfig(target_modules="transformer.*").targets(base)
    assert caught.value.field == "target_modules"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", "(q_proj"),
        ("exclude_modules", "*"),
        ("rank_pattern", {"(": 2}),
        ("alpha_pattern", {"[": 2.0}),
    ],
)
def test_a_broken_regular_expression_is_refused_by_field(base: BaseSpec, field: str, value: Any) -> None:
    config = LoRAConfig.model_validate({"target_modules": ["q_proj"], field: value})
    with pytest.raises(AdapterInvalid) as caught:
        config.targets(base)
    assert caught.value.field == field


@pytest.mark.parametrize("pattern", ["layers|x", ["layers|x", "layers"], "(?:layers)?|layers"])
def test_a_layers_pattern_that_leads_to_no_layer_matches_nothing_as_in_peft(base: BaseSpec, pattern: Any) -> None:
    options = {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": pattern}
    with pytest.raises(ValueError, match=r"Target modules .* not found"):
        peft_targets(options)
    with pytest.raises(AdapterInvalid, match="matches no linear") as caught:
        LoRAConfig.model_validate(options).targets(base)
    assert caught.value.field == "target_modules"


def test_a_broken_layers_pattern_is_refused(base: BaseSpec) -> None:
    config = LoRAConfig(target_modules=("q_proj",), layers_to_transform=(0,), layers_pattern="(")
    with pytest.raises(AdapterInvalid) as caught:
        config.targets(base)
    assert caught.value.field == "layers_pattern"
