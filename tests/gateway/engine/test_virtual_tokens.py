"""Prompt, P- and prefix tuning against `peft`, in one batch with LoRA and the bare base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file

from adapters_store.errors import AdapterLoadFailed
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import GenerateRequest, TokenDelta
from gateway.engine.stats import StepOutput
from gateway.errors import ContextLengthExceeded
from tests.gateway.engine.conftest import TinyWorld
from tests.gateway.engine.test_in_flight import CALLS, Call, serve
from tests.gateway.engine.test_llm_engine import PROMPT, drain, oracle_tokens, request, run, tokens
from tests.gateway.engine.test_mirror import OtherRank
from tests.tiny import load_oracle, make_base, make_prompt_adapter, store_adapter

MakeEngine = Callable[..., LLMEngine]
Oracles = dict[str | None, torch.nn.Module]
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
KINDS = {
    "prompt": PromptTuningConfig(num_virtual_tokens=7, **TASK),
    "p_tuning": PromptEncoderConfig(num_virtual_tokens=6, encoder_hidden_size=24, **TASK),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5, **TASK),
    "projected": PrefixTuningConfig(num_virtual_tokens=8, prefix_projection=True, encoder_hidden_size=20, **TASK),
    "long": PromptTuningConfig(num_virtual_tokens=30, **TASK),
    "long_prefix": PrefixTuningConfig(num_virtual_tokens=30, **TASK),
}
NUM_VIRTUAL = {name: config.num_virtual_tokens for name, config in KINDS.items()}
NAMES = [*KINDS, "a4", "b20", None]


@pytest.fixture(scope="module")
def world(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """The tiny world and an adapter of each kind."""
    root = tmp_path_factory.mktemp("virtual")
    folders = {n: make_prompt_adapter(world.base, root / n, c, seed=i) for i, (n, c) in enumerate(KINDS.items())}
    refs = {n: store_adapter(world.base, folder, world.blobs, f"t/{n}:1") for n, folder in folders.items()}
    return replace(world, adapters=world.adapters | folders, refs=world.refs | refs)


@pytest.fixture(scope="module")
def oracles(world: TinyWorld) -> Oracles:
    return {name: load_oracle(world.base, world.adapters[name] if name else None) for name in NAMES}


def assert_is_peft_s(oracle: torch.nn.Module, prompt: Sequence[int], deltas: list[TokenDelta]) -> None:
    """Tokens, and log-probabilities of the 20 likeliest at each, within 1e-5 of the logits' scale."""
    ids = [*prompt, *tokens(deltas)]
    with torch.no_grad():
        logits = oracle(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]
    expected = logits[-len(ids) :].log_softmax(-1)[len(prompt) - 1 :]
    bound = 1e-5 * float(logits.abs().max())
    for delta, at in zip(deltas, expected, strict=False):
        assert delta.token_ids == [int(at.argmax())]
        top = {token_id: logprob for token_id, _, logprob in delta.logprobs[0].top}
        assert top == pytest.approx({token_id: float(at[token_id]) for token_id in top}, abs=bound)


def mixed(world: TinyWorld, **params: Any) -> list[GenerateRequest]:
    """A request of each kind, prompts of different lengths."""
    return [request(world, str(n), PROMPT[i : i + 9 + 2 * i], n, **params) for i, n in enumerate(NAMES)]


def usage(deltas: list[TokenDelta]) -> tuple[int, int, int]:
    """Tokens of the prompt, of these cached, and of the output."""
    counted = deltas[-1].usage
    assert counted is not None
    return counted.prompt_tokens, counted.cached_tokens, counted.completion_tokens


@pytest.mark.parametrize("budget", [16, 1024])
def test_all_kinds_in_one_batch_are_each_peft_s(
    world: TinyWorld, make_engine: MakeEngine, oracles: Oracles, budget: int
) -> None:
    """Also where a chunk is shorter than what comes before a prompt."""
    engine = make_engine(num_adapter_slots=8, max_num_batched_tokens=budget)
    done = run(engine, *mixed(world, logprobs=20))
    for i, name in enumerate(NAMES):
        assert_is_peft_s(oracles[name], PROMPT[i : i + 9 + 2 * i], done[str(name)])


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_a_sliding_window_passes_over_virtual_tokens_as_peft_s_does(
    world: TinyWorld, build_engine: MakeEngine, tmp_path: Path, family: str
) -> None:
    overrides: dict[str, Any] = {"sliding_window": 8, "use_sliding_window": True, "layer_types": None}
    if family == "qwen3":
        overrides["layer_types"] = ["full_attention", "sliding_attention"]
    base = make_base(tmp_path / "base", family, **{k: v for k, v in overrides.items() if v is not None})
    engine = build_engine(base=str(base))
    for name in ("prompt", "prefix"):
        folder = make_prompt_adapter(base, tmp_path / name, KINDS[name])
        ref = store_adapter(base, folder, world.blobs, f"t/{name}:1")
        asked = replace(request(world, name, logprobs=20), adapter=ref)
        assert_is_peft_s(load_oracle(base, folder), PROMPT, run(engine, asked)[name])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [1, 3])
