"""Uploads of every kind through the real validator: what is kept, and what is refused by its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    DeloraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    VeraConfig,
)
from safetensors.torch import load_file, save_file

from adapters_store.base_spec import VERA_A, VERA_B, BaseSpec
from adapters_store.manifest import VectorSite
from adapters_store.weights import load_weights

from .conftest import edit_config, refused_here, save_kind, stage_here

WEIGHTS = "adapter_model.safetensors"
IA3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
LN = LNTuningConfig(target_modules=["input_layernorm", "norm"])
E0 = "model.layers.0.self_attn.q_proj.lora_E"
ADALORA = AdaLoraConfig(
    init_r=3, total_step=9, target_modules=["q_proj"], rank_pattern={E0: [True, False, True]}, layers_to_transform=[0]
)
LOHA = LoHaConfig(r=2, alpha=8, target_modules=["q_proj", "down_proj"])
DELORA = DeloraConfig(r=3, target_modules=["q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 2})
LOKR = LoKrConfig(r=2, alpha=8, target_modules=["q_proj", "down_proj"])
MISS = MissConfig(r=6, target_modules=["q_proj"])
MINI = MissConfig(r=6, init_weights="mini", mini_r=2, target_modules=["q_proj"])
VERA = VeraConfig(r=6, target_modules=["q_proj", "down_proj"])
PREFIX = "base_model.model.model."


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


def site(module: str, role: Any, tensor: str, layers: tuple[int, ...] = (0, 1), scale: float = 1.0) -> VectorSite:
    return VectorSite(module=module, role=role, tensor=tensor, layers=layers, scale=scale)


SAVED_NORMS = tuple(
    site(norm, "norm", "weight", (0,) if norm == "norm" else (0, 1))
    for norm in ("input_layernorm", "post_attention_layernorm", "norm")
)


@pytest.mark.parametrize(
    ("config", "rank", "vectors"),
    [
        (IA3, 0, (site("k_proj", "out_scale", "ia3_l"), site("down_proj", "in_scale", "ia3_l"))),
        (BeftConfig(target_modules=["v_proj"]), 0, (site("v_proj", "bias", "beft_bias"),)),
        (LN, 0, (site("input_layernorm", "norm", "ln_tuning_layers.weight"),
                 site("norm", "norm", "ln_tuning_layers.weight", (0,)))),
        (LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]), 4,
         (site("q_proj", "magnitude", "lora_magnitude_vector"),)),
        (LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=["q_proj"], layers_to_transform=[1]), 4,
         (site("q_proj", "bias", "lora_B.bias", (1,), 1.5),)),
        (LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]), 4, SAVED_NORMS),
        (LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["input_layernorm"]), 4, SAVED_NORMS[:1]),
        (VERA, 6, ()),
        (ADALORA, 2, ()),
        (LOKR, 8, ()),
        (DELORA, 3, ()),
        (MISS, 6, ()),
        (MINI, 2, ()),
        (replace(MINI, r=2, mini_r=32), 2, ()),
    ],
    ids=["IA3", "BEFT", "LN", "DoRA", "lora_bias", "norm is the end of all norms", "one norm", "VeRA", "AdaLoRA",
         "LoKr", "DeLoRA", "MiSS", "MiSS mini of few outputs", "MiSS mini of all outputs"],
)  # fmt: skip
def test_a_peft_folder_is_accepted_and_kept_whole(
    tmp_path: Path, base: BaseSpec, config: PeftConfig, rank: int, vectors: tuple[VectorSite, ...]
) -> None:
    folder = save_kind(tmp_path / "adapter", config)
    staged = stage_here(folder, base)
    assert (staged.manifest.kind, staged.manifest.rank) == (config.peft_type.value, rank)
    assert staged.manifest.vectors == vectors
    original, stored = load_file(folder / WEIGHTS), load_file(staged.path)
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in stored)
    assert staged.manifest.num_parameters == sum(tensor.numel() for tensor in original.values())
    keys = {(layer, s.module, s.role) for s in vectors for layer in s.layers}
    assert load_weights(staged.path).vectors.keys() == keys


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "config", [ADALORA, VERA, LOHA, LOKR, DELORA, MISS, IA3, LN], ids=lambda config: config.peft_type.value
)
def test_a_folder_saved_in_16_bits_is_accepted(
    tmp_path: Path, base: BaseSpec, config: PeftConfig, dtype: torch.dtype
) -> None:
    folder = save_kind(tmp_path / "adapter", config)
    saved = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    edit_weights(folder, **saved)
    stored = load_file(stage_here(folder, base).path)
    assert all(torch.equal(stored[name], tensor) for name, tensor in saved.items())


def test_vera_without_its_matrices_is_kept_with_them(tmp_path: Path, base: BaseSpec) -> None:
    whole = save_kind(tmp_path / "whole", VERA)
    part = save_kind(tmp_path / "part", replace(VERA, save_projection=False))
    assert VERA_A not in load_file(part / WEIGHTS)
    stored, wanted = load_file(stage_here(part, base).path), load_file(whole / WEIGHTS)
    assert all(torch.equal(stored[name], wanted[name]) for name in (VERA_A, VERA_B))


def test_trained_biases_are_those_that_the_base_has(tmp_path: Path, base: BaseSpec) -> None:
    """peft's Llama has none: made up here, as peft writes those of Qwen2."""
    folder = save_kind(tmp_path / "adapter", LoraConfig(r=4, bias="all", target_modules=["q_proj"]))
    edit_weights(folder, **{
        f"{PREFIX}layers.{layer}.self_attn.{name}": torch.ones(width)
        for layer in (0, 1)
        for name, width in (("q_proj.base_layer.bias", 32), ("k_proj.bias", 16))
    })  # fmt: skip
    biased = replace(base, biased=("q_proj", "k_proj"))
    vectors = stage_here(folder, biased).manifest.vectors
    assert vectors == (site("q_proj", "own_bias", "base_layer.bias"), site("k_proj", "own_bias", "bias"))
    edit_config(folder, bias="lora_only")
    error = refused_here(folder, biased)
    assert error.field == f"{PREFIX}layers.0.self_attn.k_proj.bias"
    assert "bias" in error.reason


