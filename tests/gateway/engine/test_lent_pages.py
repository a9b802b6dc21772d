"""Pages and blocks from one budget: who has them moves, and no token changes by it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import GenerateRequest, TokenDelta
from tests.gateway.engine.conftest import TinyWorld
from tests.gateway.engine.test_llm_engine import PROMPT, drain, request, run, tokens

MakeEngine = Callable[..., LLMEngine]


@pytest.fixture
def make_lending(make_engine: MakeEngine) -> MakeEngine:
    """Engines whose cache is 35 blocks of its own, and 64 in the place of each page."""

    def make(**settings: object) -> LLMEngine:
        return make_engine(**({"kv_cache_tokens": 140, "lend_adapter_pages": True} | settings))

    return make


def served(engine: LLMEngine, *requests: GenerateRequest) -> dict[str, list[int]]:
    return {name: tokens(deltas) for name, deltas in run(engine, *requests).items()}


def many(world: TinyWorld, count: int, adapter: str | None = None) -> list[GenerateRequest]:
    return [request(world, str(i), PROMPT[i:], adapter, max_tokens=40) for i in range(count)]


def steps(engine: LLMEngine, count: int) -> None:
    for _ in range(count):
        engine.step()


def test_sequences_go_on_in_pages_that_no_adapter_has(
    world: TinyWorld, make_engine: MakeEngine, make_lending: MakeEngine
) -> None:
    requests = many(world, 8)
    wanted = served(make_engine(), *requests)
    tight, lending = make_lending(lend_adapter_pages=False), make_lending(num_adapter_pages=3)
    assert served(tight, *requests) == served(lending, *requests) == wanted
    assert tight.stats().num_preemptions > 0
    assert lending.stats().num_preemptions == 0
    assert lending.runner.slots.pages.num_lent > 0


def test_nothing_is_lent_while_the_cache_has_blocks_that_hold_nothing(
    world: TinyWorld, make_lending: MakeEngine
) -> None:
    lending = make_lending()
    run(lending, *many(world, 1))
    assert (lending.blocks.num_blocks, lending.runner.slots.pages.num_lent) == (35, 0)


def test_prefixes_stay_in_pages_that_no_adapter_has(world: TinyWorld, make_lending: MakeEngine) -> None:
    lending, unlent = make_lending(num_adapter_pages=2), make_lending(lend_adapter_pages=False)
    cached = {}
    for engine in (lending, unlent):
        for _ in range(2):
            for one in many(world, 6):
                (usage,) = (delta.usage for delta in run(engine, one)[one.request_id] if delta.usage is not None)
        cached[engine] = usage.cached_tokens
    assert cached == {lending: 24, unlent: 0}  # of 26, the last of which is always computed
    assert lending.runner.slots.pages.num_lent == 2
    adapter = request(world, "b", PROMPT, "b20")
    assert len(served(lending, adapter)["b"]) == 12
    assert lending.runner.slots.pages.num_lent == 0


def cached_tokens(engine: LLMEngine, one: GenerateRequest) -> int:
    (usage,) = (delta.usage for delta in run(engine, one)[one.request_id] if delta.usage is not None)
    return usage.cached_tokens


def test_prefixes_in_a_page_that_an_adapter_takes_go_to_the_host(
    world: TinyWorld, make_engine: MakeEngine, make_lending: MakeEngine
) -> None:
    prompts = many(world, 6)
    beside, adapter = request(world, "beside", PROMPT[9:], max_tokens=40), request(world, "b", PROMPT, "b20")
    wanted = served(make_engine(), beside, adapter)
    found = {}
    for host_bytes in (0, 1 << 20):
        lending = make_lending(num_adapter_pages=2, kv_host_bytes=host_bytes)
        served(lending, *prompts)
        assert lending.runner.slots.pages.num_lent == 2
        assert served(lending, beside, adapter) == wanted
        assert lending.runner.slots.pages.num_lent == 0
        found[host_bytes] = [cached_tokens(lending, replace(one, request_id=f"{one.request_id}'")) for one in prompts]
    assert found[1 << 20] == [(len(PROMPT[i:]) - 1) // 4 * 4 for i in range(6)]  # the last is always computed
    assert sum(found[0]) < sum(found[1 << 20]) / 2


@pytest.mark.parametrize("is_given_back", [False, True])
def test_a_page_that_is_recalled_is_saved_and_one_that_is_given_back_is_not(
    world: TinyWorld, make_lending: MakeEngine, is_given_back: bool
) -> None:
    lending = make_lending(num_adapter_pages=2, kv_host_bytes=1 << 20)
    served(lending, *many(world, 6))
    lent_to = lending.runner.slots.pages.borrower
    assert lent_to is not None
    page = next(page for page in (0, 1) if lent_to.must_save(page))
    lent_to.recall(page)
    assert lent_to.must_save(page)
    if is_given_back:
        lent_to.give_back(page)  # an adapter's copy may be under way
    assert bool(lending.blocks.saves([])) == (not is_given_back)
    assert not lent_to.must_save(page)


def test_an_adapter_takes_a_page_with_prefixes_though_no_step_saves_them(
    world: TinyWorld, make_lending: MakeEngine
) -> None:
    lending = make_lending(num_adapter_pages=2, kv_host_bytes=1 << 20)
    served(lending, *many(world, 6))
    assert lending.runner.slots.pages.num_lent == 2
    adapter = request(world, "b", PROMPT, "b20")
    lending.host_cache.get(adapter.adapter.digest).result()
    lending.add(adapter, lending.encode(adapter))
    first = lending.step()
    assert lending.residency.num_held == 1
    assert lending.runner.slots.pages.num_lent == 0
    assert len(tokens(drain(lending, {"b": list(first.deltas)})["b"])) == 12


def test_nobody_is_preempted_for_an_adapter_that_waits_for_prefixes_to_be_saved(
    world: TinyWorld, make_lending: MakeEngine
) -> None:
    lending = make_lending(num_adapter_pages=5, kv_host_bytes=1 << 20)
    served(lending, *many(world, 8))
    late = [replace(request(world, name, PROMPT[:8], name, max_tokens=40), priority=1) for name in ("a4", "c8")]
    for one in late:
        lending.host_cache.get(one.adapter.digest).result()
        lending.add(one, lending.encode(one))
    while lending.residency.num_held < 2:
        lending.step()
    lent_to = lending.runner.slots.pages.borrower
    assert lent_to is not None
    assert any(lent_to.must_save(page) for page in range(5) if page not in held_pages(lending))
    urgent = request(world, "b", PROMPT[:8], "b20")
    lending.host_cache.get(urgent.adapter.digest).result()
    lending.add(urgent, lending.encode(urgent))
    drain(lending)
    assert lending.stats().num_preemptions == 0
    assert lending.stats().kv_host_saved > 0


def held_pages(engine: LLMEngine) -> set[int]:
    slots = engine.runner.slots
    return {page for pages in slots.slot_pages.values() for page in pages.ids}


def test_a_prefix_stays_before_an_adapter_that_was_used_longer_ago_and_not_before_another(
    world: TinyWorld, make_lending: MakeEngine
) -> None:
    lending = make_lending(num_adapter_pages=2)
    served(lending, *many(world, 1))
    served(lending, request(world, "a", PROMPT, "a4"), request(world, "c", PROMPT, "c8"))
    assert lending.stats().resident_adapters == 2
    served(lending, request(world, "0", PROMPT, max_tokens=20))  # drops what is older than the adapters
    assert lending.stats().resident_adapters == 2
    for number in range(2, 6):  # and these what is younger
        served(lending, request(world, str(number), PROMPT[number:], max_tokens=40))
    assert lending.stats().adapter_evictions > 0
    assert lending.runner.slots.pages.num_lent > 0


def test_sequences_in_a_page_that_an_adapter_takes_go_on_in_others(
    world: TinyWorld, make_engine: MakeEngine, make_lending: MakeEngine
) -> None:
    late = request(world, "b", PROMPT, "b20", max_tokens=30)
    first, second = many(world, 2)
    wanted = served(make_engine(), second, late)
    lending = make_lending(num_adapter_pages=2)
    run(lending, replace(first, sampling=replace(first.sampling, max_tokens=100)))
    lending.add(second, lending.encode(second))
    lending.host_cache.get(late.adapter.digest).result()
    deltas = {}
    for number in range(60):
        if number == 10:
            first_own = lending.runner.arena.own_blocks.start
            assert min(lending.scheduler.running[0].block_table) < first_own
            lending.add(late, lending.encode(late))
        for delta in lending.step().deltas:
            deltas.setdefault(delta.request_id, []).append(delta)
        if number > 10 and lending.residency.num_held:
            break
    assert number == 11  # asked for and emptied, then taken
    assert len(lending.scheduler.running) == 2
    assert {name: tokens(given) for name, given in drain(lending, deltas).items()} == wanted
    assert lending.stats().num_preemptions == 0


@pytest.mark.parametrize("num_beside", [1, 5])
def test_an_urgent_request_preempts_for_pages_only_where_those_in_them_cannot_move(
    world: TinyWorld, make_lending: MakeEngine, num_beside: int
) -> None:
    lending = make_lending(num_adapter_pages=3, enable_prefix_caching=num_beside == 1)
    run(lending, request(world, "before", PROMPT[5:], max_tokens=100))  # fills the cache's own blocks
    adapted = request(world, "a", PROMPT, "a4", max_tokens=40)
    lending.host_cache.get(adapted.adapter.digest).result()
    for one in [adapted, *many(world, num_beside)]:
        lending.add(replace(one, priority=1), lending.encode(one))
    steps(lending, 28)
    assert lending.residency.num_held == 1
    assert lending.runner.slots.pages.num_lent == 1
    urgent = request(world, "b", PROMPT[:8], "b20")  # needs two, and one is free
    lending.host_cache.get(urgent.adapter.digest).result()
    lending.add(urgent, lending.encode(urgent))
    while "b20" not in "".join(lending.residency.stats.resident):
        lending.step()
    assert (lending.stats().num_preemptions > 0) == (num_beside == 5)
    drain(lending)


def test_nobody_who_came_later_has_the_blocks_that_an_adapters_pages_are_emptied_into(
    world: TinyWorld, make_lending: MakeEngine
) -> None:
    lending = make_lending(num_adapter_pages=3)
    before, after = many(world, 12), [replace(one, request_id=f"{one.request_id}'") for one in many(world, 12)]
    adapter = request(world, "b", PROMPT, "b20")
    lending.host_cache.get(adapter.adapter.digest).result()
    requests = [*before, adapter, *after]
    for one in requests:
        lending.add(one, lending.encode(one))
    started: dict[str, int] = {}
    for number in range(500):
        for delta in lending.step().deltas:
            started.setdefault(delta.request_id, number)
    assert not lending.has_work
    assert started["b"] < min(started[one.request_id] for one in after)
    assert lending.stats().num_preemptions < len(requests)


def test_adapters_that_nobody_uses_give_their_pages_up(
    world: TinyWorld, make_engine: MakeEngine, make_lending: MakeEngine
) -> None:
    lending, roomy = make_lending(num_adapter_pages=3), make_engine()
    adapted = [request(world, name, PROMPT, name) for name in ("b20", "c8")]
    assert served(lending, *adapted) == served(roomy, *adapted)
    assert lending.stats().resident_adapters == 2
    requests = many(world, 8)
    assert served(lending, *requests) == served(roomy, *requests)
    assert lending.stats().num_preemptions == 0
    assert lending.stats().adapter_evictions > 0
    again = [replace(one, request_id=one.request_id + "'") for one in adapted]
    assert served(lending, *again) == served(roomy, *again)


def test_an_adapter_that_comes_has_pages_emptied_and_waits_alone(
    world: TinyWorld, make_engine: MakeEngine, make_lending: MakeEngine
) -> None:
    lending = make_lending(num_adapter_pages=2, max_num_seqs=16, enable_prefix_caching=False)
    wanted = served(make_engine(), *many(world, 12), request(world, "b", PROMPT, "b20"))
    for one in many(world, 12):
        lending.add(one, lending.encode(one))
    steps(lending, 24)
    pages = lending.runner.slots.pages
    assert pages.num_lent == 2  # both, and the adapter needs both
    late = request(world, "b", PROMPT, "b20")
    lending.add(late, lending.encode(late))
    deltas: dict[str, list[TokenDelta]] = {}
    while not lending.residency.num_held:
        output = lending.step()
        assert output.deltas
        for delta in output.deltas:
            deltas.setdefault(delta.request_id, []).append(delta)
    assert pages.num_lent == 0
    assert lending.scheduler.running
    assert tokens(drain(lending, deltas)["b"]) == wanted["b"]


def test_pages_are_lent_again_when_who_waited_for_them_is_gone(world: TinyWorld, make_lending: MakeEngine) -> None:
    lending = make_lending(num_adapter_pages=2)
    for one in many(world, 8):
        lending.add(one, lending.encode(one))
    steps(lending, 10)
    late = request(world, "b", PROMPT, "b20")
    lending.add(late, lending.encode(late))
    for _ in range(200):
        lending.step()
        if not lending.runner.slots.pages.may_lend:
            break
    assert not lending.runner.slots.pages.may_lend
    output = lending.step()
    lending.cancel("b", output)
    steps(lending, 3)
    assert lending.runner.slots.pages.may_lend
    drain(lending)


@pytest.mark.parametrize("seed", range(4))
def test_no_token_depends_on_who_has_which_page(
    world: TinyWorld, make_engine: MakeEngine, make_lending: MakeEngine, seed: int
) -> None:
    rng = random.Random(seed)
    adapter_dtype = rng.choice(["auto", "int8"])
    lending = make_lending(
        adapter_dtype=adapter_dtype,
        num_adapter_pages=3,
        num_adapter_slots=rng.choice([2, 4]),
        kv_host_bytes=rng.choice([0, 200_000]),
        max_num_batched_tokens=rng.choice([16, None]),
    )
    for layer in lending.runner.cache.layers:
        layer.k.view(torch.uint8).fill_(255)  # all of the memory: what nobody has written is not a number
    requests = []
    for number in range(40):
        adapter = rng.choice([None, None, None, "a4", "b20", "c8"])
        prompt = PROMPT[rng.randrange(4) * 4 :] + [rng.randrange(300) for _ in range(rng.randrange(20))]
        speculative = rng.choice([0, 0, 3])
        requests.append(
            request(
                world,
                str(number),
                prompt,
                adapter,
                max_tokens=rng.randrange(1, 60),
                num_speculative_tokens=speculative,
                n=rng.choice([1, 1, 2]),
            )
        )
    wanted = served(make_engine(kv_cache_tokens=8192, adapter_dtype=adapter_dtype), *requests)
    deltas: dict[str, list[TokenDelta]] = {}
    waiting, lent = list(requests), set()
    while waiting or lending.has_work:
        for _ in range(rng.choice([0, 0, 1, 4])):
            if waiting:
                one = waiting.pop(0)
                lending.add(one, lending.encode(one))
        for delta in lending.step().deltas:
            deltas.setdefault(delta.request_id, []).append(delta)
        lending.residency.check_integrity()
        lending.blocks.check_integrity()
        lent.add(lending.runner.slots.pages.num_lent)
    lending.check_integrity()
    assert {name: tokens(given) for name, given in deltas.items()} == wanted
    assert len(lent) > 1
    assert lending.stats().adapter_loads > 3
