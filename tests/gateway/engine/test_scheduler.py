"""Admission, budget and order, on real blocks and slots."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from adapters_store.errors import AdapterLoadFailed
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.pending import PendingTokens
from gateway.engine.request import GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.sequence import Sequence
from gateway.engine.step_tokens import StepTokens
from tests.gateway.engine.conftest import TinyWorld

MakeEngine = Callable[..., LLMEngine]


def add(
    engine: LLMEngine,
    world: TinyWorld,
    name: str,
    length: int,
    adapter: str | None = None,
    n: int = 1,
    max_tokens: int = 8,
    **who: Any,
) -> None:
    ref = world.refs[adapter] if adapter is not None else None
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, n=n)
    # Prompts that share no block.
    first = 10 + 37 * len(engine.scheduler.waiting) % 200
    request = GenerateRequest(name, params, prompt=[first + i % 29 for i in range(length)], adapter=ref, **who)
    engine.add(request, engine.encode(request))


def plan(engine: LLMEngine) -> dict[str, int]:
    """What the next step runs: tokens by request."""
    output = engine.scheduler.schedule()
    return {s.request.request.request_id: n for s, _, n in output.scheduled}


def running(engine: LLMEngine) -> list[str]:
    return [s.request.request.request_id for s in engine.scheduler.running]


def load(engine: LLMEngine, world: TinyWorld, *adapters: str) -> None:
    """Bring adapters into host memory, so that they find a slot at once if there is one."""
    for adapter in adapters:
        engine.host_cache.get(world.refs[adapter].digest).result()


def run_two_steps(engine: LLMEngine) -> None:
    """Time enough to preempt: where steps overlap, the one in flight ends first."""
    engine.step()
    engine.step()


def finish(engine: LLMEngine) -> set[str]:
    """Run to the end. Returns the requests that ended as they should, each of them once."""
    ends = []
    while engine.has_work:
        ends += [d.request_id for d in engine.step().deltas if d.finish_reason == "length"]
    engine.check_integrity()
    assert len(ends) == len(set(ends))
    return set(ends)


def test_a_long_prompt_is_chunked_and_decode_goes_first(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=16)
    add(engine, world, "short", 6)
    engine.step()
    add(engine, world, "long", 40)
    assert list(plan(engine).items()) == [("short", 1), ("long", 15)]


def test_the_budget_is_never_exceeded(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=16)
    for i in range(5):
        add(engine, world, str(i), 7)
    while engine.has_work:
        assert engine.step().num_tokens <= 16


def test_no_more_sequences_than_allowed_run(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    for i in range(5):
        add(engine, world, str(i), 4)
    engine.step()
    assert (len(engine.scheduler.running), len(engine.scheduler.waiting)) == (2, 3)


def test_no_more_sequences_run_than_a_step_has_tokens(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=4)
    for i in range(6):
        add(engine, world, str(i), 4)
    tokens: Counter[str] = Counter()
    while engine.has_work:
        assert len(engine.scheduler.running) <= 4
        tokens.update({delta.request_id: len(delta.token_ids) for delta in engine.step().deltas})
    assert tokens == {str(i): 8 for i in range(6)}


def calls_of_a_step(engine: LLMEngine, world: TinyWorld, num_rows: int) -> int:
    """How many Python functions are called to schedule decode rows of which none enters or fills a block."""
    for i in range(num_rows):
        add(engine, world, str(i), 4, max_tokens=64)
    scheduler, fewest = engine.scheduler, sys.maxsize
    for _ in range(40):
        pending = PendingTokens(torch.empty(num_rows), np.arange(num_rows))
        with counted_calls() as calls:
            output = scheduler.schedule()
            scheduler.update(output)
            if len(output.rows) == num_rows:
                StepTokens.of(output, pending, engine.blocks.block_size)
        if len(output.rows) == num_rows:
            fewest = min(fewest, len(calls))
        for sequence in output.sampled:
            sequence.token_ids.append(7)
    return fewest


@contextmanager
def counted_calls() -> Iterator[list[None]]:
    calls: list[None] = []
    sys.setprofile(lambda frame, event, arg: calls.append(None) if event == "call" else None)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def test_decode_rows_that_go_on_cost_no_call_each(world: TinyWorld, build_engine: MakeEngine) -> None:
    few, many = (calls_of_a_step(build_engine(max_num_seqs=64), world, num_rows) for num_rows in (4, 64))
    assert few == many


def test_a_loading_adapter_lets_others_pass(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine()
    add(engine, world, "adapted", 4, "a4")
    add(engine, world, "base", 4)
    # The load runs on another thread and has only just been started.
    assert plan(engine) in ({"base": 4}, {"base": 4, "adapted": 4})
    assert engine.has_work


def test_adapters_of_the_queue_come_in_before_their_turn(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    add(engine, world, "running", 4)
    engine.step()
    for name in ("a4", "b20"):
        engine.host_cache.get(world.refs[name].digest).result()
        add(engine, world, name, 4, name)
    plan(engine)
    assert engine.residency.stats.resident == (world.refs["a4"].name,), "one copy a step"
    plan(engine)
    assert engine.residency.stats.resident == (world.refs["a4"].name, world.refs["b20"].name)
    assert [engine.residency.num_pins(world.refs[name].digest) for name in ("a4", "b20")] == [0, 0]


@pytest.mark.parametrize("caching", [True, False])
def test_siblings_wait_for_the_first_of_them_to_read_the_prompt(
    world: TinyWorld, make_engine: MakeEngine, caching: bool
) -> None:
    engine = make_engine(max_num_batched_tokens=16, enable_prefix_caching=caching)
    add(engine, world, "r", 20, n=3)
    assert [n for _, _, n in engine.scheduler.schedule().scheduled] == [16]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("length", [16, 17, 18])
def test_siblings_hold_the_prompt_together_but_for_its_last_block(
    world: TinyWorld, make_engine: MakeEngine, caching: bool, length: int
) -> None:
    engine = make_engine(enable_prefix_caching=caching)
    add(engine, world, "r", length, n=3)
    engine.step()
    output = engine.scheduler.schedule()
    tables = [s.block_table for s in engine.scheduler.running]
    shared = (length - 1) // 4
    assert len({tuple(table[:shared]) for table in tables}) == 1
    assert len({table[shared] for table in tables}) == 3
    assert [n for _, _, n in output.scheduled] == [1, 1, 1]
    # The block of the last token is copied where other tokens lie before it.
    assert output.copies == [(tables[0][shared], table[shared]) for table in tables[1:]] * (length != 17)
    assert engine.blocks.num_blocks - engine.blocks.num_free == len({block for table in tables for block in table})


def test_a_copied_block_leaves_the_bits_of_the_one_it_was_copied_from(
    world: TinyWorld, build_engine: MakeEngine
) -> None:
    engine = build_engine(enable_prefix_caching=False)
    add(engine, world, "r", 19, n=3)
    engine.step()
    (leader,) = engine.scheduler.running
    block = leader.block_table[4]
    before = [tensor[block, :3].clone() for layer in engine.runner.cache.layers for tensor in layer.tensors]
    engine.step()
    copies = [s.block_table[4] for s in engine.scheduler.running if s is not leader]
    assert len(copies) == 2
    for tensor, kept in zip((t for layer in engine.runner.cache.layers for t in layer.tensors), before, strict=True):
        assert torch.equal(tensor[block, :3], kept)
        assert all(torch.equal(tensor[copy, :2], kept[:2]) for copy in copies)


def test_a_sibling_whose_parent_has_gone_computes_the_prompt_itself(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1, enable_prefix_caching=False)
    add(engine, world, "r", 10, n=2)
    tokens: dict[int, list[int]] = {0: [], 1: []}
    while engine.has_work:
        for delta in engine.step().deltas:
            tokens[delta.index] += delta.token_ids
    engine.check_integrity()
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 8


def test_the_most_urgent_runs_first(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    for name, priority in (("low", 5), ("plain", 0), ("urgent", -1), ("later", 0)):
        add(engine, world, name, 4, priority=priority)
    engine.step()
    assert running(engine) == ["urgent", "plain"]
    assert finish(engine) == {"low", "plain", "urgent", "later"}


def test_an_urgent_request_takes_the_place_of_the_last_of_the_least_urgent(
    world: TinyWorld, make_engine: MakeEngine
) -> None:
    engine = make_engine(max_num_seqs=3)
    for name, priority in (("plain", 0), ("low", 5), ("lower", 5)):
        add(engine, world, name, 4, priority=priority)
    engine.step()
    add(engine, world, "urgent", 4, priority=-1)
    run_two_steps(engine)
    assert running(engine) == ["urgent", "plain", "low"]
    assert engine.scheduler.num_preemptions == 1
    assert finish(engine) == {"plain", "low", "lower", "urgent"}


def test_an_urgent_request_takes_blocks(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(kv_cache_tokens=48, enable_prefix_caching=False)
    for name, priority in (("plain", 0), ("low", 5)):
        add(engine, world, name, 16, priority=priority)
    engine.step()
    add(engine, world, "urgent", 20, priority=-1)
    run_two_steps(engine)
    assert running(engine) == ["urgent", "plain"]
    assert finish(engine) == {"plain", "low", "urgent"}


def test_an_urgent_request_takes_no_blocks_that_would_not_do(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(kv_cache_tokens=64, enable_prefix_caching=False)
    add(engine, world, "plain", 28, max_tokens=12)
    add(engine, world, "low", 8, priority=5)
    engine.step()
    add(engine, world, "urgent", 48)
    run_two_steps(engine)
    assert running(engine) == ["plain", "low"]
    assert finish(engine) == {"plain", "low", "urgent"}
    assert engine.scheduler.num_preemptions == 0


def test_equals_take_nothing_from_each_other(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    add(engine, world, "first", 4, priority=-1, tenant="a")
    engine.step()
    add(engine, world, "second", 4, priority=-1, tenant="b")
    engine.step()
    assert running(engine) == ["first"]


def test_blocks_run_out_for_the_least_urgent(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(kv_cache_tokens=48, enable_prefix_caching=False)
    add(engine, world, "low", 16, priority=1, max_tokens=20)
    add(engine, world, "plain", 16, max_tokens=20)
    ended = []
    while engine.has_work:
        ended += [d.request_id for d in engine.step().deltas if d.finish_reason]
    assert engine.scheduler.num_preemptions > 0
    assert ended == ["plain", "low"]


def test_an_urgent_request_whose_adapter_cannot_be_loaded_takes_nothing(
    world: TinyWorld, make_engine: MakeEngine
) -> None:
    engine = make_engine(num_adapter_slots=1, max_lora_rank=16)
    load(engine, world, "a4", "b20")
    add(engine, world, "running", 4, "a4", max_tokens=40)
    while not running(engine):
        engine.step()
    params = SamplingParams(temperature=0, max_tokens=4)
    misread = replace(world.refs["b20"], rank=4)  # of 20 ranks, as is found when it is loaded
    bad = GenerateRequest("bad", params, prompt=[9, 8, 7], adapter=misread, priority=-1)
    engine.add(bad, engine.encode(bad))
    ends: list[BaseException | None] = []
    while len(ends) == 0:
        ends += [delta.error for delta in engine.step().deltas if delta.request_id == "bad"]
    assert [type(error) for error in ends] == [AdapterLoadFailed]
    assert engine.scheduler.num_preemptions == 0
    assert finish(engine) == {"running"}


def test_who_waits_for_blocks_is_counted_once_in_the_cache_s_statistics(
    world: TinyWorld, make_engine: MakeEngine
) -> None:
    engine = make_engine(kv_cache_tokens=64)
    add(engine, world, "running", 30, max_tokens=20)
    engine.step()
    add(engine, world, "waits", 40, max_tokens=4, cache_salt="another")
    for _ in range(5):
        engine.step()
    assert running(engine) == ["running"]
    assert engine.blocks.prefix_queries == 30
    finish(engine)
    assert engine.blocks.prefix_queries == 30 + 40


def test_one_tenants_queue_does_not_delay_the_other(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=64, max_num_seqs=8)
    for i in range(1000):
        add(engine, world, f"many{i}", 20, tenant="many", max_tokens=2)
    for _ in range(5):
        engine.step()
    add(engine, world, "one", 20, tenant="other")
    steps = 0
    while "one" not in running(engine):
        engine.step()
        steps += 1
    assert steps <= 3  # a place is free when one of two tokens has ended


@pytest.mark.parametrize(
    ("who", "gets_in"),
    [
        ({"tenant": "other"}, True),
        ({"tenant": "many", "priority": -1}, True),
        ({"tenant": "many"}, False),
        ({"tenant": "other", "priority": 1}, False),
    ],
)
def test_a_long_prompt_leaves_half_of_the_step_to_who_comes_first(
    world: TinyWorld, make_engine: MakeEngine, who: dict[str, Any], gets_in: bool
) -> None:
    engine = make_engine(max_num_batched_tokens=16, enable_prefix_caching=False)
    add(engine, world, "long", 90, tenant="many")
    engine.step()
    add(engine, world, "short", 6, **who)
    # What the short one leaves of the half goes back.
    assert plan(engine) == ({"long": 10, "short": 6} if gets_in else {"long": 16})


def test_a_long_prompt_that_runs_lets_those_of_other_tenants_pass(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=16, enable_prefix_caching=False)
    add(engine, world, "long", 90, tenant="many")
    engine.step()
    add(engine, world, "shorter", 30, tenant="other")
    assert [plan(engine) for _ in range(3)] == [
        {"long": 8, "shorter": 8},
        {"shorter": 16},
        {"shorter": 6, "long": 10},
    ]


def test_what_nobody_can_be_admitted_to_take_goes_back_to_the_long_prompt(
    world: TinyWorld, make_engine: MakeEngine
) -> None:
    engine = make_engine(max_num_batched_tokens=16, num_adapter_slots=1, enable_prefix_caching=False)
    load(engine, world, "a4", "b20")
    add(engine, world, "holds the slot", 4, "a4", max_tokens=40)
    while not running(engine):
        engine.step()
    add(engine, world, "waits for it", 4, "b20", tenant="other")
    run_two_steps(engine)
    add(engine, world, "long", 90, tenant="many")
    run_two_steps(engine)
    assert plan(engine) == {"holds the slot": 1, "long": 15}


def serve_backlog(engine: LLMEngine, world: TinyWorld, weights: dict[str, float]) -> dict[str, float]:
    """Two tenants whose queues never empty, "long" with longer requests: what each was served, by the paper's costs.

    Checks at every step that what they were served by weight differs by no more than the paper's bound.
    """
    served: Counter[str] = Counter()
    lengths = {"short": (4, 3), "long": (24, 12)}
    for i in range(60):
        for tenant, (prompt, output) in lengths.items():
            number = 1 if tenant == "long" else 6
            for j in range(number):
                who = {"tenant": tenant, "tenant_weight": weights[tenant]}
                add(engine, world, f"{tenant}{i}.{j}", prompt, max_tokens=output, **who)
    bound = 2 * max(24, 2 * 6 * 12) / min(weights.values())
    seen: set[Sequence] = set()
    for _ in range(200):
        output = engine.scheduler.schedule()
        for sequence, _, _ in output.scheduled:
            if sequence not in seen:
                served[sequence.request.request.tenant] += sequence.request.num_prompt
                seen.add(sequence)
        engine.scheduler.update(output)
        for sequence in output.sampled:
            served[sequence.request.request.tenant] += 2
            sequence.token_ids.append(7)
            if len(sequence.token_ids) == sequence.max_tokens:
                engine.scheduler.finish(sequence)
        assert {s.request.request.tenant for s in engine.scheduler.waiting} == set(weights)
        by_weight = [served[tenant] / weight for tenant, weight in weights.items()]
        assert abs(by_weight[0] - by_weight[1]) <= bound
    return dict(served)


@pytest.mark.parametrize(("short", "long"), [(1.0, 1.0), (3.0, 1.0)])
def test_tenants_are_served_by_their_weights_whatever_they_ask(
    world: TinyWorld, build_engine: MakeEngine, short: float, long: float
) -> None:
    engine = build_engine(max_num_seqs=6, max_num_batched_tokens=32, enable_prefix_caching=False)
    served = serve_backlog(engine, world, {"short": short, "long": long})
    assert served["short"] / served["long"] == pytest.approx(short / long, rel=0.2)


def steps_until_running(
    engine: LLMEngine, world: TinyWorld, name: str, stream: Callable[[int], None], limit: int = 200
) -> int:
    """Steps with a stream of other requests until one runs."""
    for step in range(limit):
        if name in running(engine):
            return step
        stream(step)
        engine.step()
    raise AssertionError(f"{name} starves")


def test_a_long_prompt_does_not_starve_behind_short_ones(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(kv_cache_tokens=160, enable_prefix_caching=False)

    def stream(step: int) -> None:
        add(engine, world, f"s{step}", 4, tenant="b", tenant_weight=100.0, max_tokens=6)

    # What its tenant is served meanwhile puts it behind the other's in every step.
    add(engine, world, "served", 4, tenant="a", max_tokens=100)
    for step in range(6):
        stream(-step - 1)
        engine.step()
    add(engine, world, "long", 100, tenant="a")
    assert steps_until_running(engine, world, "long", stream) < 40
