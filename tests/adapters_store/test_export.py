"""An exported version is a peft folder: `PeftModel.from_pretrained` gives the logits of what was uploaded."""

from __future__ import annotations

import io
import json
import tarfile
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
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
)

from adapters_store.base_spec import BaseSpec
from adapters_store.export import PeftTar
from adapters_store.upload import StagedAdapter
from tests.tiny import save_bottleneck

from .conftest import save_adapter, save_kind, stage_here, tiny_model

Q0 = "model.layers.0.self_attn.q_proj"
OPTIONS: list[dict[str, Any]] = [
    {},
    {"target_modules": "all-linear", "r": 5, "lora_alpha": 3},
    {"use_rslora": True, "r": 3, "lora_alpha": 7},
    {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    {"rank_pattern": {Q0: 2}, "alpha_pattern": {Q0: 1, "layers.1.self_attn.v_proj": 11}},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    {"target_modules": r"model\.layers\.0\.self_attn\.[qk]_proj|model\.layers\.1\.mlp\.down_proj"},
    {"use_rslora": True, "rank_pattern": {"v_proj": 7}},
]

KINDS: dict[str, PeftConfig] = {
    "DoRA": LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    "lora_bias": LoraConfig(r=3, lora_alpha=5, lora_bias=True, target_modules=["v_proj"], modules_to_save=["norm"]),
    "AdaLoRA": AdaLoraConfig(
        init_r=5, lora_alpha=3, total_step=10, target_modules=["q_proj", "down_proj"],
        rank_pattern={
            f"{Q0}.lora_E": [True, False, True, False, False],
            "model.layers.1.self_attn.q_proj.lora_E": [False] * 5,
            "model.layers.1.mlp.down_proj.lora_E": [True] * 5,
        },
    ),
    "LoHa": LoHaConfig(
        r=3, alpha=5, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}, init_weights=False
    ),
    "LoKr": LoKrConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"], init_weights=False),
    "LoKr of two products": LoKrConfig(
        r=1, alpha=5, decompose_both=True, target_modules=["q_proj", "up_proj"], init_weights=False,
        rank_pattern={"layers.0.self_attn.q_proj": 3}, alpha_pattern={"up_proj": 0.7},
    ),
    "LoKr of two matrices": LoKrConfig(
        r=64, alpha=5, decompose_factor=2, target_modules=["k_proj"], layers_to_transform=[1], init_weights=False
    ),
    "DeLoRA": DeloraConfig(
        r=3, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}, lambda_pattern={"q_proj": 4},
        init_weights=False,
    ),
    "MiSS mini of few outputs": MissConfig(r=7, init_weights="mini", mini_r=4, target_modules=["q_proj", "down_proj"]),
    "MiSS mini of few inputs": MissConfig(r=4, init_weights="mini", mini_r=8, target_modules=["q_proj"]),
    "MiSS": MissConfig(r=7, target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    "VeRA": VeraConfig(r=6, target_modules=["q_proj", "down_proj"], save_projection=False),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "BEFT": BeftConfig(target_modules=["v_proj", "layers.1.mlp.up_proj"]),
    "LN": LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "P-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}  # fmt: skip


def export(staged: StagedAdapter, base: BaseSpec, folder: Path) -> Path:
    """The peft folder that a tar unpacks to."""
    tar = PeftTar.of("support-1", staged.manifest, base, staged.path.open("rb"))
    data = b"".join(tar.chunks())
    assert len(data) == tar.num_bytes
    assert tar.weights.closed
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "support-1"


def logits(folder: Path, *, tied: bool = False) -> torch.Tensor:
    model = PeftModel.from_pretrained(tiny_model(tied=tied), folder).eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(16)[None]).logits
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_peft_computes_the_same_from_an_export(tmp_path: Path, base: BaseSpec, options: dict[str, Any]) -> None:
    uploaded = save_adapter(tmp_path / "adapter", **options)
    exported = export(stage_here(uploaded, base), base, tmp_path / "export")
    expected = logits(uploaded)
    with torch.no_grad():
        assert not torch.allclose(expected, tiny_model().eval()(torch.arange(16)[None]).logits, atol=1e-4)
    torch.testing.assert_close(logits(exported), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS[:-1], ids=str)
def test_an_export_uploaded_again_is_the_same_adapter(tmp_path: Path, base: BaseSpec, options: dict[str, Any]) -> None:
    uploaded = save_adapter(tmp_path / "adapter", **options)
    staged = stage_here(uploaded, base)
    again = stage_here(export(staged, base, tmp_path / "export"), base)
    assert again.manifest.digest == staged.manifest.digest


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_exported_and_uploaded_again(tmp_path: Path, base: BaseSpec, kind: str) -> None:
    uploaded = save_kind(tmp_path / "adapter", KINDS[kind])
    staged = stage_here(uploaded, base, max_virtual_tokens=8)
    exported = export(staged, base, tmp_path / "export")
    torch.testing.assert_close(logits(exported), logits(uploaded), rtol=1e-6, atol=1e-6)
    assert stage_here(exported, base, max_virtual_tokens=8).manifest.digest == staged.manifest.digest


@pytest.mark.parametrize(
    ("model_type", "model_class"),
    [("llama", "LlamaForCausalLM"), ("mistral", "MistralForCausalLM"), ("qwen2", "LlamaForCausalLM")],
)
def test_a_bottleneck_is_exported_as_one_of_its_own_base_where_the_package_has_that(
    tmp_path: Path, base: BaseSpec, model_type: str, model_class: str
) -> None:
    uploaded = save_bottleneck(tmp_path / "adapter", 32, 2, 4, 0, non_linearity="relu")
    own = replace(base, model_type=model_type)
    staged = stage_here(uploaded, own, weights_file="adapter.safetensors")
    exported = export(staged, own, tmp_path / "export")
    config = json.loads((exported / "adapter_config.json").read_text())
    assert config["model_class"] == model_class
    assert config["model_type"] == ("llama" if model_type == "qwen2" else model_type)
    again = stage_here(exported, own, weights_file="adapter.safetensors")
    assert again.manifest.digest == staged.manifest.digest
