"""Who runs with which adapter, and who waits for room for one, on real blocks and slots."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from tests.gateway.engine.conftest import TinyWorld
from tests.gateway.engine.test_scheduler import (
    MakeEngine,
    add,
    finish,
    load,
    run_two_steps,
    running,
    steps_until_running,
)
from tests.tiny import stored_adapter


@pytest.fixture(scope="module")
def with_dora(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """With "d4" and "d8", which have vectors, and "e2"."""
    folder = tmp_path_factory.mktemp("dora")
    for name in ("d4", "d8", "e2"):
        ref = stored_adapter(
            world.base, folder / name, world.blobs, f"t/{name}:1", rank=int(name[1]), use_dora=name[0] == "d"
        )
        world = replace(world, refs=world.refs | {name: ref})
    return world


def test_of_the_adapters_that_run_the_one_done_soonest_is_drained_for_who_waits_for_a_slot(
    world: TinyWorld, make_engine: MakeEngine
) -> None:
    engine = make_engine(num_adapter_slots=2)
    load(engine, world, "a4", "b20", "c8")
    add(engine, world, "long", 4, "a4", max_tokens=40)
    add(engine, world, "short", 4, "c8", max_tokens=12)
    while len(running(engine)) < 2:
        engine.step()
    add(engine, world, "waits", 4, "b20", max_tokens=4)
    run_two_steps(engine)
    assert engine.residency.is_waiting_for_room(world.refs["b20"].digest)
    for request_id, adapter in (("long again", "a4"), ("short again", "c8"), ("base", None)):
        add(engine, world, request_id, 4, adapter, max_tokens=4)
    run_two_steps(engine)
    assert set(running(engine)) == {"long", "short", "long again", "base"}
    ends: list[str] = []
    while engine.has_work:
        ends += [delta.request_id for delta in engine.step().deltas if delta.finish_reason == "length"]
    assert ends.index("short") < ends.index("waits") < ends.index("short again")
    assert len(ends) == 6
    engine.check_integrity()


def test_a_more_urgent_request_runs_with_an_adapter_that_is_drained(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(num_adapter_slots=1)
    load(engine, world, "a4", "b20")
    add(engine, world, "first", 4, "a4", max_tokens=20)
    while not running(engine):
        engine.step()
    add(engine, world, "waits", 4, "b20")
    run_two_steps(engine)
    add(engine, world, "urgent", 4, "a4", priority=-1)
    add(engine, world, "later", 4, "a4")
    run_two_steps(engine)
    assert set(running(engine)) == {"first", "urgent"}
    assert finish(engine) == {"first", "urgent", "waits", "later"}


@pytest.mark.parametrize("others", [(), ("b20", "c8", "e2")], ids=["free_slots", "idle_adapters_in_all_slots"])
def test_who_waits_for_a_row_of_vectors_holds_up_no_adapter_without(
    with_dora: TinyWorld, make_engine: MakeEngine, others: tuple[str, ...]
) -> None:
    engine, world = make_engine(num_vector_slots=1), with_dora
    load(engine, world, "a4", "d4", "d8", *others)
    for name in others:
        add(engine, world, f"was {name}", 4, name)
    finish(engine)
    add(engine, world, "vectors", 4, "d4", max_tokens=60)
    while not running(engine):
        engine.step()
    add(engine, world, "more vectors", 4, "d8")
    run_two_steps(engine)
    add(engine, world, "again", 4, "d4")
    add(engine, world, "none", 4, "a4")
    for _ in range(6):
        engine.step()
    assert set(running(engine)) == {"vectors", "none"}
    assert finish(engine) == {"vectors", "more vectors", "again", "none"}


def test_an_urgent_request_takes_no_adapter_s_place_that_would_not_do(
    with_dora: TinyWorld, make_engine: MakeEngine
) -> None:
    engine, world = make_engine(num_adapter_slots=2, num_vector_slots=1), with_dora
    load(engine, world, "a4", "d4", "d8")
    add(engine, world, "vectors", 4, "d4", max_tokens=30)
    add(engine, world, "low", 4, "a4", priority=5, max_tokens=20)
    while len(running(engine)) < 2:
        engine.step()
    add(engine, world, "urgent", 4, "d8")
    for _ in range(5):
        engine.step()
    assert running(engine) == ["vectors", "low"]
    assert finish(engine) == {"vectors", "low", "urgent"}
    assert engine.scheduler.num_preemptions == 0


def test_an_urgent_request_takes_the_slot_of_an_adapter_that_only_others_use(
    world: TinyWorld, make_engine: MakeEngine
) -> None:
    engine = make_engine(num_adapter_slots=2)
    load(engine, world, "a4", "b20", "c8")
    for name, adapter, priority in (("kept", "a4", 0), ("also kept", "a4", 3), ("gives way", "b20", 2)):
        add(engine, world, name, 4, adapter, priority=priority)
    while len(engine.scheduler.running) < 3:
        engine.step()
    add(engine, world, "urgent", 4, "c8", priority=1)
    while "urgent" not in running(engine):
        engine.step()
    assert running(engine) == ["kept", "urgent", "also kept"]
    assert finish(engine) == {"kept", "also kept", "gives way", "urgent"}


@pytest.mark.parametrize("settings", [{"num_adapter_slots": 1}, {"max_adapter_pages_per_step": 2}])
def test_an_adapter_that_waits_for_room_does_not_starve(
    world: TinyWorld, make_engine: MakeEngine, settings: dict[str, Any]
) -> None:
    engine = make_engine(**settings)
    load(engine, world, "a4", "b20")

    def stream(step: int) -> None:
        add(engine, world, f"s{step}", 4, "a4", tenant="b", tenant_weight=100.0)

    add(engine, world, "served", 4, tenant="a", max_tokens=100)
    while len(engine.scheduler.running) < 4:
        stream(-len(running(engine)) - 1)
        engine.step()
    add(engine, world, "other", 4, "b20", tenant="a")
    assert steps_until_running(engine, world, "other", stream) < 60


def test_at_the_limit_of_pages_those_whose_adapter_runs_go_first(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(max_adapter_pages_per_step=2, max_num_seqs=64)
    load(engine, world, "a4", "b20", "c8")
    add(engine, world, "a", 4, "a4", max_tokens=40)
    while not running(engine):
        engine.step()
    add(engine, world, "b", 4, "b20")  # of two pages
    for i in range(20):
        add(engine, world, f"a{i}", 4, "a4")
    add(engine, world, "base", 4)
    engine.step()
    # Sixteen pass the one that waits, then no adapter does any more; the base reads no pages.
    assert set(running(engine)) == {"a", *(f"a{i}" for i in range(16)), "base"}
    assert len(finish(engine)) == 23


def test_an_adapter_of_more_pages_than_the_limit_runs_alone(world: TinyWorld, make_engine: MakeEngine) -> None:
    engine = make_engine(max_adapter_pages_per_step=1)
    load(engine, world, "a4", "b20")
    for name, adapter in (("small", "a4"), ("big", "b20"), ("base", None)):
        add(engine, world, name, 4, adapter)
    together = set()
    while engine.has_work:
        together.add(frozenset(running(engine)))
        engine.step()
    assert any("big" in names for names in together)
    assert not any({"small", "big"} <= names for names in together)


def test_a_less_urgent_adapter_does_not_pass_one_that_waits_for_pages(
    world: TinyWorld, make_engine: MakeEngine
) -> None:
    engine = make_engine(max_adapter_pages_per_step=2)
    load(engine, world, "a4", "b20")
    add(engine, world, "a", 4, "a4")
    while not running(engine):
        engine.step()
    add(engine, world, "urgent", 4, "b20")
    add(engine, world, "low", 4, "a4", priority=1)
    while "urgent" not in running(engine):
        assert "low" not in running(engine)
        engine.step()
    assert engine.scheduler.num_preemptions == 0


def test_a_tenant_at_its_share_of_the_slots_holds_up_nobody_else(world: TinyWorld, make_engine: MakeEngine) -> None:
    """Of two slots a tenant may have one: its second adapter waits for its first, and what comes next for both."""
    engine = make_engine(num_adapter_slots=2, tenant_adapter_share=0.5)
    load(engine, world, "a4", "b20", "c8")
    names = {"a4": "acme/a:1", "b20": "acme/b:1", "c8": "zeta/c:1"}
    world = replace(world, refs={key: replace(world.refs[key], name=name) for key, name in names.items()})
    add(engine, world, "a", 4, "a4", max_tokens=12)
    while not running(engine):
        engine.step()
    for request_id, adapter in (("b", "b20"), ("a again", "a4"), ("c", "c8")):
        add(engine, world, request_id, 4, adapter)
    engine.step()
    assert set(running(engine)) == {"a", "c"}
    ends: list[str] = []
    while engine.has_work:
        ends += [delta.request_id for delta in engine.step().deltas if delta.finish_reason == "length"]
    assert [end for end in ends if end != "c"] == ["a", "b", "a again"]
    assert "c" in ends
    engine.check_integrity()


def test_two_of_one_tenant_at_its_share_do_not_wait_for_each_other(
    with_dora: TinyWorld, make_engine: MakeEngine
) -> None:
    """One is in host memory before its turn when a more urgent one comes; the tenant's idle adapter is wanted too."""
    engine = make_engine(num_adapter_slots=2, num_adapter_pages=8, tenant_adapter_share=0.5, max_num_seqs=2)
    world = replace(with_dora, refs=with_dora.refs | {"c8": replace(with_dora.refs["c8"], name="u/c8:1")})
    add(engine, world, "was a4", 4, "a4")
    add(engine, world, "was c8", 4, "c8", tenant="u")
    finish(engine)
    for name in ("one", "two"):  # take both places
        add(engine, world, name, 4, tenant="u", max_tokens=40)
    engine.step()
    add(engine, world, "early", 4, "b20", priority=1)
    add(engine, world, "late", 4, "a4", priority=2)
    for _ in range(10):
        engine.step()
        time.sleep(0.005)  # for the thread that reads
    engine.host_cache.get(world.refs["b20"].digest).result()
    engine.step()
    add(engine, world, "urgent", 4, "d4")
    ends: list[str] = []
    for _ in range(500):
        ends += [delta.request_id for delta in engine.step().deltas if delta.finish_reason]
    assert set(ends) == {"one", "two", "urgent", "early", "late"}
    engine.check_integrity()
