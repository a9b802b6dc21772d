"""Prompt, P- and prefix tuning: what peft writes is read, what does not fit is refused by name, nothing is opened."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptLearningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from adapters_store.adapter_config import AdapterConfig
from adapters_store.base_spec import BaseSpec
from adapters_store.config_schema import parse_config
from adapters_store.errors import AdapterInvalid
from adapters_store.manifest import AdapterSpec, LoRADelta, VirtualTokens
from adapters_store.weights import load_weights

from .conftest import edit_config, refused_here, stage_here, tiny_model

KINDS: dict[str, PromptLearningConfig] = {
    "PROMPT_TUNING": PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "P_TUNING": PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}
WIDTHS = {"PROMPT_TUNING": 32, "P_TUNING": 32, "PREFIX_TUNING": 2 * 2 * 16}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `peft` writes for each kind on the tiny model."""
    root = tmp_path_factory.mktemp("prompts")
    for kind, config in KINDS.items():
        get_peft_model(tiny_model(), config).save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(params=KINDS)
def adapter(request: pytest.FixtureRequest, saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a good adapter of each kind, which a test may spoil."""
    return Path(shutil.copytree(saved[request.param], tmp_path / request.param))


def parse(kind: str, **changes: Any) -> AdapterConfig:
    return parse_config(json.dumps({"peft_type": kind, "num_virtual_tokens": 5, **changes}).encode())


def sizes(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in ("token_dim", "num_layers")}


def test_a_peft_folder_is_accepted_and_its_blob_holds_the_rows(adapter: Path, base: BaseSpec) -> None:
    result = stage_here(adapter, base, max_virtual_tokens=8)
    manifest, kind = result.manifest, adapter.name
    assert (manifest.kind, manifest.rank, manifest.target_modules) == (kind, 0, ())
    assert manifest.num_virtual_tokens == 5
    assert manifest.num_parameters == 5 * WIDTHS[kind]
    weights = load_weights(result.path)
    rows = load_file(adapter / WEIGHTS)["prompt_embeddings"]
    assert weights.virtual_tokens is not None
    assert not weights.tensors
    wanted = rows.view(5, 4, 16) if kind == "PREFIX_TUNING" else rows
    assert torch.equal(weights.virtual_tokens, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_that_this_peft_writes_is_known(kind: str) -> None:
    fields = json.loads(json.dumps(KINDS[kind].to_dict(), default=list))
    assert parse(**{"kind": fields.pop("peft_type"), **fields}) == parse(kind, **sizes(fields))
    assert set(fields) <= {field.name for field in dataclasses.fields(KINDS[kind])}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("PROMPT_TUNING", "tokenizer_name_or_path", "/etc/passwd"),
        ("PROMPT_TUNING", "tokenizer_kwargs", {"trust_remote_code": True}),
        ("PROMPT_TUNING", "prompt_tuning_init", "TEXT"),
        ("PROMPT_TUNING", "prompt_tuning_init_text", "classify:"),
        ("P_TUNING", "encoder_reparameterization_type", "LSTM"),
        ("P_TUNING", "encoder_dropout", 0.5),
        ("PREFIX_TUNING", "prefix_projection", True),
        ("PREFIX_TUNING", "init_weights", "zero"),
        ("PREFIX_TUNING", "base_model_name_or_path", "https://example.org/model"),
        ("PREFIX_TUNING", "auto_mapping", {"parent_library": "os"}),
        ("P_TUNING", "task_type", None),
        ("P_TUNING", "num_transformer_submodules", 1),
    ],
)
def test_inert_fields_are_dropped(kind: str, field: str, value: Any) -> None:
    assert parse(kind, **{field: value}) == parse(kind)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("PROMPT_TUNING", "num_virtual_tokens", 0),
        ("PROMPT_TUNING", "num_virtual_tokens", "5"),
        ("PROMPT_TUNING", "num_virtual_tokens", None),
        ("PROMPT_TUNING", "num_transformer_submodules", 2),
        ("PROMPT_TUNING", "task_type", "SEQ_CLS"),
        ("P_TUNING", "modules_to_save", ["lm_head"]),
        ("P_TUNING", "prefix_projection", True),
        ("PREFIX_TUNING", "encoder_dropout", 0.1),
        ("PREFIX_TUNING", "token_dim", 16.0),
        ("PREFIX_TUNING", "__class__", "os.system"),
    ],
)
def test_a_field_that_is_not_served_is_refused_by_name(kind: str, field: str, value: Any) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        parse(kind, **{field: value})
    assert (caught.value.file, caught.value.field) == ("adapter_config.json", field)


@pytest.mark.parametrize("field", ["num_layers", "token_dim"])
def test_another_base_s_sizes_are_refused(adapter: Path, base: BaseSpec, field: str) -> None:
    edit_config(adapter, **{field: 48})
    error = refused_here(adapter, base, max_virtual_tokens=8)
    assert error.field == field
    assert "48" in error.reason


def test_more_tokens_than_the_limit_are_refused_with_it(adapter: Path, base: BaseSpec) -> None:
    error = refused_here(adapter, base, max_virtual_tokens=4)
    assert error.field == "num_virtual_tokens"
    assert "5 virtual tokens are above the limit of 4" in error.reason


@pytest.mark.parametrize("shape", [(4, 32), (5, 33), (5, 2, 32)])
def test_a_tensor_of_another_shape_is_refused(adapter: Path, base: BaseSpec, shape: tuple[int, ...]) -> None:
    save_file({"prompt_embeddings": torch.ones(shape)}, adapter / WEIGHTS)
    assert refused_here(adapter, base, max_virtual_tokens=8).field == "prompt_embeddings"


@pytest.mark.parametrize("name", ["prompt_encoder.embedding.weight", "base_model.model.lm_head.weight"])
def test_another_tensor_beside_it_is_refused(adapter: Path, base: BaseSpec, name: str) -> None:
    save_file({**load_file(adapter / WEIGHTS), name: torch.ones(1)}, adapter / WEIGHTS)
    assert refused_here(adapter, base, max_virtual_tokens=8).field == name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_values_that_no_dtype_of_an_engine_holds_are_refused(adapter: Path, base: BaseSpec, value: float) -> None:
    tensors = load_file(adapter / WEIGHTS)
    tensors["prompt_embeddings"][2, 3] = value
    save_file(tensors, adapter / WEIGHTS)
    assert refused_here(adapter, base, max_virtual_tokens=8).field == "prompt_embeddings"


def test_an_adapter_without_virtual_tokens_is_told_as_before_there_were_any() -> None:
    """Its blob has the same bytes, and so the same digest."""
    delta = LoRADelta(linear="q_proj", rank=4, scale=2.0, layers=(0, 1))
    spec = AdapterSpec(base_fingerprint="f", deltas=(delta,))
    assert spec.canonical_json() == (
        '{"base_fingerprint":"f","deltas":[{"layers":[0,1],"linear":"q_proj","rank":4,"scale":2.0}],"format":1,'
        '"kind":"LORA"}'
    )
    assert AdapterSpec.model_validate_json(spec.canonical_json()) == spec
    virtual = AdapterSpec(kind="P_TUNING", base_fingerprint="f", virtual_tokens=VirtualTokens(num_tokens=3))
    assert AdapterSpec.model_validate_json(virtual.canonical_json()) == virtual
