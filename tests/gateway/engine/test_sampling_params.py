"""What a request may ask of sampling: each bound is named by the one that was passed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gateway.engine.sampling_params import SamplingParams
from gateway.errors import InvalidRequest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 2.5}, "temperature must be at most 2.0, not 2.5"),
        ({"temperature": math.nan}, "temperature must be at least 0.0, not nan"),
        ({"top_p": 0.0}, "top_p must be above 0.0, not 0.0"),
        ({"top_p": math.nan}, "top_p must be above 0.0, not nan"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty must be at least 0.01, not 1e-40"),
        ({"n": 0}, "n must be at least 1, not 0"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens must be at most 4, not 5"),
        ({"logit_bias": {3: -101.0}}, "logit_bias must be at least -100.0, not -101.0"),
        ({"stop": ("",)}, "stop strings must not be empty"),
        ({"max_tokens": 3.5}, "max_tokens must be a whole number, not 3.5"),
        ({"logprobs": True}, "logprobs must be a whole number, not True"),
        ({"top_k": 2.0}, "top_k must be a whole number, not 2.0"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids must be a whole number, not 'a'"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias must be a whole number, not '3'"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_the_bound(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**fields)
    assert str(caught.value) == message
    assert caught.value.param == message.split()[0]


def test_the_bounds_themselves_are_allowed() -> None:
    SamplingParams(temperature=2.0, top_p=1.0, top_k=-1, min_p=1.0, n=1, seed=-(1 << 63), logit_bias={0: 100.0})


def test_a_single_stop_string_lists_and_none_are_taken() -> None:
    given: dict[str, Any] = {"stop": "end", "stop_token_ids": [3, 4], "logit_bias": None}
    assert SamplingParams(**given) == SamplingParams(stop=("end",), stop_token_ids=(3, 4))
    given = {"stop": ["a", "b"], "stop_token_ids": None}
    assert SamplingParams(**given) == SamplingParams(stop=("a", "b"))
    given = {"stop": None}
    assert SamplingParams(**given) == SamplingParams()
