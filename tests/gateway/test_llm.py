"""The offline entry: prompts in, completions out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapters_store.errors import AdapterInvalid
from gateway import LLM, SamplingParams
from gateway.errors import ConfigInvalid, ContextLengthExceeded
from tests.tiny import load_oracle, make_adapter, make_base

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("llm") / "base")


@pytest.fixture
def llm(base: Path) -> Iterator[LLM]:
    with LLM(str(base), quantization="none", device="cpu", kv_cache_tokens=2048, max_lora_rank=16) as llm:
        yield llm


def oracle_tokens(base: Path, adapter: Path | None, count: int) -> list[int]:
    """Greedy tokens of transformers', or peft's, own model."""
    model, ids = load_oracle(base, adapter), list(PROMPT)
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_each_prompt_runs_with_its_adapter_and_gives_the_oracle_s_tokens(llm: LLM, base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "own", rank=8, seed=3)
    own = llm.load_adapter(tmp_path / "own")
    plain, adapted, again = llm.generate([PROMPT] * 3, GREEDY, adapters=[None, own, own])
    assert plain.outputs[0].token_ids == oracle_tokens(base, None, 6)
    assert adapted.outputs[0].token_ids == again.outputs[0].token_ids == oracle_tokens(base, tmp_path / "own", 6)
    assert plain.outputs[0].token_ids != adapted.outputs[0].token_ids
    assert plain.usage is not None
    assert (plain.usage.prompt_tokens, plain.usage.completion_tokens) == (20, 6)
    llm._engine.check_integrity()


def test_outputs_come_in_the_prompts_order_with_their_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=1) for n in (9, 1, 4)]
    outputs = llm.generate(["one", "two", "three"], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 1, 4]
    assert [len(output.outputs[0].logprobs) for output in outputs] == [9, 1, 4]
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
    assert outputs[0].prompt_token_ids == llm.tokenizer.encode("one")
    assert outputs[1].outputs[0].text == llm.tokenizer.decode(outputs[1].outputs[0].token_ids)


def test_several_completions_of_one_prompt(llm: LLM) -> None:
    (output,) = llm.generate("hello", SamplingParams(n=3, max_tokens=5, seed=1, ignore_eos=True))
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1


def test_a_conversation_is_the_prompt_that_its_template_makes(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    text = llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    answers = llm.chat([messages, messages], GREEDY)
    assert [answer.prompt_token_ids for answer in answers] == [ids, ids]
    assert answers[0].outputs[0].token_ids == llm.generate(ids, GREEDY)[0].outputs[0].token_ids
    assert llm.chat(messages, GREEDY)[0].outputs[0].token_ids == answers[0].outputs[0].token_ids


def test_a_prompt_that_is_refused_runs_nothing(llm: LLM) -> None:
    with pytest.raises(ContextLengthExceeded):
        llm.generate([[5], [5] * 5000], GREEDY)
    llm._engine.check_integrity()
    assert len(llm.generate([5], GREEDY)) == 1


def test_what_fails_in_a_step_leaves_an_engine_that_can_go_on(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llm._engine.runner, "execute", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate([5], GREEDY)
    llm._engine.check_integrity()
    assert len(llm.generate([5], GREEDY)[0].outputs[0].token_ids) == 6


def test_counts_that_differ_settings_and_adapters_that_are_unknown_are_refused(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate(["one"], [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="0 sampling_params for 1 prompts"):
        llm.generate(["one"], [])
    with pytest.raises(AdapterInvalid, match=r"adapter_config\.json"):
        llm.load_adapter(tmp_path)
    with pytest.raises(ConfigInvalid, match=r"unknown key engine\.speed"):
        LLM("embedded", speed="high")