@pytest.mark.parametrize(
    ("config", "changes", "field", "reason"),
    [
        (IA3, {"feedforward_modules": ["k_proj", "down_proj"]}, "feedforward_modules", "inputs of k_proj"),
        (IA3, {"target_modules": ["k_proj", "lm_head"]}, "target_modules", "lm_head"),
        (IA3, {"target_modules": ["k_proj", "norm"]}, "target_modules", "norm"),
        (IA3, {"feedforward_modules": "("}, "feedforward_modules", "regular expression"),
        (IA3, {"modules_to_save": ["q_proj"]}, "modules_to_save", "q_proj"),
        (IA3, {"modules_to_save": ["self_attn"]}, "modules_to_save", "self_attn"),
        (IA3, {"modules_to_save": ["norm", "score"]}, "modules_to_save", "score"),
        (LN, {"target_modules": ["input_layernorm", "q_proj"]}, "target_modules", "q_proj"),
        (LN, {"target_modules": "all-linear"}, "target_modules", "norm"),
        (LN, {"target_modules": ".*q_norm"}, "target_modules", "matches no norm"),
        (VERA, {"target_modules": "lm_head"}, "target_modules", "matches no linear"),
        (VERA, {"r": 17}, "r", "limit of 16"),
        (MINI, {"mini_r": 5}, "mini_r", "32 outputs of q_proj"),
        (MINI, {"mini_r": 0}, "mini_r", "greater"),
        (MINI, {"mini_r": 32, "r": 17}, "r", "limit of 16"),
        (ADALORA, {"rank_pattern": {}, "init_r": 17}, "init_r", "limit of 16"),
        (ADALORA, {"rank_pattern": {E0: [True] * 17 + [False]}, "init_r": 18}, "rank_pattern", "limit of 16"),
    ],
)  # fmt: skip
def test_a_field_that_the_base_cannot_follow_is_refused_by_name(
    tmp_path: Path, base: BaseSpec, config: PeftConfig, changes: Any, field: str, reason: str
) -> None:
    folder = save_kind(tmp_path / "adapter", config)
    edit_config(folder, **changes)
    error = refused_here(folder, base)
    assert (error.file, error.field) == ("adapter_config.json", field)
    assert reason in error.reason