def test_a_prompt_of_few_tokens_is_enough(
    world: TinyWorld, make_engine: MakeEngine, oracles: Oracles, name: str, length: int
) -> None:
    engine = make_engine()
    done = run(engine, request(world, "r", PROMPT[:length], name, logprobs=20), request(world, "b", PROMPT[:length]))
    assert_is_peft_s(oracles[name], PROMPT[:length], done["r"])


@pytest.mark.parametrize("name", KINDS)
def test_requests_of_an_adapter_share_its_blocks_and_pay_for_none(
    world: TinyWorld, make_engine: MakeEngine, name: str
) -> None:
    engine = make_engine()
    first = run(engine, request(world, "1", adapter=name))["1"]
    again = run(engine, request(world, "2", adapter=name))["2"]
    assert tokens(first) == tokens(again)
    num_blocks = (NUM_VIRTUAL[name] + len(PROMPT) - 1) // 4
    assert usage(first) == (len(PROMPT), 0, 12)
    assert usage(again) == (len(PROMPT), 4 * num_blocks - NUM_VIRTUAL[name], 12)
    other = run(engine, request(world, "3", [99, *PROMPT], adapter=name))["3"]
    assert usage(other) == (len(PROMPT) + 1, 0, 12)
    assert engine.stats().prefix_hits == 4 * num_blocks + 4 * (NUM_VIRTUAL[name] // 4)
    assert engine.stats().prompt_tokens == 3 * len(PROMPT) + 1


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_adapters_share_no_block(world: TinyWorld, make_engine: MakeEngine, tmp_path: Path, name: str) -> None:
    """Not even of as many virtual tokens, all but one alike."""
    folder = make_prompt_adapter(world.base, tmp_path / "other", KINDS[name])
    weights = load_file(world.adapters[name] / "adapter_model.safetensors")
    weights["prompt_embeddings"][-1] += 1.0
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    other = replace(
        request(world, "o", adapter=name), adapter=store_adapter(world.base, folder, world.blobs, "t/other:1")
    )
    engine = make_engine()
    run(engine, request(world, "r", adapter=name))
    done = run(engine, other)["o"]
    assert tokens(done) == oracle_tokens(load_oracle(world.base, folder), PROMPT, 12)
    assert engine.stats().prefix_hits == 0


@pytest.mark.parametrize("chosen", [{"enable_prefix_caching": False}, {}, {"kv_host_bytes": 1 << 20}])
def test_preemption_changes_no_token(world: TinyWorld, make_engine: MakeEngine, chosen: dict[str, Any]) -> None:
    roomy, tight = (make_engine(num_adapter_slots=8, kv_cache_tokens=tokens, **chosen) for tokens in (2048, 160))
    wanted, got = (run(engine, *mixed(world, max_tokens=30)) for engine in (roomy, tight))
    assert tight.stats().num_preemptions > 0
    assert {r: tokens(d) for r, d in got.items()} == {r: tokens(d) for r, d in wanted.items()}
    if "kv_host_bytes" in chosen:
        assert tight.stats().kv_host_loaded > 0


@pytest.mark.parametrize("name", KINDS)
def test_siblings_share_the_prompt_and_what_comes_before(world: TinyWorld, make_engine: MakeEngine, name: str) -> None:
    engine = make_engine(enable_prefix_caching=False)
    done = run(engine, request(world, "r", PROMPT[:10], name, n=3, temperature=1.0, seed=7))["r"]
    apart = make_engine()
    alone = run(apart, request(world, "r", PROMPT[:10], name, temperature=1.0, seed=7))["r"]
    assert tokens(done, 0) == tokens(alone)
    assert len({tuple(tokens(done, i)) for i in range(3)}) == 3
    assert usage(done) == (10, 0, 36)


@pytest.mark.parametrize("name", ["long", "long_prefix"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
def test_cancelling_at_any_stage_frees_everything(
    world: TinyWorld, make_engine: MakeEngine, name: str, steps: int
) -> None:
    engine = make_engine(max_num_batched_tokens=16)
    for call_id in ("x", "y"):
        one = request(world, call_id, adapter=name, n=2)
        engine.add(one, engine.encode(one))
    for _ in range(steps):
        engine.step()
    engine.cancel("x", StepOutput())
    assert len(tokens(drain(engine).get("y", []))) <= 12


@pytest.mark.parametrize("name", KINDS)
def test_penalties_see_the_prompt_and_no_virtual_token(
    world: TinyWorld, make_engine: MakeEngine, oracles: Oracles, name: str
) -> None:
    """With a row behind it, whose logits a virtual id would reach."""
    penalties = {"repetition_penalty": 1.7, "frequency_penalty": 0.3, "presence_penalty": 0.2}
    engine = make_engine()
    done = run(engine, request(world, "r", PROMPT, name, **penalties), request(world, "b", PROMPT))
    ids = list(PROMPT)
    for token in tokens(done["r"]):
        with torch.no_grad():
            logits = oracles[name](input_ids=torch.tensor([ids])).logits[0, -1]
        seen = torch.tensor(ids)
        put_out = torch.bincount(seen[len(PROMPT) :], minlength=320)
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.7, logits[seen] * 1.7)
        logits -= 0.3 * put_out + 0.2 * (put_out > 0)
        assert token == int(logits.argmax())
        ids.append(token)
    assert tokens(done["b"]) == oracle_tokens(oracles[None], PROMPT, 12)


@pytest.mark.parametrize("name", KINDS)
def test_guesses_change_no_token(world: TinyWorld, make_engine: MakeEngine, name: str) -> None:
    turns = {"logit_bias": {60: 90.0, 61: 90.0, 62: 90.0}, "frequency_penalty": 2.0, "max_tokens": 40}
    plain, engine = make_engine(), make_engine()
    wanted = run(plain, request(world, "r", PROMPT[:1], name, **turns))["r"]
    got = run(engine, request(world, "r", PROMPT[:1], name, num_speculative_tokens=4, **turns))["r"]
    assert tokens(got) == tokens(wanted)
    assert 0 < engine.stats().num_accepted <= engine.stats().num_drafts


def test_a_block_that_a_prefix_is_written_to_is_read_anew(world: TinyWorld, build_engine: MakeEngine) -> None:
    """Its next step looks as if the sequence before had grown by a token."""
    folder = world.adapters["prefix"].parent / "two"
    make_prompt_adapter(world.base, folder, PrefixTuningConfig(num_virtual_tokens=2, **TASK))
    ref = store_adapter(world.base, folder, world.blobs, "t/two:1")
    engine = build_engine(kv_cache_tokens=4, max_num_seqs=1)
    asked = replace(request(world, "r", PROMPT[:1], max_tokens=1, logprobs=20), adapter=ref)
    engine.residency.prefetch([ref])
    base = request(world, "b", PROMPT[:1], max_tokens=2)
    assert_is_peft_s(load_oracle(world.base, folder), PROMPT[:1], run(engine, base, asked)["r"])


def test_fp8_pages_take_a_prefix(world: TinyWorld, build_engine: MakeEngine) -> None:
    engine = build_engine(kv_cache_dtype="fp8")
    one = request(world, "r", PROMPT[:1], "prefix")
    engine.add(one, engine.encode(one))
    while not engine.scheduler.running:
        engine.step()
    table = engine.scheduler.running[0].block_table
    file = load_file(world.adapters["prefix"] / "adapter_model.safetensors")
    wanted = file["prompt_embeddings"].view(5, 4, 2, 16)
    for index, layer in enumerate(engine.runner.cache.layers):
        pages = torch.stack(layer.blocks(torch.tensor(table), torch.float32))[:, :5]
        torch.testing.assert_close(pages, wanted[:, [2 * index, 2 * index + 1]].transpose(0, 1), rtol=0.08, atol=0.02)
    drain(engine)


def test_virtual_tokens_take_no_page_and_the_rows_no_adapter_s_work(world: TinyWorld, build_engine: MakeEngine) -> None:
    engine = build_engine(num_adapter_pages=2)
    batch, made = engine.runner._batch, []
    engine.runner._batch = lambda *given: made.append(batch(*given)) or made[-1]  # type: ignore[method-assign,func-returns-value]
    run(engine, *(request(world, n, adapter=n) for n in ("prompt", "prefix")))
    assert engine._slots.num_free_pages == 2
    assert all(one.segments is None for one in made)
    assert sum(one.virtual is not None for one in made) == 1


def test_more_adapters_than_slots_take_turns(world: TinyWorld, make_engine: MakeEngine) -> None:
    tight, roomy = make_engine(num_adapter_slots=1), make_engine(num_adapter_slots=8)
    got, wanted = (run(engine, *mixed(world)) for engine in (tight, roomy))
    assert {r: tokens(d) for r, d in got.items()} == {r: tokens(d) for r, d in wanted.items()}
    assert tight.stats().adapter_evictions == 7


def test_a_request_that_counts_other_virtual_tokens_ends_alone(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine()
    wrong = request(world, "bad", adapter="prompt")
    wrong = replace(wrong, adapter=replace(world.refs["prompt"], num_virtual_tokens=0))
    done = run(engine, wrong, request(world, "good", adapter="prompt"))
    assert done["bad"][-1].finish_reason == "error"
    assert isinstance(done["bad"][-1].error, AdapterLoadFailed)
    assert len(tokens(done["good"])) == 12


def test_the_context_has_room_for_them_too(world: TinyWorld, build_engine: MakeEngine) -> None:
    engine = build_engine(max_model_len=40)
    taken = "40 tokens, of which the adapter's virtual tokens take 30; the prompt has"
    with pytest.raises(ContextLengthExceeded, match=f"{taken} 10"):
        engine.encode(request(world, "r", PROMPT[:10], "long"))
    with pytest.raises(ContextLengthExceeded, match=f"{taken} 4 and max_tokens asks for 7.* at most 6"):
        engine.encode(request(world, "r", PROMPT[:4], "long", max_tokens=7))
    done = run(engine, request(world, "r", PROMPT[:4], "long", max_tokens=None))
    assert usage(done["r"]) == (4, 0, 6)


def test_two_ranks_give_one_rank_s_tokens(world: TinyWorld, build_engine: MakeEngine) -> None:
    one, two = (build_engine(tensor_parallel_size=n, num_adapter_slots=3, max_num_batched_tokens=16) for n in (1, 2))
    got, wanted = (run(engine, *mixed(world)) for engine in (two, one))
    assert {r: tokens(d) for r, d in got.items()} == {r: tokens(d) for r, d in wanted.items()}


@pytest.mark.parametrize("chosen", [{"max_num_batched_tokens": 7}, {"kv_cache_tokens": 120, "overlap_steps": True}])
def test_batch_invariant_mode_gives_the_bits_of_each_alone(
    world: TinyWorld, build_engine: MakeEngine, chosen: dict[str, Any]
) -> None:
    def serve(engine: LLMEngine, *asked: GenerateRequest) -> dict[str, list[Any]]:
        return {r: [p for d in deltas for p in d.logprobs] for r, deltas in run(engine, *asked).items()}

    asked = mixed(world, logprobs=3)
    engine = build_engine(batch_invariant=True, num_adapter_slots=8, **chosen)
    together = serve(engine, *asked)
    for one in asked:
        assert serve(build_engine(batch_invariant=True), one) == {one.request_id: together[one.request_id]}
    assert serve(engine, *asked) == together


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=set(Phase) - {Phase.shrink},  # which takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    calls=CALLS,
    names=st.lists(st.sampled_from(NAMES), min_size=7, max_size=7),
    chosen=st.fixed_dictionaries(
        {
            "max_num_batched_tokens": st.sampled_from([8, 16, 1024]),
            "max_num_seqs": st.sampled_from([2, 8]),
            "kv_cache_tokens": st.sampled_from([96, 160, 2048]),
            "kv_host_bytes": st.sampled_from([0, 1 << 20]),
            "num_adapter_slots": st.sampled_from([1, 2, 4]),
            "enable_prefix_caching": st.booleans(),
            "overlap_steps": st.booleans(),
        }
    ),
)
def test_however_requests_meet_each_gets_its_tokens(
    world: TinyWorld, build_engine: MakeEngine, calls: list[Call], names: list[str | None], chosen: dict[str, Any]
) -> None:
    """And another rank that hears of the steps runs the same."""
    calls = [replace(call, adapter=name) for call, name in zip(calls, names, strict=False)]
    engine = build_engine(**chosen)
    OtherRank(engine)
    got = serve(engine, world, calls)
    wanted = serve(build_engine(num_adapter_slots=8), world, [replace(call, goes=None) for call in calls])
    for (name, index), deltas in got.deltas.items():
        mine, whole = got.tokens(name, index), wanted.tokens(name, index)
        assert mine == (whole[: len(mine)] if deltas[-1].finish_reason == "cancelled" else whole)
