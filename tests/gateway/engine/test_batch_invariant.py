"""Under `batch_invariant` a request's tokens and log-probabilities have the same bits whatever else happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import TokenLogprob
from gateway.engine.step_tokens import StepTokens
from tests.gateway.engine.conftest import TinyWorld
from tests.gateway.engine.test_llm_engine import PROMPT, request, run

MakeEngine = Callable[..., LLMEngine]
ADAPTERS = [None, "a4", "b20", "c8"]


def logprobs(engine: LLMEngine, world: TinyWorld, asked: list[tuple[int, int, str | None]]) -> list[list[TokenLogprob]]:
    """Serve prompts PROMPT[first:last] with their adapters together: each one's tokens with their three likeliest."""
    requests = [
        request(world, str(i), PROMPT[first:last], adapter, max_tokens=20, logprobs=3)
        for i, (first, last, adapter) in enumerate(asked)
    ]
    done = run(engine, *requests)
    return [[token for delta in done[one.request_id] for token in delta.logprobs] for one in requests]


@pytest.fixture
def alone(world: TinyWorld, build_engine: MakeEngine) -> Callable[[tuple[int, int, str | None]], list[TokenLogprob]]:
    """What a request gives with nobody beside it and nothing of those before it."""
    engine = build_engine(batch_invariant=True, enable_prefix_caching=False)

    def serve(one: tuple[int, int, str | None]) -> list[TokenLogprob]:
        return logprobs(engine, world, [one])[0]

    return serve


ASKED = st.tuples(st.integers(0, 3), st.integers(5, 31), st.sampled_from(ADAPTERS))
CHOSEN = st.fixed_dictionaries(
    {
        "max_num_batched_tokens": st.sampled_from([7, 16, 1024]),
        "kv_cache_tokens": st.sampled_from([120, 2048]),
        "kv_host_bytes": st.sampled_from([0, 1 << 20]),
        "enable_prefix_caching": st.booleans(),
        "overlap_steps": st.booleans(),
    }
)


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=set(Phase) - {Phase.shrink},  # which takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(asked=st.lists(ASKED, min_size=2, max_size=5), chosen=CHOSEN)
def test_any_batch_gives_the_bits_of_each_request_alone(
    world: TinyWorld, build_engine: MakeEngine, alone: Any, asked: Any, chosen: dict[str, Any]
) -> None:
    engine = build_engine(batch_invariant=True, **chosen)
    wanted = [alone(one) for one in asked]
    assert logprobs(engine, world, asked) == wanted
    assert logprobs(engine, world, asked) == wanted  # and on what the prefix cache has of the first time


def test_a_preempted_request_gives_the_bits_of_an_undisturbed_one(
    world: TinyWorld, build_engine: MakeEngine, alone: Any
) -> None:
    asked = [(i, 31, name) for i, name in enumerate(ADAPTERS)]
    tight = build_engine(batch_invariant=True, kv_cache_tokens=120, enable_prefix_caching=False)
    assert logprobs(tight, world, asked) == [alone(one) for one in asked]
    assert tight.stats().num_preemptions > 0


def test_the_logits_are_those_of_the_usual_mode_within_rounding(world: TinyWorld, build_engine: MakeEngine) -> None:
    asked = [(i, 31 - i, name) for i, name in enumerate(ADAPTERS)]
    invariant, usual = (logprobs(build_engine(batch_invariant=on), world, asked) for on in (True, False))
    for mine, theirs in zip(invariant, usual, strict=True):
        assert [token.token_id for token in mine] == [token.token_id for token in theirs]
        assert [token.logprob for token in mine] == pytest.approx([token.logprob for token in theirs], abs=2e-4)


def test_off_a_step_is_run_whole(world: TinyWorld, build_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_engine()
    batch, sizes = engine.runner._batch, []

    def watched(tokens: StepTokens, *rest: Any) -> Any:
        made = batch(tokens, *rest)
        sizes.append((len(tokens), len(made.input_ids), made.invariant))
        return made

    monkeypatch.setattr(engine.runner, "_batch", watched)
    logprobs(engine, world, [(0, 31, None), (1, 31, None)])
    assert sizes[0] == (61, 61, False)
    assert all(planned == run for planned, run, _ in sizes)


def test_log_probabilities_of_a_row_do_not_depend_on_the_others() -> None:
    from gateway.engine.sampler import Sampler
    from gateway.engine.sampling_params import SamplingParams
    from gateway.engine.sampling_row import SamplingRow

    rows = [SamplingRow(SamplingParams(temperature=0.0, logprobs=k), [1], 1) for k in (3, 0, 20)]
    logits = torch.randn(3, 1000).round(decimals=1)  # many equals
    sampler = Sampler(invariant=True)
    together = sampler(logits.clone(), rows).result().logprobs
    assert together == [sampler(logits[[i]], [row]).result().logprobs[0] for i, row in enumerate(rows)]
