"""Completions and models through the official client, with strict validation of every answer."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig

from gateway.errors import EngineUnavailable
from tests.gateway.server.conftest import TenantClient
from tests.gateway.server.doors import Doors
from tests.tiny import make_prompt_adapter

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
MESSAGES: Any = [{"role": "user", "content": "the quick brown fox"}]


def test_completion_of_text_and_of_its_tokens_is_the_same(doors: Doors, tenant: TenantClient) -> None:
    prompt = "the quick brown"
    tokens = doors.router.engine._engine.model.tokenizer.encode(prompt)
    by_text = tenant.openai.completions.create(model=doors.model, prompt=prompt, **GREEDY)
    by_tokens = tenant.openai.completions.create(model=doors.model, prompt=tokens, **GREEDY)
    assert by_text.choices[0].text == by_tokens.choices[0].text != ""
    assert by_text.choices[0].finish_reason == "length"
    assert by_text.usage is not None
    assert (by_text.usage.prompt_tokens, by_text.usage.completion_tokens) == (len(tokens), 8)
    assert by_text.usage.total_tokens == len(tokens) + 8
    assert by_text.model == doors.model
    assert by_text.id.startswith("cmpl-")


def test_several_prompts_answer_in_order(doors: Doors, tenant: TenantClient) -> None:
    prompts = ["the quick", "lazy dog over", "jumps"]
    together = tenant.openai.completions.create(model=doors.model, prompt=prompts, n=2, **GREEDY)
    alone = [tenant.openai.completions.create(model=doors.model, prompt=p, **GREEDY) for p in prompts]
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [c.text for c in together.choices] == [one.choices[0].text for one in alone for _ in range(2)]
    assert together.usage is not None
    assert together.usage.completion_tokens == 6 * 8
    assert together.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone if one.usage)


@pytest.mark.parametrize("prompt", ["the quick brown", ["the quick", "lazy dog"]])
def test_streamed_completion_equals_the_whole_one(doors: Doors, tenant: TenantClient, prompt: Any) -> None:
    whole = tenant.openai.completions.create(model=doors.model, prompt=prompt, **GREEDY)
    stream = tenant.lenient.completions.create(
        model=doors.model, prompt=prompt, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    texts, reasons, usages = ["", ""], dict[int, str](), []
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        usages.append(chunk.usage)
    assert texts[: len(whole.choices)] == [choice.text for choice in whole.choices]
    assert set(reasons.values()) == {"length"}
    assert len(reasons) == len(whole.choices)
    assert usages[-1] is not None
    assert whole.usage is not None
    assert usages[-1].completion_tokens == whole.usage.completion_tokens
    assert all(usage is None for usage in usages[:-1])


def test_chat_stream_begins_with_the_role_and_ends_with_done(doors: Doors, tenant: TenantClient) -> None:
    # Long enough that a busy machine, on which tokens that are ready together go in one chunk, still sends several.
    sampling = GREEDY | {"max_tokens": 64}
    whole = tenant.openai.chat.completions.create(model=doors.model, messages=MESSAGES, **sampling)
    chunks = list(tenant.openai.chat.completions.create(model=doors.model, messages=MESSAGES, stream=True, **sampling))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 4, "a stream that comes in one piece is no stream"
    body = {"model": doors.model, "messages": MESSAGES, "stream": True, "max_tokens": 2}
    raw = tenant.http.post("/v1/chat/completions", json=body)
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.text.endswith("data: [DONE]\n\n")


def test_chat_n_streams_every_choice(doors: Doors, tenant: TenantClient) -> None:
    settings: dict[str, Any] = {"n": 3, "seed": 5, "max_tokens": 6, "extra_body": {"ignore_eos": True}}
    whole = tenant.openai.chat.completions.create(model=doors.model, messages=MESSAGES, **settings)
    texts, roles = [""] * 3, [0] * 3
    for chunk in tenant.openai.chat.completions.create(model=doors.model, messages=MESSAGES, stream=True, **settings):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role == "assistant"
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == [1, 1, 1]
    assert len(set(texts)) == 3, "three samples of one seed must differ"


def test_content_parts_and_echoed_answers_are_accepted(doors: Doors, tenant: TenantClient) -> None:
    answer = tenant.openai.chat.completions.create(model=doors.model, messages=MESSAGES, **GREEDY)
    parts = [{"role": "user", "content": [{"type": "text", "text": "the quick brown fox"}]}]
    same = tenant.openai.chat.completions.create(model=doors.model, messages=parts, **GREEDY)  # type: ignore[arg-type]
    assert same.choices[0].message.content == answer.choices[0].message.content
    echoed: Any = [*MESSAGES, answer.choices[0].message.model_dump(), {"role": "user", "content": "go on"}]
    assert tenant.openai.chat.completions.create(model=doors.model, messages=echoed, **GREEDY).choices


def test_chat_logprobs(doors: Doors, tenant: TenantClient) -> None:
    answer = tenant.openai.chat.completions.create(
        model=doors.model, messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 8
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob), "greedy takes the most likely token"
        assert token.bytes is None or bytes(token.bytes).decode() == token.token


def test_legacy_logprobs_have_running_offsets(doors: Doors, tenant: TenantClient) -> None:
    settings: dict[str, Any] = {"model": doors.model, "prompt": "the quick", "logprobs": 2, **GREEDY}
    whole = tenant.openai.completions.create(**settings).choices[0].logprobs
    assert whole is not None
    assert whole.tokens is not None
    assert whole.text_offset is not None
    assert whole.top_logprobs is not None
    assert len(whole.tokens) == 8
    assert whole.text_offset[0] == 0
    assert whole.text_offset == sorted(whole.text_offset)
    assert all(token in top for token, top in zip(whole.tokens, whole.top_logprobs, strict=True))
    streamed = [
        token
        for chunk in tenant.lenient.completions.create(**settings, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.tokens or ()
    ]
    assert streamed == whole.tokens


def test_sampling_fields_reach_the_engine(doors: Doors, tenant: TenantClient) -> None:
    token = 70
    forced = tenant.openai.chat.completions.create(
        model=doors.model, messages=MESSAGES, max_completion_tokens=3, logit_bias={str(token): 100}, temperature=0
    )
    tokenizer = doors.router.engine._engine.model.tokenizer
    assert forced.choices[0].message.content == tokenizer.decode([token] * 3)
    assert forced.usage is not None
    assert forced.usage.completion_tokens == 3
    stopped = tenant.openai.completions.create(
        model=doors.model,
        prompt="the",
        logit_bias={str(token): 100},
        extra_body={"stop_token_ids": [token], "min_tokens": 0},
    )
    assert stopped.choices[0].finish_reason == "stop"
    by_text = tenant.openai.completions.create(
        model=doors.model, prompt="the", logit_bias={str(token): 100}, stop=tokenizer.decode([token])
    )
    assert (by_text.choices[0].text, by_text.choices[0].finish_reason) == ("", "stop")


def test_guessing_ahead_is_asked_for_and_accounted(doors: Doors, tenant: TenantClient) -> None:
    settings: dict[str, Any] = {"model": doors.model, "prompt": "the", "logit_bias": {"70": 100}, "max_tokens": 12}
    plain = tenant.openai.completions.create(**settings)
    guessed = tenant.openai.completions.create(**settings, extra_body={"num_speculative_tokens": 4})
    assert guessed.choices[0].text == plain.choices[0].text
    for answer, accepted in ((plain, False), (guessed, True)):
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 12
        details = answer.usage.completion_tokens_details
        assert details is not None
        assert bool(details.accepted_prediction_tokens) == accepted
    with pytest.raises(openai.BadRequestError, match="at most 8 here, not 9") as refused:
        tenant.openai.completions.create(**settings, extra_body={"num_speculative_tokens": 9})
    assert refused.value.param == "num_speculative_tokens"


def test_max_tokens_has_a_default(doors: Doors, tenant: TenantClient) -> None:
    answer = tenant.openai.completions.create(
        model=doors.model, prompt="the", temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == doors.context.config.engine.default_max_tokens


def test_adapter_answers_under_every_name_and_tells_its_version(
    doors: Doors, tenant: TenantClient, adapter: Path, other_adapter: Path
) -> None:
    assert tenant.upload("helper", adapter).status_code == 200
    assert tenant.upload("helper", other_adapter, alias="next").json()["ref"] == f"{tenant.id}/helper:2"
    ask: dict[str, Any] = {"prompt": "the quick brown", **GREEDY}
    base = tenant.openai.completions.create(model=doors.model, **ask)
    named = tenant.openai.completions.create(model=f"{tenant.id}/helper", **ask)
    first = tenant.openai.completions.create(model=f"{tenant.id}/helper:1", **ask)
    second = tenant.openai.completions.create(model=f"{tenant.id}/helper@next", **ask)
    assert named.model == first.model == f"{tenant.id}/helper:1"
    assert second.model == f"{tenant.id}/helper:2"
    assert named.choices[0].text == first.choices[0].text
    assert len({base.choices[0].text, first.choices[0].text, second.choices[0].text}) == 3


def test_models_are_the_base_and_the_tenants_own(
    doors: Doors, tenant: TenantClient, helper: str, adapter: Path, admin: httpx.Client
) -> None:
    mine = tenant
    assert mine.upload("helper", adapter, alias="prod").status_code == 200
    assert mine.http.put(f"/v1/adapters/{mine.id}/helper/aliases/default", json={"version": 1}).is_success
    listed = {model.id: model for model in mine.openai.models.list()}
    assert set(listed) == {doors.model, f"{mine.id}/helper", f"{mine.id}/helper@prod"}
    card = listed[f"{mine.id}/helper"].model_dump()
    assert (card["root"], card["parent"]) == (f"{mine.id}/helper:1", doors.model)
    assert card["owned_by"] == mine.id
    assert mine.openai.models.retrieve(f"{mine.id}/helper:1").id == f"{mine.id}/helper:1"
    with pytest.raises(openai.NotFoundError):
        mine.openai.models.retrieve(helper)
    everything = {model["id"] for model in admin.get("/v1/models").json()["data"]}
    assert {f"{mine.id}/helper", helper} <= everything


@pytest.mark.parametrize(
    ("given", "meant"), [({}, 0), ({"priority": None}, 0), ({"priority": 7}, 7), ({"priority": -2}, -2)]
)
def test_a_tenants_priority_reaches_the_engine(
    doors: Doors, tenant: TenantClient, given: dict[str, Any], meant: int
) -> None:
    for route, body in (("completions", {"prompt": "the"}), ("chat/completions", {"messages": MESSAGES})):
        asked = {"model": doors.model, "max_tokens": 1} | body | given
        assert tenant.http.post(f"/v1/{route}", json=asked).status_code == 200
        assert (doors.router.asked[-1].priority, doors.router.asked[-1].tenant) == (meant, tenant.id)


def test_a_tenants_weight_reaches_the_engine(doors: Doors, tenant: TenantClient) -> None:
    for key, weight in ((tenant.key, 1.0), (doors.new_tenant("heavy"), 3.0)):
        body = {"model": doors.model, "prompt": "the", "max_tokens": 1}
        headers = {"authorization": f"Bearer {key}"}
        httpx.post(f"{doors.url}/v1/completions", json=body, headers=headers).raise_for_status()
        assert doors.router.asked[-1].tenant_weight == weight


def test_an_admins_priority_has_no_floor(doors: Doors, admin: httpx.Client) -> None:
    body = {"model": doors.model, "prompt": "the", "max_tokens": 1, "priority": -1000}
    assert admin.post("/v1/completions", json=body).status_code == 200
    assert doors.router.asked[-1].priority == -1000


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"seed": 1 << 63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 1025}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1" + "0" * 30: 1}}, "logit_bias"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids[0]"),
        ({"frequency-penalty": 1}, "frequency-penalty"),
        ({"cut \ud83d": 1}, "a key of the body"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"frequency": 1}, "frequency"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "\ud83d"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, "messages[0].colour"),
        ({"model": None}, "model"),
        ({"stream_options": {"include_use": True}}, "stream_options.include_use"),
        ({"max_tokens": 9000}, "max_tokens"),
        ({"priority": -3}, "priority"),
        ({"priority": 1 << 31}, "priority"),
    ],
)
def test_bad_chat_fields_are_refused_by_name(
    doors: Doors, tenant: TenantClient, fields: dict[str, Any], param: str
) -> None:
    body = json.dumps({"model": doors.model, "messages": MESSAGES} | fields)  # httpx itself refuses half a character
    response = tenant.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": [999_999]}, "prompt"),
        ({"prompt": [1 << 63]}, "prompt"),
        ({"prompt": ["whole", "cut \ud83d"]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 4}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": MESSAGES}, "messages"),
    ],
)
def test_bad_completion_fields_are_refused_by_name(
    doors: Doors, tenant: TenantClient, fields: dict[str, Any], param: str
) -> None:
    body = json.dumps({"model": doors.model, "prompt": "the"} | fields)
    response = tenant.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text


def test_inert_fields_of_openai_are_accepted(doors: Doors, tenant: TenantClient) -> None:
    answer = tenant.openai.chat.completions.create(
        model=doors.model,
        messages=MESSAGES,
        max_tokens=1,
        user="someone",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        prompt_cache_key="k",
        safety_identifier="s",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        tool_choice="none",
        tools=[],
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


def test_a_client_that_leaves_a_stream_cancels_it(doors: Doors, tenant: TenantClient) -> None:
    body = {"model": doors.model, "prompt": "the", "max_tokens": 8000, "ignore_eos": True, "stream": True}
    before = len(doors.router.finished)
    with tenant.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    assert _ended(doors, before).finish_reason == "cancelled"


def test_a_client_that_leaves_while_it_waits_cancels_its_call(doors: Doors, tenant: TenantClient) -> None:
    body = {"model": doors.model, "prompt": ["the", "a"], "max_tokens": 8000, "ignore_eos": True}
    before = len(doors.router.finished)
    with pytest.raises(httpx.ReadTimeout):
        tenant.http.post("/v1/completions", json=body, timeout=1.5)
    assert _ended(doors, before).finish_reason == "cancelled"
    assert _ended(doors, before + 1).finish_reason == "cancelled"


def _ended(doors: Doors, position: int) -> Any:
    deadline = time.monotonic() + 20
    while len(doors.router.finished) <= position:
        assert time.monotonic() < deadline, "the request was not ended"
        time.sleep(0.02)
    return doors.router.finished[position]


def test_a_failure_before_the_first_token_is_a_status_also_for_streams(doors: Doors, tenant: TenantClient) -> None:
    body = {"model": doors.model, "prompt": [400], "stream": True}
    response = tenant.http.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


def test_a_replica_lost_in_a_stream_is_an_error_event_and_no_defect_to_log(
    doors: Doors, tenant: TenantClient, caplog: pytest.LogCaptureFixture
) -> None:
    lost = EngineUnavailable("The replica of this request was lost. Retry.")
    stream = tenant.openai.chat.completions.create(
        model=doors.model, messages=MESSAGES, max_tokens=8000, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    doors.run(doors.router.fail(lost))
    with pytest.raises(openai.APIError, match="was lost") as failure:
        list(stream)
    assert failure.value.code == "engine_unavailable"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_door_that_is_not_ready_says_so_and_when_to_retry(doors: Doors, tenant: TenantClient) -> None:
    with doors.not_ready("draining"):
        response = tenant.http.post("/v1/completions", json={"model": doors.model, "prompt": "the"})
        assert tenant.http.get("/readyz").status_code == 503
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "engine_unavailable"
    assert tenant.http.get("/readyz").status_code == 200


def test_stream_chunks_are_compact_json(doors: Doors, tenant: TenantClient) -> None:
    body = {"model": doors.model, "messages": MESSAGES, "stream": True, "max_tokens": 3, "ignore_eos": True}
    lines = tenant.http.post("/v1/chat/completions", json=body).text.split("\n\n")
    chunk = json.loads(lines[1].removeprefix("data: "))
    assert set(chunk) == {"id", "object", "created", "model", "choices"}
    assert set(chunk["choices"][0]) == {"index", "delta", "logprobs", "finish_reason"}


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"),
    ],
    ids=["prompt", "prefix"],
)
def test_virtual_tokens_answer_and_are_not_billed(
    doors: Doors, tenant: TenantClient, base: Path, tmp_path: Path, config: PeftConfig
) -> None:
    version = tenant.upload("soft", make_prompt_adapter(base, tmp_path / "soft", config)).json()
    assert (version["kind"], version["num_virtual_tokens"], version["rank"]) == (str(config.peft_type.value), 20, 0)
    ask: dict[str, Any] = {"prompt": "the quick brown", **GREEDY}
    plain = tenant.openai.completions.create(model=doors.model, **ask)
    for cached in (0, 0):  # the second finds the virtual tokens' blocks, which are not the prompt's
        soft = tenant.openai.completions.create(model=f"{tenant.id}/soft", **ask)
        assert soft.choices[0].text != plain.choices[0].text
        assert soft.usage is not None
        assert plain.usage is not None
        assert soft.usage.prompt_tokens == plain.usage.prompt_tokens
        assert soft.usage.prompt_tokens_details is not None
        assert soft.usage.prompt_tokens_details.cached_tokens == cached


def test_more_virtual_tokens_than_the_engine_takes_are_refused(
    tenant: TenantClient, base: Path, tmp_path: Path
) -> None:
    config = PromptTuningConfig(num_virtual_tokens=513, task_type="CAUSAL_LM")
    response = tenant.upload("soft", make_prompt_adapter(base, tmp_path / "soft", config))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "num_virtual_tokens"
    assert "limit of 512" in response.json()["error"]["message"]
