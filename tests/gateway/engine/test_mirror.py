"""What other ranks are told of a step makes the step that rank 0 runs."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from adapters_store.slots import AdapterSlots
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.mirror import Announcer, Mirror, StepNews
from gateway.engine.pending import PendingTokens
from gateway.engine.scheduler import SchedulerOutput
from gateway.engine.sequence import Sequence
from tests.gateway.engine import test_speculation
from tests.gateway.engine.conftest import TinyWorld
from tests.gateway.engine.test_in_flight import CALLS, Call, serve

MakeEngine = Callable[..., LLMEngine]


class OtherRank:
    """Hears of an engine's steps as another rank does, and compares."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.announcer, self.mirror = Announcer(), Mirror()
        slots = engine.runner.slots
        self.slots = AdapterSlots(slots.layout, slots.num_slots, slots.num_pages, torch.float32, "cpu")
        self.tables: dict[Sequence, tuple[list[int], list[int]]] = {}
        self.news: list[StepNews] = []
        self._execute = engine.runner.execute
        engine.runner.execute = self.execute  # type: ignore[method-assign]

    def execute(self, output: SchedulerOutput, pending: PendingTokens | None) -> torch.Tensor:
        news = ForkingPickler.loads(ForkingPickler.dumps(self.announcer.news(output, pending, self.engine._slots)))
        self.news.append(news)
        self._load(news)
        self._compare(self.mirror.output(news), output)
        if pending is not None:
            assert news.num_pending == len(pending.token_ids)
            assert news.sources is not None
            assert news.sources.tolist() == pending.sources.tolist()
        return self._execute(output, pending)

    def _load(self, news: StepNews) -> None:
        for slot in news.freed:
            self.slots.free(slot)
        for slot, digest, pages in news.loaded:
            self.slots.load(slot, self.engine.host_cache.get(digest).result(), pages)
        self.slots.check_integrity()

    def _compare(self, got: SchedulerOutput, wanted: SchedulerOutput) -> None:
        assert (got.saves, got.loads, got.copies) == (wanted.saves, wanted.loads, wanted.copies)
        assert (got.number, got.num_tokens) == (wanted.number, wanted.num_tokens)
        mirrored = [chunk.sequence for chunk in got.scheduled]
        originals = [chunk.sequence for chunk in wanted.scheduled]
        assert [mirrored.index(s) for s in got.sampled] == [originals.index(s) for s in wanted.sampled]
        own = [(mirrored.index(chunk.sequence), chunk[1:]) for chunk in got.prefixes]
        assert own == [(originals.index(chunk.sequence), chunk[1:]) for chunk in wanted.prefixes]
        for mine, theirs in zip(got.scheduled, wanted.scheduled, strict=True):
            self._compare_sequences(mine.sequence, theirs.sequence)
            assert mine[1:] == theirs[1:]
            assert mine.sequence.known_tokens(*mine[1:]) == theirs.sequence.known_tokens(*theirs[1:])

    def _compare_sequences(self, mine: Sequence, theirs: Sequence) -> None:
        assert (mine.token_ids, mine.block_table, mine.slot) == (theirs.token_ids, theirs.block_table, theirs.slot)
        if theirs.slot >= 0:
            assert self.slots.pages_of(mine.slot) == self.engine.runner.slots.pages_of(theirs.slot)
        # Step inputs tell by the list whether what they have sent of it still holds.
        mine_before, theirs_before = self.tables.get(theirs, ([], []))
        assert (mine.block_table is mine_before) == (theirs.block_table is theirs_before)
        self.tables[theirs] = mine.block_table, theirs.block_table


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=set(Phase) - {Phase.shrink},
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(calls=CALLS, num_slots=st.integers(1, 3), tokens=st.sampled_from([96, 2048]), overlap=st.booleans())
def test_a_mirrored_step_is_the_step(
    world: TinyWorld, build_engine: MakeEngine, calls: list[Call], num_slots: int, tokens: int, overlap: bool
) -> None:
    settings: dict[str, Any] = {"num_adapter_slots": num_slots, "kv_cache_tokens": tokens, "overlap_steps": overlap}
    engine = build_engine(**settings, max_num_batched_tokens=16, kv_host_bytes=1 << 20)
    OtherRank(engine)
    serve(engine, world, calls)


@pytest.mark.parametrize("overlap", [False, True])
def test_guesses_are_told_in_the_step_that_verifies_them(
    world: TinyWorld, build_engine: MakeEngine, overlap: bool
) -> None:
    engine = build_engine(overlap_steps=overlap)
    other = OtherRank(engine)
    calls = [test_speculation.Call(adapter="a4", sampling=i, guessed=3 * (i % 2), n=2, comes=i) for i in range(4)]
    test_speculation.run(engine, world, *calls)
    told = sum(len(drafts) for news in other.news for drafts in news.drafts.values())
    assert engine.stats().num_drafts == told > 0
    assert any(not news.drafts for news in other.news)
    assert any(news.copies for news in other.news)  # the second of each request takes over the first one's prompt


@pytest.mark.parametrize("overlap", [False, True])
def test_a_decode_step_tells_what_is_new(world: TinyWorld, build_engine: MakeEngine, overlap: bool) -> None:
    engine = build_engine(overlap_steps=overlap)
    other = OtherRank(engine)
    serve(engine, world, [Call(0, 9 + i, "a4", 0, 1, 12, 0) for i in range(4)])
    decode = [news for news in other.news if all(row[2] == 1 for row in news.rows)]
    assert len(decode) > 8
    assert all(max(len(news.token_ids), len(news.blocks)) <= len(news.rows) for news in decode)
    assert sum(len(news.loaded) for news in other.news) == 1


def test_sequences_that_have_ended_are_forgotten(world: TinyWorld, build_engine: MakeEngine) -> None:
    engine = build_engine()
    other = OtherRank(engine)
    serve(engine, world, [Call(0, 5, None, 0, 1, 8, comes) for comes in range(0, 200, 4)])
    assert sum(len(news.ended) for news in other.news) > 30
    assert len(other.mirror._sequences) == len(other.announcer._told) < 20
