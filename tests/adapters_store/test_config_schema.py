"""adapter_config.json: what peft writes is read, and each field that is not served is refused by its name."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from peft import (
    AdaLoraConfig,
    BeftConfig,
    DeloraConfig,
    IA3Config,
    LNTuningConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    VeraConfig,
)

from adapters_store.adapter_config import AdapterConfig
from adapters_store.config_schema import parse_config
from adapters_store.errors import AdapterInvalid
from adapters_store.lora_config import LoRAConfig


def parse(**changes: Any) -> AdapterConfig:
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **changes}
    return parse_config(json.dumps(fields).encode())


def refused(**changes: Any) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as caught:
        parse(**changes)
    assert caught.value.file == "adapter_config.json"
    return caught.value


def test_every_field_that_this_peft_writes_is_known() -> None:
    fields = json.loads(json.dumps(LoraConfig(target_modules=["q_proj"]).to_dict(), default=list))
    config = parse(**{**fields, "peft_type": "LORA"})
    assert isinstance(config, LoRAConfig)
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 8.0, ("q_proj",))
    assert set(fields) <= {field.name for field in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", "yes"),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("lora_bias", 1),
        ("bias", "vera_only"),
        ("modules_to_save", "norm"),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 1]]),
        ("fan_in_fan_out", True),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"n": 1}),
        ("megatron_config", {"path": "x"}),
        ("loftq_config", {"bits": 4}),
        ("corda_config", {"cache_file": "/etc/passwd"}),
        ("lora_ga_config", {"cache_file": "/etc/passwd"}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", 3),
        ("peft_type", "OFT"),
        ("peft_type", ["LORA"]),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("r", 0),
        ("r", -1),
        ("r", 2**31),
        ("r", "8"),
        ("r", True),
        ("r", 1.5),
        ("lora_alpha", "16"),
        ("lora_alpha", 1e300),
        ("target_modules", 5),
        ("target_modules", [["q_proj"]]),
        ("target_modules", ""),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": "x"}),
        ("use_rslora", "yes"),
        ("layers_to_transform", ["a"]),
        ("layers_pattern", "layers"),
        ("tokenizer_kwargs", {"trust_remote_code": True}),
        ("__class__", "os.system"),
    ],
)
def test_a_field_that_is_not_served_is_refused_by_name(field: str, value: Any) -> None:
    assert refused(**{field: value}).field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("auto_mapping", {"base_model_class": "x", "parent_library": "os"}),
        ("base_model_name_or_path", "https://example.org/model"),
        ("revision", "../../etc"),
        ("megatron_core", "os.path"),
        ("lora_dropout", 0.5),
        ("inference_mode", True),
        ("peft_version", "0.21.2"),
        ("task_type", "CAUSAL_LM"),
        ("init_lora_weights", False),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "orthogonal"),
        ("eva_config", {"rho": 2.0}),
    ],
)
def test_inert_fields_are_dropped(field: str, value: Any) -> None:
    assert parse(**{field: value}) == parse()


def test_target_modules_are_required() -> None:
    assert refused(target_modules=None).field == "target_modules"


def test_layers_cannot_be_chosen_beside_a_regular_expression() -> None:
    assert refused(target_modules=".*q_proj", layers_to_transform=[0]).field == "layers_to_transform"


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b'"x"', b"{", b'{"r": 1, "r": 2}', b'{"lora_alpha": NaN}', b'{"lora_alpha": Infinity}', b"\xff",
     b'{"r": ' + b"[" * 100_000, b'{"r": ' + b"1" * 5000 + b"}", b'{"a": {"b": 1, "b": 2}}'],
)  # fmt: skip
def test_what_is_not_one_plain_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        parse_config(data)
    assert caught.value.file == "adapter_config.json"


def test_a_message_never_repeats_control_characters() -> None:
    error = refused(**{"evil\x1b[31m\n": 1})
    assert str(error).isprintable()


OTHER_KINDS: list[PeftConfig] = [
    IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    BeftConfig(target_modules=["k_proj"]),
    LNTuningConfig(target_modules=["norm"]),
    VeraConfig(target_modules=["q_proj"]),
    AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    LoKrConfig(target_modules=["q_proj"]),
    DeloraConfig(target_modules=["q_proj"]),
    MissConfig(target_modules=["q_proj"]),
]


def written(config: PeftConfig) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=list))
    return fields


@pytest.mark.parametrize("config", OTHER_KINDS, ids=lambda config: config.peft_type.value)
def test_every_field_of_another_kind_is_known_and_no_field_of_lora_is(config: PeftConfig) -> None:
    fields = written(config)
    parsed = parse_config(json.dumps(fields).encode())
    assert parsed.kind == config.peft_type.value
    for field in {f.name for f in dataclasses.fields(LoraConfig)} - set(fields):
        if field not in ("fan_in_fan_out", "modules_to_save"):
            with pytest.raises(AdapterInvalid) as caught:
                parse_config(json.dumps({**fields, field: 1}).encode())
            assert caught.value.field == field


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (0, "fan_in_fan_out", True),
        (0, "feedforward_modules", None),
        (0, "feedforward_modules", [3]),
        (1, "modules_to_save", "norm"),
        (2, "modules_to_save", ["norm"]),
        (2, "target_modules", None),
        (3, "fan_in_fan_out", True),
        (3, "projection_prng_key", -1),
        (3, "projection_prng_key", "0"),
        (3, "bias", "lora_only"),
        (3, "r", 0),
        (3, "layers_pattern", "layers"),
        (4, "lora_ga_config", {"cache_file": "/etc/passwd"}),
        (5, "decompose_factor", -2),
        (5, "decompose_factor", 2.5),
        (5, "decompose_both", "yes"),
        (5, "alpha", "8"),
        (6, "bias", "lora_only"),
        (6, "r", 0),
        (7, "init_weights", "bat"),
        (7, "init_weights", ["mini"]),
        (7, "bias", "miss_only"),
    ],
)
def test_a_field_of_another_kind_that_is_not_served_is_refused_by_name(config: int, field: str, value: Any) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        parse_config(json.dumps({**written(OTHER_KINDS[config]), field: value}).encode())
    assert caught.value.field == field


@pytest.mark.parametrize("kind", ["C3A", "OFT", "CPT", "SHIRA", "lora"])
def test_a_kind_that_is_not_served_is_refused_by_name_with_those_that_are(kind: str) -> None:
    error = refused(peft_type=kind)
    assert error.field == "peft_type"
    assert kind in error.reason
    assert "LN_TUNING" in error.reason


def test_biases_on_b_beside_magnitudes_are_refused_as_peft_does() -> None:
    assert refused(use_dora=True, lora_bias=True).field == "lora_bias"
