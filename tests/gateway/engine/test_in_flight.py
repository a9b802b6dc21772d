"""Steps that overlap give what steps in turn give, and what a step in flight uses stays as it is."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from adapters_store.lora_layout import num_pages_for
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.pending import PendingTokens
from gateway.engine.request import GenerateRequest, TokenDelta
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.scheduler_output import SchedulerOutput
from gateway.engine.sequence import Sequence
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
    "max_adapter_pages_per_step": [None, 1, 2],
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
    priority: int = 0
    tenant: str = ""

    def request(self, world: TinyWorld, name: str) -> GenerateRequest:
        sampling = SAMPLINGS[self.sampling]
        sampling = sampling | {"min_tokens": min(sampling.get("min_tokens", 0), self.max_tokens)}
        params = SamplingParams(**sampling, n=self.n, max_tokens=self.max_tokens)
        ref = world.refs[self.adapter] if self.adapter is not None else None
        prompt = PROMPT[self.start : self.start + self.length]
        who = {"cache_salt": "t", "priority": self.priority, "tenant": self.tenant}
        return GenerateRequest(name, params, prompt=prompt, adapter=ref, **who)


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
    for turn in itertools.count():
        if not engine.has_work and all(call.comes < turn for call in calls):
            break
        assert turn < 1000
        for i, call in enumerate(calls):
            if call.comes == turn:
                one = call.request(world, str(i))
                engine.add(one, engine.encode(one))
            if call.goes is not None and call.comes + call.goes == turn:
                output = StepOutput()
                engine.cancel(str(i), output)
                run.take(output)
        output = engine.step()
        run.take(output)
        engine.blocks.check_integrity()
        check_batch(engine)
        if output.num_tokens == 0:
            time.sleep(0.001)  # an adapter loads on another thread
    engine.check_integrity()
    return run


def check_batch(engine: LLMEngine) -> None:
    """What is true of the running sequences after every step."""
    running, limit = engine.scheduler.running, engine._config.max_adapter_pages_per_step
    assert running == sorted(running, key=lambda s: s.priority)
    pages = {s.adapter.digest: num_pages_for(s.adapter.rank) for s in running if s.adapter is not None}
    assert limit is None or len(pages) <= 1 or sum(pages.values()) <= limit
    for digest in pages:
        assert engine.residency.num_pins(digest) >= sum(
            s.adapter is not None and s.adapter.digest == digest for s in running
        )


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
        priority=st.sampled_from([0, 0, 0, -1, 2]),
        tenant=st.sampled_from(["x", "x", "y"]),
    ),
    min_size=1,
    max_size=7,
)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=set(Phase) - {Phase.shrink},  # which takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(calls=CALLS, chosen=st.fixed_dictionaries({name: st.sampled_from(v) for name, v in SETTINGS.items()}))
def test_overlapping_changes_nothing_but_the_time(
    world: TinyWorld, build_engine: MakeEngine, calls: list[Call], chosen: dict[str, Any]
) -> None:
    in_turn, overlapping = (serve(build_engine(overlap_steps=o, **chosen), world, calls) for o in (False, True))
    alone = build_engine(overlap_steps=False)
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


def call(sampling: dict[str, Any], name: str = "r", prompt: list[int] = PROMPT, **others: Any) -> GenerateRequest:
    return GenerateRequest(name, SamplingParams(**sampling), prompt=prompt, **others)


def run(engine: LLMEngine, *requests: GenerateRequest) -> Run:
    for one in requests:
        engine.add(one, engine.encode(one))
    done = Run()
    while engine.has_work:
        done.take(engine.step())
    engine.check_integrity()
    return done


def test_a_row_that_ends_by_length_is_not_run_again(build_engine: MakeEngine) -> None:
    done = run(build_engine(overlap_steps=True), call(GREEDY | {"max_tokens": 6}))
    assert len(done.tokens("r")) == 6
    assert done.num_rows == len(PROMPT) + 5


def test_a_penalty_counts_the_token_in_flight(build_engine: MakeEngine) -> None:
    # Three tokens take turns, as each is penalized more with every time that it comes.
    sampling = GREEDY | {"max_tokens": 30, "frequency_penalty": 2.0, "logit_bias": {5: 90.0, 6: 90.0, 7: 90.0}}
    in_turn, overlapping = (run(build_engine(overlap_steps=o), call(sampling)).tokens("r") for o in (False, True))
    assert set(in_turn) == {5, 6, 7}
    assert overlapping == in_turn


@pytest.mark.parametrize("ends_by", ["stop id", "stop string"])
def test_a_row_that_ends_by_its_token_while_its_next_step_is_in_flight_gives_no_more(
    build_engine: MakeEngine, ends_by: str
) -> None:
    engine = build_engine(overlap_steps=True)
    free = run(build_engine(), call(GREEDY | {"max_tokens": 20}))
    wanted, text = free.tokens("r"), "".join(d.text for d in free.deltas["r", 0])
    sampling = {"stop": (text[4:6],)} if ends_by == "stop string" else {"stop_token_ids": (wanted[6],)}
    done = run(engine, call(GREEDY | sampling | {"max_tokens": 20}))
    got, last = done.tokens("r"), done.deltas["r", 0][-1]
    assert got == wanted[: len(got)]
    assert len(got) < 20
    assert [d.finish_reason for d in done.deltas["r", 0]] == [None] * (len(got) - 1) + ["stop"]
    assert last.usage is not None
    assert last.usage.completion_tokens == engine.stats().generation_tokens == len(got)
    # One row more than for a row that ends by length: it was in flight.
    assert done.num_rows == len(PROMPT) + len(got)


def test_what_a_step_in_flight_uses_is_held_until_it_is_done(world: TinyWorld, build_engine: MakeEngine) -> None:
    engine = build_engine(overlap_steps=True)
    ref = world.refs["a4"]
    engine.host_cache.get(ref.digest).result()
    one = call(GREEDY, "gone", adapter=ref)
    engine.add(one, engine.encode(one))
    engine.step()
    held = engine.blocks.num_blocks - engine.blocks.num_free
    engine.cancel("gone", StepOutput())
    assert engine.blocks.num_blocks - engine.blocks.num_free == held == 8
    assert engine.residency.num_pins(ref.digest) == 1
    assert engine.has_work
    assert engine.step().deltas == []
    assert not engine.has_work
    engine.check_integrity()
    assert engine.residency.num_pins(ref.digest) == 0


def test_a_prefix_is_shared_when_it_is_computed_and_not_before(build_engine: MakeEngine) -> None:
    engine = build_engine(overlap_steps=True, max_num_batched_tokens=24)

    def schedule_with(name: str) -> tuple[SchedulerOutput, int]:
        """The next step, and where it starts on the new request's prompt."""
        one = call(GREEDY, name)
        engine.add(one, engine.encode(one))
        output = engine.scheduler.schedule()
        return output, output.scheduled[-1].start

    first, _ = schedule_with("first")  # its first 24 tokens
    second, start = schedule_with("too early")  # the rest of the first
    assert start == 0
    engine.scheduler.update(first)
    _, start = schedule_with("better")
    assert start == 24
    engine.scheduler.update(second)
    assert schedule_with("late")[1] == 28


