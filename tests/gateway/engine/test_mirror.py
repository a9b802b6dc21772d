"""What other ranks are told of a step makes the step that rank 0 runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from multiprocessing.reduction import ForkingPickler
from operator import attrgetter, is_
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from adapters_store.bottleneck_slots import BottleneckSlots
from adapters_store.page_image import PageImage
from adapters_store.slots import AdapterSlots
from adapters_store.token_pool import TokenPool
from adapters_store.vector_slots import VectorSlots
from adapters_store.weights import TokenTable
from gateway.engine.detokenizer import IncrementalDetokenizer
from gateway.engine.detokenizer import TokenTable as Vocabulary
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.mirror import Announcer, Mirror, StepNews
from gateway.engine.pending import PendingTokens
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.sampling_row import SamplingRow
from gateway.engine.scheduler_output import Chunk, SchedulerOutput
from gateway.engine.sequence import RunningRequest, Sequence
from tests.adapters_store.random_adapters import (
    BOTTLENECKS,
    LAYOUT,
    VECTORS,
    bottleneck_image,
    make_image,
    random_bottlenecks,
    random_weights,
)
from tests.gateway.engine import test_speculation
from tests.gateway.engine.conftest import TinyWorld
from tests.gateway.engine.test_in_flight import CALLS, Call, serve
from tests.tiny import make_tokenizer

MakeSequence = Callable[[AdapterRef, int], Sequence]
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
        in_flight = [] if pending is None else np.flatnonzero(pending.is_pending[: len(output.rows)]).tolist()
        self._compare(self.mirror.output(news), output, in_flight)
        if pending is not None:
            assert news.num_pending == len(pending.token_ids)
            assert news.sources is not None
            assert news.sources.tolist() == pending.sources.tolist()
        return self._execute(output, pending)

    def _load(self, news: StepNews) -> None:
        for slot in news.freed:
            self.slots.free(slot)
        for slot, digest, place in news.loaded:
            self.slots.load(slot, self.engine.host_cache.get(digest).result(), place)
        self.slots.check_integrity()

    def _compare(self, got: SchedulerOutput, wanted: SchedulerOutput, in_flight: list[int]) -> None:
        assert (got.saves, got.loads, got.copies) == (wanted.saves, wanted.loads, wanted.copies)
        assert (got.number, got.num_tokens) == (wanted.number, wanted.num_tokens)
        mirrored = [chunk.sequence for chunk in got.scheduled]
        originals = [chunk.sequence for chunk in wanted.scheduled]
        assert [mirrored.index(s) for s in got.sampled] == [originals.index(s) for s in wanted.sampled]
        own = [(mirrored.index(chunk.sequence), chunk[1:]) for chunk in got.prefixes]
        assert own == [(originals.index(chunk.sequence), chunk[1:]) for chunk in wanted.prefixes]
        assert np.array_equal(got.rows.numbers, wanted.rows.numbers)
        for row, (mine, theirs) in enumerate(zip(got.scheduled, wanted.scheduled, strict=True)):
            self._compare_sequences(mine.sequence, theirs.sequence, is_row=row < len(wanted.rows))
            assert mine[1:] == theirs[1:]
            if row not in in_flight:  # else its tokens come over the device, and are told later
                assert mine.sequence.token_ids == theirs.sequence.token_ids
                assert mine.sequence.known_tokens(*mine[1:]) == theirs.sequence.known_tokens(*theirs[1:])
        tables = list(map(attrgetter("block_table"), got.rows.sequences))
        assert all(map(is_, got.rows.block_tables, tables))

    def _compare_sequences(self, mine: Sequence, theirs: Sequence, *, is_row: bool) -> None:
        assert mine.block_table == theirs.block_table
        assert is_row or mine.slot == theirs.slot
        if theirs.slot >= 0:
            assert self.slots.pages_of(theirs.slot) == self.engine.runner.slots.pages_of(theirs.slot)
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
    serve(engine, world, [Call(0, 9, "a4", 0, 1, 12, 0)] * 4)
    decode = [news for news in other.news if not len(news.chunks)]
    assert len(decode) > 8
    assert all(len(news.blocks) <= len(news.row_keys) for news in decode)
    assert sum(len(news.token_ids) for news in other.news) <= 4 * (9 + 12)  # each once
    assert sum(len(news.loaded) for news in other.news) == 1
    # Of rows whose tokens are on their way nothing is told while they stay in a block.
    assert sum(not len(news.growth) for news in decode) > (len(decode) // 2 if overlap else -1)
    assert overlap or all(len(news.growth) for news in decode)


def test_sequences_that_have_ended_are_forgotten(world: TinyWorld, build_engine: MakeEngine) -> None:
    engine = build_engine()
    other = OtherRank(engine)
    serve(engine, world, [Call(0, 5, None, 0, 1, 8, comes) for comes in range(0, 200, 4)])
    assert sum(len(news.ended) for news in other.news) > 30
    assert len(other.mirror._sequences) == len(other.announcer._told) < 20


@pytest.fixture(scope="module")
def make_sequence(tmp_path_factory: pytest.TempPathFactory) -> MakeSequence:
    vocabulary = Vocabulary(make_tokenizer(tmp_path_factory.mktemp("tokenizer")).backend_tokenizer)
    params = SamplingParams()

    def sequence(adapter: AdapterRef, slot: int) -> Sequence:
        running = RunningRequest(GenerateRequest("r", params, prompt=[1], adapter=adapter), 1, 16)
        detokenizer = IncrementalDetokenizer(vocabulary, [1], params)
        return Sequence(running, 0, [1], b"", SamplingRow(params, [1], 1), detokenizer, slot=slot)

    return sequence


def small_slots() -> AdapterSlots:
    width = LAYOUT.groups[0].in_features
    return AdapterSlots(
        LAYOUT, 6, 6, torch.float32, "cpu", VectorSlots(VECTORS, 3, "cpu"), BottleneckSlots(BOTTLENECKS, 3, "cpu"),
        TokenPool(100, width, 1000, torch.float32, "cpu"),
    )  # fmt: skip


def trained_tokens(number: int) -> PageImage:
    rows = torch.full((number, LAYOUT.groups[0].in_features), float(number))
    return PageImage(0, (), token_tables=(TokenTable(("embed_tokens",), torch.arange(number), rows),))


class TwoRanks:
    """The slots of rank 0, and of another that hears of the adapters that steps use."""

    def __init__(self, make_sequence: MakeSequence) -> None:
        self.here, self.there = small_slots(), small_slots()
        self.held: dict[int, tuple[AdapterRef, PageImage]] = {}  # by slot of rank 0
        self._make_sequence = make_sequence
        self._announcer = Announcer()
        self._number = count(1)

    def load(self, image: PageImage) -> int:
        slot = self.here.next_free_slot
        assert slot is not None
        self.here.load(slot, image)
        self.held[slot] = AdapterRef(f"t/{slot}:1", f"{next(self._number):064}", image.rank), image
        return slot

    def free(self, slot: int) -> None:
        self.here.free(slot)
        del self.held[slot]

    def step(self, *slots: int) -> None:
        scheduled = [Chunk(self._make_sequence(self.held[slot][0], slot), 0, 1) for slot in slots]
        news = self._announcer.news(SchedulerOutput(next(self._number), scheduled), None, self.here)
        for slot in news.freed:
            self.there.free(slot)
        for slot, digest, place in news.loaded:
            ref, image = self.held[slot]
            assert digest == ref.digest
            self.there.load(slot, image, place)
        self.there.check_integrity()
        assert all(self.there.place(slot) == self.here.place(slot) for slot in slots)


def test_rows_of_tokens_lie_alike_where_some_adapters_were_never_used(make_sequence: MakeSequence) -> None:
    """The first of them leaves a gap on rank 0 that another rank has never had."""
    ranks = TwoRanks(make_sequence)
    unused = ranks.load(trained_tokens(40))
    first = ranks.load(trained_tokens(30))
    ranks.step(first)
    ranks.free(unused)
    for _ in range(2):
        ranks.step(ranks.load(trained_tokens(30)))
    ranks.free(first)
    ranks.step(ranks.load(trained_tokens(40)))


def test_what_fits_on_rank_0_fits_on_the_others(make_sequence: MakeSequence) -> None:
    """Adapters of all kinds come and go at random, and steps use some of them."""
    images = [
        make_image(random_weights(4, 0)),
        make_image(random_weights(40, 0)),
        PageImage(0, (), VECTORS.neutral),
        bottleneck_image(random_bottlenecks({"output": 5})),
        bottleneck_image(random_bottlenecks({"attention": 5, "output": 5})),
        *map(trained_tokens, (10, 20, 30, 40, 60)),
    ]
    ranks, random_ = TwoRanks(make_sequence), random.Random(0)
    num_loaded = 0
    for _ in range(3000):
        image = random_.choice(images)
        if ranks.here.has_room(image):
            ranks.load(image)
            num_loaded += 1
        else:
            ranks.free(random_.choice(list(ranks.held)))
        if random_.random() < 0.3:
            ranks.step(*random_.sample(list(ranks.held), min(2, len(ranks.held))))
    assert num_loaded > 1000
