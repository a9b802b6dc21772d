"""Steps that overlap give what steps in turn give, and what a step in flight uses stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.engine.llm_engine import LLMEngine
from gateway.engine.pending import PendingTokens
from gateway.engine.request import GenerateRequest, TokenDelta
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.scheduler import SchedulerOutput
from gateway.engine.stats import StepOutput
from tests.gateway.engine.conftest import TinyWorld

MakeEngine = Callable[..., LLMEngine]
PROMPT = list(range(40, 71))
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
SAMPLINGS: list[dict[str, Any]] = [
    GREEDY,
    GREEDY | {"logprobs": 3},
    GREEDY | {"repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": 0.9},
    {"temperature": 0.0, "stop_token_ids": tuple(range(0, 320, 9)), "min_tokens": 3},
    {"seed": 5, "stop_token_ids": tuple(range(0, 320, 7))},
    {"seed": 6, "ignore_eos": True, "top_p": 0.8, "top_k": 40, "min_p": 0.01, "logprobs": 2},
    {"seed": 7, "temperature": 0.8, "stop": ("e", "o", " ")},
]
SETTINGS = {
    "max_num_batched_tokens": [8, 16, 1024],
    "max_num_seqs": [2, 8],
    "kv_cache_tokens": [96, 160, 2048],
    "num_adapter_slots": [1, 2, 4],
    "enable_prefix_caching": [True, False],
}


@dataclass(frozen=True)
class Call:
    """A request, the turn at which it comes, and after how many more its caller goes away."""

    start: int
    length: int
    adapter: str | None
    sampling: int
    n: int
    max_tokens: int
    comes: int
    goes: int | None = None

    def request(self, world: TinyWorld, name: str) -> GenerateRequest:
        params = SamplingParams(**SAMPLINGS[self.sampling], n=self.n, max_tokens=self.max_tokens)
        ref = world.refs[self.adapter] if self.adapter is not None else None
        prompt = PROMPT[self.start : self.start + self.length]
        return GenerateRequest(name, params, prompt=prompt, adapter=ref, cache_salt="t")


@dataclass
class Run:
    """What an engine gave: each sequence's deltas, its rows in all steps, and the most sequences of one."""

    deltas: dict[tuple[str, int], list[TokenDelta]] = field(default_factory=dict)
    num_rows: int = 0

    def take(self, output: StepOutput) -> None:
        self.num_rows += output.num_tokens
        for delta in output.deltas:
            self.deltas.setdefault((delta.request_id, delta.index), []).append(delta)

    def tokens(self, name: str, index: int = 0) -> list[int]:
        return [token for delta in self.deltas[name, index] for token in delta.token_ids]

    @property
    def story(self) -> dict[tuple[str, int], list[Any]]:
        """All that does not depend on when it came."""
        return {
            key: [(d.token_ids, d.text, d.finish_reason, [p.token_id for p in d.logprobs]) for d in deltas]
            for key, deltas in self.deltas.items()
        }


def serve(engine: LLMEngine, world: TinyWorld, calls: list[Call]) -> Run:
    run = Run()
    turn = 0
    while engine.has_work or any(call.comes >= turn for call in calls):
        for i, call in enumerate(calls):
            if call.comes == turn:
                one = call.request(world, str(i))
                engine.add(one, engine.encode(one))
            if call.goes is not None and call.comes + call.goes == turn:
                output = StepOutput()
                engine.cancel(str(i), output)
                run.take(output)
        run.take(engine.step())
        engine.blocks.check_integrity()
        turn += 1
    engine.check_integrity()
    return run


CALLS = st.lists(
    st.builds(
        Call,
        start=st.sampled_from([0, 0, 4]),
        length=st.integers(1, 27),
        adapter=st.sampled_from([None, "a4", "b20", "c8"]),
        sampling=st.integers(0, len(SAMPLINGS) - 1),
        n=st.sampled_from([1, 1, 2, 3]),
        max_tokens=st.integers(1, 14),
        comes=st.integers(0, 10),
        goes=st.none() | st.integers(0, 12),
    ),
    min_size=1,
    max_size=7,
)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(calls=CALLS, chosen=st.fixed_dictionaries({name: st.sampled_from(v) for name, v in SETTINGS.items()}))
def test_overlapping_changes_nothing_but_the_time(
    world: TinyWorld, engines: Callable[..., LLMEngine], calls: list[Call], chosen: dict[str, Any]
) -> None:
    in_turn = serve(engines(overlap_steps=False, **chosen), world, calls)
    overlapping = serve(engines(overlap_steps=True, **chosen), world, calls)
    alone = engines(overlap_steps=False)
    for i, call in enumerate(calls):
        wanted = serve(alone, world, [Call(**(vars(call) | {"comes": 0, "goes": None}))])
        for index in range(call.n):
            whole = wanted.story["0", index]
            for run in (in_turn, overlapping):
                told, deltas = run.story[str(i), index], run.deltas[str(i), index]
                assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
                if deltas[-1].finish_reason == "cancelled":
                    assert call.goes is not None
                    assert told[:-1] == whole[: len(told) - 1]
                else:
                    assert told == whole
        for run in (in_turn, overlapping):
            usages = [d.usage for index in range(call.n) for d in run.deltas[str(i), index] if d.usage is not None]
            assert [(u.prompt_tokens, u.completion_tokens) for u in usages] == [
                (call.length, sum(len(run.tokens(str(i), index)) for index in range(call.n)))
            ]


@pytest.fixture
def engines(make_engine: MakeEngine) -> Callable[..., LLMEngine]:
    """One engine for each choice of settings, with nothing cached of the example before but what it computed."""
    made: dict[tuple[tuple[str, Any], ...], LLMEngine] = {}

    def get(**chosen: Any) -> LLMEngine:
        key = tuple(sorted(chosen.items()))
        if key not in made:
            made[key] = make_engine(**chosen)
        return made[key]

    return get