def test_a_dropped_row_offers_no_block(build_engine: MakeEngine) -> None:
    first, second = run(build_engine(), call(GREEDY | {"max_tokens": 2}, prompt=PROMPT[:6])).tokens("r")
    assert first != second
    engine = build_engine(overlap_steps=True)
    run(engine, call(GREEDY | {"stop_token_ids": (second,)}, prompt=PROMPT[:6]))
    # The step in flight at the end filled the second block of four.
    again = run(engine, call(GREEDY | {"max_tokens": 1}, prompt=[*PROMPT[:6], first, second, 9]))
    assert again.deltas["r", 0][-1].usage is not None
    assert again.deltas["r", 0][-1].usage.cached_tokens == 4


def test_nothing_is_preempted_while_a_step_is_in_flight(
    build_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [call(GREEDY | {"max_tokens": 20}, name, PROMPT[i : i + 16]) for i, name in enumerate("abc")]
    engine = build_engine(overlap_steps=True, kv_cache_tokens=80, enable_prefix_caching=False)
    preempt, seen = engine.scheduler._preempt_last, []

    def watched(step: dict[Sequence, int]) -> int:
        seen.append(engine._in_flight)
        return preempt(step)

    monkeypatch.setattr(engine.scheduler, "_preempt_last", watched)
    assert run(engine, *requests).story == run(build_engine(), *requests).story
    assert seen
    assert set(seen) == {None}


def test_a_failing_step_ends_everything_in_flight_once(
    world: TinyWorld, build_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(overlap_steps=True)
    done = Run()
    for name, adapter, n in (("a", "a4", 2), ("b", None, 1), ("c", "b20", 1)):
        ref = world.refs[adapter] if adapter is not None else None
        one = call(GREEDY | {"n": n, "max_tokens": 12}, name, adapter=ref)
        engine.add(one, engine.encode(one))
    while len(done.deltas) < 4:
        done.take(engine.step())

    def fail(scheduled: SchedulerOutput, pending: PendingTokens | None) -> torch.Tensor:
        assert pending is not None
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine.runner, "execute", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.step()
    done.take(engine.abort_all("error", None))
    done.take(engine.abort_all("error", None))
    assert not engine.has_work
    engine.check_integrity()
    ends = {key: [d.finish_reason for d in deltas if d.finish_reason] for key, deltas in done.deltas.items()}
    assert ends == {("a", 0): ["error"], ("a", 1): ["error"], ("b", 0): ["error"], ("c", 0): ["error"]}


def test_what_a_failing_step_had_to_hand_out_is_not_lost(
    build_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(overlap_steps=True, max_num_seqs=1)
    for name in ("done", "next"):
        one = call(GREEDY | {"max_tokens": 1}, name)
        engine.add(one, engine.encode(one))
    assert engine.step().deltas == []

    def fail(scheduled: SchedulerOutput, pending: PendingTokens | None) -> torch.Tensor:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine.runner, "execute", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.step()  # hands out the first step's token, and so has room for the next request, whose step fails
    output = engine.abort_all("error", None)
    assert [(d.request_id, d.finish_reason) for d in output.deltas] == [("done", "length"), ("next", "error")]
    assert [timings.finish_reason for timings in output.finished] == ["length", "error"]
    assert engine.abort_all("error", None).deltas == []


def test_a_row_of_bad_logits_ends_alone_though_its_next_step_is_in_flight(
    build_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(overlap_steps=True)
    execute = engine.runner.execute

    def poison(scheduled: SchedulerOutput, pending: PendingTokens | None) -> torch.Tensor:
        logits = execute(scheduled, pending)
        if scheduled.number == 4:
            logits[1] = torch.nan
        return logits

    wanted = run(build_engine(), *(call(GREEDY | {"max_tokens": 9}, name) for name in "abc"))
    monkeypatch.setattr(engine.runner, "execute", poison)
    done = run(engine, *(call(GREEDY | {"max_tokens": 9}, name) for name in "abc"))
    assert [d.finish_reason for d in done.deltas["b", 0]] == [None] * 3 + ["error"]
    assert done.tokens("b") == wanted.tokens("b")[:3]
    assert (done.tokens("a"), done.tokens("c")) == (wanted.tokens("a"), wanted.tokens("c"))
