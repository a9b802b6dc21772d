"""Admission, budget and order, on real blocks and slots."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from tests.gateway.engine.conftest import TinyWorld

MakeEngine = Callable[..., LLMEngine]


def add(engine: LLMEngine, world: TinyWorld, name: str, length: int, adapter: str | None = None, n: int = 1) -> None:
    ref = world.refs[adapter] if adapter is not None else None
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, n=n)
    # Prompts that share no block.
    first = 10 + 37 * len(engine.scheduler.waiting)
    request = GenerateRequest(name, params, prompt=[first + i % 29 for i in range(length)], adapter=ref)
    engine.add(request, engine.encode(request))


def plan(engine: LLMEngine) -> dict[str, int]:
    """What the next step runs: tokens by request."""
    output = engine.scheduler.schedule()
    return {s.request.request.request_id: n for s, _, n in output.scheduled}


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


def test_a_loading_adapter_lets_others_pass(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine()
    add(engine, world, "adapted", 4, "a4")
    add(engine, world, "base", 4)
    # The load runs on another thread and has only just been started.
    assert plan(engine) in ({"base": 4}, {"base": 4, "adapted": 4})
    assert engine.has_work


def test_a_request_that_waits_for_a_slot_is_not_overtaken_by_its_neighbours(
    world: TinyWorld, make_engine: MakeEngine
) -> None:
    engine = make_engine(num_adapter_slots=1)
    add(engine, world, "holder", 4, "a4")
    while not engine.scheduler.running:
        engine.step()
    add(engine, world, "blocked", 4, "b20")
    engine.host_cache.get(world.refs["b20"].digest).result()
    engine.step()
    assert engine.residency.is_waiting_for_room(world.refs["b20"].digest)
    add(engine, world, "later", 4, "a4")
    add(engine, world, "base", 4)
    assert set(plan(engine)) == {"holder", "base"}


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
