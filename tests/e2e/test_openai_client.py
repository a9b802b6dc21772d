"""The official `openai` client, unchanged, against the whole system."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import Patchbay

BASE = "patchbay-embedded"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_models_lists_the_base_and_the_tenant_s_own_adapters(patchbay: Patchbay) -> None:
    ids = {model.id for model in patchbay.openai("acme").models.list()}
    assert {BASE, "acme/one"} <= ids
    assert not any(name.startswith("globex/") for name in ids)


def test_chat_streams_what_it_answers_at_once(patchbay: Patchbay) -> None:
    client = patchbay.openai("acme")
    whole = client.chat.completions.create(model="acme/one", messages=QUESTION, temperature=0, max_tokens=24)  # type: ignore[arg-type]
    assert whole.model == "acme/one:1"
    assert whole.usage is not None
    chunks = list(
        client.chat.completions.create(
            model="acme/one",
            messages=QUESTION,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completions_take_text_ids_n_stop_seed_and_logprobs(patchbay: Patchbay) -> None:
    client = patchbay.openai("acme")
    first, second = (
        client.completions.create(model=BASE, prompt="The", max_tokens=12, n=2, seed=3, logprobs=2) for _ in range(2)
    )
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    assert first.choices[0].logprobs is not None
    assert len(first.choices[0].logprobs.tokens or []) > 0
    ids = client.completions.create(model=BASE, prompt=[20, 21, 22], max_tokens=4, temperature=0)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 3
    whole = client.completions.create(model=BASE, prompt="The", max_tokens=16, temperature=0).choices[0].text
    cut = client.completions.create(model=BASE, prompt="The", max_tokens=16, temperature=0, stop=[whole[4:7]])
    assert cut.choices[0].text == whole[: whole.index(whole[4:7])]


def test_another_tenant_s_adapter_looks_like_one_that_does_not_exist(patchbay: Patchbay) -> None:
    client = patchbay.openai("acme")
    messages = []
    for name in ("globex/two", "globex/missing", "globex/two:1", "globex/two@default"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model=name, messages=QUESTION)  # type: ignore[arg-type]
        assert caught.value.code == "model_not_found"
        messages.append(caught.value.message.replace(name, "X"))
    assert len(set(messages)) == 1


def test_a_wrong_key_and_bad_values_are_refused_with_the_field(patchbay: Patchbay) -> None:
    stranger = openai.OpenAI(base_url=f"{patchbay.http_url}/v1", api_key="pb_wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.BadRequestError) as caught:
        patchbay.openai("acme").chat.completions.create(model=BASE, messages=QUESTION, temperature=3)  # type: ignore[arg-type]
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as too_long:
        patchbay.openai("acme").completions.create(model=BASE, prompt="word " * 5000)
    assert too_long.value.code == "context_length_exceeded"


def test_tenants_share_a_batch_and_get_what_they_get_alone(patchbay: Patchbay) -> None:
    calls = [("acme", BASE), ("acme", "acme/one"), ("globex", "globex/two"), ("globex", BASE)] * 2

    def ask(call: tuple[str, str]) -> str:
        who, model = call
        answer = patchbay.openai(who).completions.create(
            model=model, prompt="Once upon a time", max_tokens=48, temperature=0, extra_body={"ignore_eos": True}
        )
        return answer.choices[0].text

    alone = [ask(call) for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        assert list(pool.map(ask, calls)) == alone
    with patchbay.http("admin") as http:
        metrics = http.get("/metrics").text
    shared = {
        line.split('le="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if line.startswith("patchbay_step_adapters_bucket")
    }
    assert shared["+Inf"] > shared["1.0"]
    for name in ("vllm:num_requests_running", "vllm:time_to_first_token_seconds", "vllm:lora_requests_info"):
        assert name in metrics


def test_a_fine_tuned_adapter_is_served_without_a_restart(patchbay: Patchbay, tmp_path: Path) -> None:
    client = patchbay.openai("acme")
    data = tmp_path / "train.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": "zebra"}]}
        for i in range(24)
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    file = client.files.create(file=data, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix="zebra",
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 6, "batch_size": 8}}},
        extra_body={"peft": {"r": 8, "lora_alpha": 16, "learning_rate": 5e-3}},
    )
    deadline = time.monotonic() + 150
    while job.status not in ("succeeded", "failed", "cancelled") and time.monotonic() < deadline:
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == "acme/zebra:1"
    events = list(client.fine_tuning.jobs.list_events(job.id))
    assert any(event.type == "metrics" for event in events)
    answer = client.chat.completions.create(
        model="acme/zebra", messages=[{"role": "user", "content": "Say 99"}], temperature=0, max_tokens=8
    )
    assert answer.choices[0].message.content == "zebra"
    assert answer.model == "acme/zebra:1"


def test_a_new_version_serves_the_next_request_and_rollback_the_old_one(
    patchbay: Patchbay, adapter_folders: list[Path]
) -> None:
    def ask(model: str) -> tuple[str, str]:
        answer = patchbay.openai("acme").completions.create(
            model=model, prompt="Hello", max_tokens=16, temperature=0, extra_body={"ignore_eos": True}
        )
        return answer.model, answer.choices[0].text

    patchbay.upload("acme", "acme/flip", adapter_folders[0])
    old = ask("acme/flip")
    patchbay.upload("acme", "acme/flip", adapter_folders[2])
    new = ask("acme/flip")
    assert (old[0], new[0]) == ("acme/flip:1", "acme/flip:2")
    assert old[1] != new[1]
    assert ask("acme/flip:1") == old
    with patchbay.http("acme") as http:
        assert http.post("/v1/adapters/acme/flip/rollback", json={"alias": "default"}).status_code == 200
    assert ask("acme/flip") == old
