"""AdaLoRA's masks are read as peft reads them, and what they cannot mean is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from adapters_store.adapter_contents import AdapterContents
from adapters_store.base_spec import BaseSpec
from adapters_store.config_schema import parse_config
from adapters_store.errors import AdapterInvalid

Q0 = "model.layers.0.self_attn.q_proj.lora_E"
K0 = "model.layers.0.self_attn.k_proj.lora_E"


def contents(base: BaseSpec, **changes: Any) -> AdapterContents:
    fields = {"peft_type": "ADALORA", "init_r": 3, "target_modules": ["q_proj"], "total_step": 9, **changes}
    return parse_config(json.dumps(fields).encode()).contents(base)


def test_a_mask_says_how_many_ranks_are_left_and_none_says_all(base: BaseSpec) -> None:
    deltas = contents(base, rank_pattern={Q0: [True, False, True]}, lora_alpha=6).deltas
    assert [(delta.layers, delta.rank, delta.peft_rank) for delta in deltas] == [((0,), 2, 3), ((1,), 3, 3)]
    assert {delta.scale for delta in deltas} == {6 / (3 + 1e-5)}


@pytest.mark.parametrize(
    ("field", "value"),
    [("r", 40), ("use_rslora", True), ("alpha_pattern", {"q_proj": 2}), ("init_lora_weights", "pissa"), ("tinit", 3)],
)
def test_what_peft_does_not_read_changes_nothing(base: BaseSpec, field: str, value: Any) -> None:
    assert contents(base, **{field: value}) == contents(base)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("rank_pattern", {Q0: [True, True]}, "masks 2 ranks, and init_r is 3"),
        ("rank_pattern", {K0: [True] * 3}, "k_proj.lora_E"),
        ("rank_pattern", {Q0.replace("lora_E", "lora_A"): [True] * 3}, "not the lora_E"),
        ("rank_pattern", {Q0: [1, 0, 1]}, "bool"),
        ("rank_pattern", {"q_proj": 4}, "tuple"),
        ("init_r", 0, "greater than or equal to 1"),
        ("lora_alpha", 0, "greater than 0"),
        ("use_dora", True, "magnitudes"),
        ("layer_replication", [[0, 1]], "number of layers"),
    ],
)
def test_what_it_cannot_mean_is_refused_by_name(base: BaseSpec, field: str, value: Any, reason: str) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        contents(base, **{field: value})
    assert caught.value.field == field
    assert reason in caught.value.reason
