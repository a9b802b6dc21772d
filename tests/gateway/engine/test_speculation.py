"""Tokens guessed ahead change when tokens come, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.scheduler_output import SchedulerOutput
from gateway.errors import InvalidRequest
from tests.gateway.engine.conftest import TinyWorld
from tests.gateway.engine.test_in_flight import Run, serve

MakeEngine = Callable[..., LLMEngine]
PROMPT = [60, 61, 62, 63, 64, 60, 61, 62, 70, 71, 63, 64, 60, 61]
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
# Of so few tokens many guesses come true, and many do not.
FEW: dict[str, Any] = {"logit_bias": {60: 65.0, 61: 60.0, 62: 60.0, 101: 60.0}}
# Three tokens take turns, as each is penalized more with every time that it comes.
TURNS: dict[str, Any] = {"logit_bias": {60: 90.0, 61: 90.0, 62: 90.0}, "frequency_penalty": 2.0}
SAMPLINGS: list[dict[str, Any]] = [
    GREEDY,
    GREEDY | FEW,
    GREEDY | TURNS | {"logprobs": 3},
    GREEDY | FEW | {"repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": 0.9, "logprobs": 1},
    GREEDY | TURNS | {"stop_token_ids": (61,), "min_tokens": 9},
    FEW | {"seed": 5, "stop_token_ids": (101,), "frequency_penalty": -0.1},
    FEW | {"seed": 6, "ignore_eos": True, "top_p": 0.99, "top_k": 40, "min_p": 0.001, "logprobs": 2},
    TURNS | {"seed": 7, "temperature": 0.8, "stop": ("ZZZ", "[[")},
]
SETTINGS = {
    "max_num_batched_tokens": [8, 16, 1024],
    "max_num_seqs": [2, 8],
    "kv_cache_tokens": [64, 96, 2048],
    "num_adapter_slots": [1, 2, 4],
    "enable_prefix_caching": [True, False],
    "overlap_steps": [True, False],
}


@dataclass(frozen=True)
class Call:
    """A request that guesses so many tokens ahead, when it comes, and after how many turns its caller goes away."""

    length: int = 14
    adapter: str | None = None
    sampling: int = 0
    guessed: int = 0
    n: int = 1
    max_tokens: int = 40
    comes: int = 0
    goes: int | None = None

    def request(self, world: TinyWorld, name: str) -> GenerateRequest:
        sampling = SAMPLINGS[self.sampling]
        sampling = sampling | {"min_tokens": min(sampling.get("min_tokens", 0), self.max_tokens)}
        params = SamplingParams(**sampling, n=self.n, max_tokens=self.max_tokens, num_speculative_tokens=self.guessed)
        ref = world.refs[self.adapter] if self.adapter is not None else None
        return GenerateRequest(name, params, prompt=PROMPT[: self.length], adapter=ref, cache_salt="t")


def told(run: Run, name: int, index: int) -> tuple[list[int], str, list[int], str | None]:
    """What a sequence gave, whenever it came: tokens, text, tokens by their log probabilities, why it ended."""
    deltas = run.deltas[str(name), index]
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    return (
        run.tokens(str(name), index),
        "".join(d.text for d in deltas),
        [p.token_id for d in deltas for p in d.logprobs],
        deltas[-1].finish_reason,
    )


CALLS = st.lists(
    st.builds(
        Call,
        length=st.integers(1, len(PROMPT)),
        adapter=st.sampled_from([None, "a4", "b20", "c8"]),
        sampling=st.integers(0, len(SAMPLINGS) - 1),
        guessed=st.sampled_from([0, 1, 3, 8]),
        n=st.sampled_from([1, 1, 2]),
        max_tokens=st.integers(1, 40),
        comes=st.integers(0, 10),
        goes=st.none() | st.integers(0, 12),
    ),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=set(Phase) - {Phase.shrink},  # which takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(calls=CALLS, chosen=st.fixed_dictionaries({name: st.sampled_from(v) for name, v in SETTINGS.items()}))
def test_guessing_ahead_changes_no_token(
    world: TinyWorld, build_engine: MakeEngine, calls: list[Call], chosen: dict[str, Any]
) -> None:
    run = serve(build_engine(**chosen), world, calls)
    alone = build_engine(overlap_steps=False)
    for i, call in enumerate(calls):
        wanted = serve(alone, world, [replace(call, guessed=0, comes=0, goes=None)])
        for index in range(call.n):
            tokens, text, logprobs, reason = told(run, i, index)
            whole = told(wanted, 0, index)
            if reason == "cancelled":
                assert call.goes is not None
                assert tokens == whole[0][: len(tokens)]
                assert logprobs == whole[2][: len(logprobs)]
            else:
                assert (tokens, text, logprobs, reason) == whole
        usages = [d.usage for index in range(call.n) for d in run.deltas[str(i), index] if d.usage is not None]
        assert [u.completion_tokens for u in usages] == [sum(len(run.tokens(str(i), j)) for j in range(call.n))]


def run(engine: LLMEngine, world: TinyWorld, *calls: Call) -> Run:
    return serve(engine, world, list(calls))


def num_steps(engine: LLMEngine, world: TinyWorld, *calls: Call) -> int:
    """How often the engine had to be asked until all was done."""
    for i, call in enumerate(calls):
        engine.add(request := call.request(world, str(i)), engine.encode(request))
    for step in count(1):
        engine.step()
        if not engine.has_work:
            return step
    raise AssertionError


REPEATING = Call(sampling=1, max_tokens=40)


def test_what_repeats_comes_in_fewer_steps_than_tokens(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert num_steps(engine, world, replace(REPEATING, guessed=8)) <= 12
    stats = engine.stats()
    assert stats.generation_tokens == 40
    assert 25 < stats.num_accepted <= stats.num_drafts < 40


@pytest.mark.parametrize("sampling", [1, 2, 6])
def test_a_step_gives_one_delta_and_usage_counts_the_guesses(
    world: TinyWorld, make_engine: MakeEngine, sampling: int
) -> None:
    engine = make_engine()
    done = run(engine, world, Call(sampling=sampling, guessed=8))
    deltas, stats = done.deltas["0", 0], engine.stats()
    assert len(deltas) == 40 - stats.num_accepted
    usage = deltas[-1].usage
    assert usage is not None
    assert (usage.accepted_tokens, usage.rejected_tokens) == (
        stats.num_accepted,
        stats.num_drafts - stats.num_accepted,
    )
    assert usage.completion_tokens == 40


def test_who_does_not_ask_gets_no_index_and_no_draft(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = REPEATING.request(world, "r")
    engine.add(request, engine.encode(request))
    (sequence,) = engine.scheduler.waiting
    num_rows = 0
    while engine.has_work:
        num_rows += engine.step().num_tokens
    assert num_rows == len(PROMPT) + 39
    assert sequence.lookup is None
    assert sequence.drafts == sequence.sampling._ahead == []


def test_more_than_the_engine_allows_is_refused(world: TinyWorld, build_engine: MakeEngine) -> None:
    engine = build_engine(max_speculative_tokens=3)
    engine.encode(Call(guessed=3).request(world, "r"))
    with pytest.raises(InvalidRequest, match="at most 3") as error:
        engine.encode(Call(guessed=4).request(world, "r"))
    assert error.value.param == "num_speculative_tokens"


@pytest.mark.parametrize(("max_tokens", "num_drafts"), [(1, 0), (2, 0), (3, 1), (5, 3)])
def test_no_draft_is_made_that_max_tokens_would_drop(make_engine: MakeEngine, max_tokens: int, num_drafts: int) -> None:
    engine = make_engine()
    params = SamplingParams(**GREEDY, logit_bias={60: 100.0}, max_tokens=max_tokens, num_speculative_tokens=8)
    engine.add(GenerateRequest("r", params, prompt=[60] * 9), [60] * 9)
    while engine.has_work:
        engine.step()
    assert (engine.stats().num_drafts, engine.stats().num_accepted) == (num_drafts, num_drafts)


@pytest.mark.parametrize("limits", [{"max_num_batched_tokens": 16}, {"max_num_seqs": 4, "max_speculative_tokens": 5}])
def test_drafts_keep_to_what_a_step_may_hold(
    world: TinyWorld, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    engine = make_engine(**limits)
    execute, num_tokens, num_rows = engine.runner.execute, [], []

    def watched(output: SchedulerOutput, *rest: Any) -> torch.Tensor:
        num_tokens.append(output.num_tokens)
        num_rows.append(len(output.sampled))
        return execute(output, *rest)

    monkeypatch.setattr(engine.runner, "execute", watched)
    run(engine, world, *(replace(REPEATING, length=14 - i, guessed=5) for i in range(4)))
    if "max_num_seqs" in limits:
        assert max(num_rows) == 6  # recorded steps may have as many: one sequence with all its drafts
    else:
        assert max(num_tokens) == 16
    assert engine.stats().num_accepted > 20


def test_rows_that_do_not_guess_go_on_while_one_that_does_waits(world: TinyWorld, build_engine: MakeEngine) -> None:
    engine = build_engine(overlap_steps=True)
    plain, asked = replace(REPEATING, max_tokens=30), replace(REPEATING, guessed=4)
    assert num_steps(engine, world, plain, asked) <= 32
    assert engine.stats().num_accepted > 20


def test_a_guess_that_fails_does_not_keep_a_row_waiting(world: TinyWorld, build_engine: MakeEngine) -> None:
    engine = build_engine(overlap_steps=True)
    plain = num_steps(engine, world, Call(), Call())
    assert num_steps(engine, world, Call(), Call(guessed=8)) <= plain + 1
    assert engine.stats().num_accepted == 0


def test_a_row_does_not_wait_where_no_draft_finds_room(world: TinyWorld, build_engine: MakeEngine) -> None:
    engine = build_engine(overlap_steps=True, max_num_seqs=2, max_speculative_tokens=1)
    plain = num_steps(engine, world, REPEATING, REPEATING)
    assert num_steps(engine, world, replace(REPEATING, guessed=1), REPEATING) <= plain + 1


@pytest.mark.parametrize("sampling", [1, 2, 6])
def test_blocks_of_accepted_tokens_are_shared_as_any(world: TinyWorld, make_engine: MakeEngine, sampling: int) -> None:
    cached = []
    for guessed in (0, 8):
        engine = make_engine()
        answer = run(engine, world, Call(sampling=sampling, guessed=guessed)).tokens("0")
        request = GenerateRequest("next", SamplingParams(max_tokens=1), prompt=[*PROMPT, *answer, 9], cache_salt="t")
        engine.add(request, engine.encode(request))
        (delta,) = [delta for _ in range(2) for delta in engine.step().deltas]
        assert delta.usage is not None
        cached.append(delta.usage.cached_tokens)
    assert cached == [52, 52]