@pytest.mark.parametrize(
    ("config", "tensor", "value", "reason"),
    [
        (IA3, "layers.0.self_attn.k_proj.ia3_l", None, "missing"),
        (IA3, "layers.0.self_attn.k_proj.ia3_l", torch.ones(1, 16), "[16, 1]"),
        (IA3, "layers.1.mlp.down_proj.ia3_l", torch.full((1, 48), torch.nan), "NaN"),
        (IA3, "layers.0.self_attn.v_proj.ia3_l", torch.ones(16, 1), "not a tensor"),
        (LN, "layers.0.post_attention_layernorm.ln_tuning_layers.weight", torch.ones(32), "not a tensor"),
        (LN, "layers.0.self_attn.q_norm.weight", torch.ones(8), "single heads"),
        (LN, "norm.ln_tuning_layers.weight", torch.full((32,), torch.inf), "infinite"),
        (LoraConfig(r=4, target_modules=["q_proj"]), "layers.0.self_attn.q_proj.lora_magnitude_vector",
         torch.ones(32), "use_dora"),
        (LoraConfig(r=4, target_modules=["q_proj"]), "layers.0.self_attn.q_proj.lora_B.bias", torch.ones(32), "bias"),
        (LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]),
         "layers.0.self_attn.q_proj.lora_magnitude_vector", None, "missing"),
        (VERA, "layers.0.self_attn.q_proj.vera_lambda_d", torch.ones(7), "[6]"),
        (VERA, "layers.0.self_attn.q_proj.vera_lambda_b", torch.full((32,), 1e20), "overflows"),
        (ADALORA, "layers.0.self_attn.q_proj.lora_E", torch.ones(3, 1), "[2, 1]"),
        (ADALORA, "layers.0.self_attn.q_proj.lora_E", torch.full((2, 1), 1e20), "overflows"),
        (ADALORA, "layers.0.self_attn.q_proj.lora_B", torch.full((32, 2), 3e38), "overflows"),
        (LOKR, "layers.0.self_attn.q_proj.lokr_t2", torch.ones(2, 2, 3, 3), "convolution"),
        (LOKR, "layers.0.self_attn.q_proj.lokr_w2", torch.ones(8, 8), "not a tensor"),
        (LOKR, "layers.0.self_attn.q_proj.lokr_w2_a", torch.ones(2, 8), "[8, 2]"),
        (LOKR, "layers.0.self_attn.q_proj.lokr_w1", torch.full((4, 4), 1.1e6), "overflows"),
        (DELORA, "layers.0.self_attn.q_proj.delora_w_norm", None, "missing"),
        (DELORA, "layers.0.self_attn.q_proj.delora_w_norm", torch.ones(1), "[32]"),  # of weights in 4 bits
        (DELORA, "layers.0.self_attn.q_proj.delora_lambda", torch.tensor([1e18]), "overflows"),
        (MISS, "layers.0.self_attn.q_proj.miss_block", torch.ones(6, 6), "[6, 32]"),
        (MINI, "layers.0.self_attn.q_proj.miss_block", torch.ones(6, 32), "[6, 2]"),
        (LOHA, "layers.0.self_attn.q_proj.hada_w1_a", torch.full((32, 2), 1e19), "overflows"),
        (LOHA, "layers.0.self_attn.q_proj.hada_w2_b", torch.full((2, 32), 1.9e19), "overflows"),
    ],
)  # fmt: skip
def test_a_tensor_at_fault_is_refused_by_name(
    tmp_path: Path, base: BaseSpec, config: PeftConfig, tensor: str, value: Any, reason: str
) -> None:
    folder = save_kind(tmp_path / "adapter", config)
    edit_weights(folder, **{PREFIX + tensor: value})
    error = refused_here(folder, base)
    assert (error.file, error.field) == (WEIGHTS, PREFIX + tensor)
    assert reason in error.reason


def test_matrices_that_the_config_says_are_left_out_are_refused(tmp_path: Path, base: BaseSpec) -> None:
    folder = save_kind(tmp_path / "adapter", VERA)
    edit_config(folder, save_projection=False)
    assert refused_here(folder, base).field == VERA_A
