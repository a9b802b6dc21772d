from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gateway.engine.prompt import PromptEncoder
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.errors import ContextLengthExceeded, GatewayError, InvalidRequest
from tests.tiny import make_tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    return PromptEncoder(make_tokenizer(tmp_path_factory.mktemp("tokenizer")), 320, 64, 40)


def request(prompt: Any = "the fox", messages: Any = None, **params: Any) -> GenerateRequest:
    return GenerateRequest(
        "r", SamplingParams(**params), prompt=None if messages is not None else prompt, messages=messages
    )


def test_virtual_tokens_take_their_part_of_the_context(encoder: PromptEncoder) -> None:
    adapted = replace(request(), adapter=AdapterRef("t/a:1", "0" * 64, 0, num_virtual_tokens=20))
    assert encoder.max_tokens(adapted, 10) == 34
    encoder.encode(replace(adapted, prompt=list(range(43))))
    with pytest.raises(ContextLengthExceeded, match="adapter's virtual tokens take 20; the prompt has 44"):
        encoder.encode(replace(adapted, prompt=list(range(44))))


def test_messages_are_rendered_by_the_base_s_template(encoder: PromptEncoder) -> None:
    ids = encoder.encode(request(messages=[{"role": "user", "content": "fox"}]))
    assert encoder.tokenizer.decode(ids) == "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("bad", "param", "error"),
    [
        (request(""), "prompt", InvalidRequest),
        (request([]), "prompt", InvalidRequest),
        (request([1, 320]), "prompt", InvalidRequest),
        (request([-1]), "prompt", InvalidRequest),
        (request(list(range(64))), "prompt", ContextLengthExceeded),
        (request(logit_bias={999: 1.0}), "logit_bias", InvalidRequest),
        (request(stop_token_ids=(320,)), "stop_token_ids", InvalidRequest),
    ],
)
def test_a_bad_prompt_is_refused_with_its_field(
    encoder: PromptEncoder, bad: GenerateRequest, param: str, error: type[GatewayError]
) -> None:
    with pytest.raises(error) as caught:
        encoder.encode(bad)
    assert caught.value.param == param


def test_max_tokens_must_fit_the_context_and_the_default_does(encoder: PromptEncoder) -> None:
    assert encoder.max_tokens(request(), 10) == 40
    assert encoder.max_tokens(request(), 50) == 14
    assert encoder.max_tokens(request(max_tokens=54), 10) == 54
    with pytest.raises(ContextLengthExceeded):
        encoder.max_tokens(request(max_tokens=55), 10)
