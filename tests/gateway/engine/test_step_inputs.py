"""The persistent inputs of recorded steps against those that are made anew for each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from adapters_store.page_image import PageImage
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.pending import PendingTokens
from gateway.engine.request import GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.scheduler_output import Chunk, SchedulerOutput
from gateway.engine.stats import StepOutput
from gateway.engine.step_inputs import StepInputs
from gateway.engine.step_tokens import StepTokens
from gateway.layers.forward_batch import ForwardBatch, VirtualRows
from lora_kernels.segments import DeviceRouting, Routing
from tests.gateway.engine.conftest import TinyWorld

MakeEngine = Callable[..., LLMEngine]
SIZE = 8  # of steps of decode rows alone
RAGGED_SIZE = 24
PROMPT = list(range(40, 71))


@dataclass
class Mirror:
    """Fills step inputs beside an engine's own batches, and compares the two at every step."""

    engine: LLMEngine
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        runner = self.engine.runner
        self.inputs = StepInputs(
            runner.cache, runner.slots, runner.rotary, torch.device("cpu"),
            size=RAGGED_SIZE, max_blocks=64, max_pages=2, max_pending=SIZE,
        )  # fmt: skip
        self._make = runner._batch

    def batch(self, tokens: StepTokens, virtual: VirtualRows | None, pending: PendingTokens | None) -> ForwardBatch:
        wanted = self._make(tokens, virtual, pending)
        size = SIZE if tokens.is_decode else RAGGED_SIZE
        adapted = wanted.segments is not None
        num_pages = self.inputs.route(tokens, size)
        assert num_pages == (wanted.segments.most_pages if wanted.segments is not None else 0)
        self.inputs.fill(tokens, pending, size)
        made = self.inputs.batch(size, 2 * size if adapted else 0, None if tokens.is_decode else SIZE)
        self.compare(made, wanted, tokens.num_single)
        kind = "decode" if tokens.is_decode else "ragged"
        self.seen.update({kind: 1, f"{kind} adapted": adapted, f"{kind} pending": pending is not None})
        self.seen[f"{kind} joined"] += pending is not None and not pending.is_pending.all()
        tables = tokens.block_tables
        self.seen[f"{kind} drafted"] += any(one is other for one, other in pairwise(tables))
        self.seen["mixed"] += 0 < tokens.num_single < len(tokens.query_lens)
        self.seen[f"{kind} padded"] += len(tokens) < size
        return wanted

    def compare(self, got: ForwardBatch, wanted: ForwardBatch, single: int) -> None:
        size = len(got.input_ids)
        padding = size - len(wanted.input_ids)
        rows = torch.arange(size - padding)
        rows[single:] += padding
        for name in ("input_ids", "slot_mapping", "cos", "sin"):
            assert torch.equal(getattr(got, name)[rows], getattr(wanted, name)), name
        scratch = self.engine.runner.cache.scratch_slot
        assert got.slot_mapping[single : single + padding].tolist() == [scratch] * padding
        assert wanted.last_rows is not None
        if got.last_rows is not None:
            assert got.last_rows[: len(wanted.last_rows)].tolist() == rows[wanted.last_rows].tolist()
        self.compare_attention(got, wanted, single, padding)
        assert (got.segments is None) == (wanted.segments is None)
        if got.segments is not None and wanted.segments is not None:
            mine, anew = got.segments.routing, wanted.segments.routing
            table = anew.table.clone()
            table[1:, 3] = rows[table[1:, 3]].int()
            assert torch.equal(mine.table[: len(table)], table)
            adapted = num_adapted(anew)
            assert mine.token_order[:adapted].tolist() == rows[anew.token_order[:adapted]].tolist()

    def compare_attention(self, got: ForwardBatch, wanted: ForwardBatch, single: int, padding: int) -> None:
        mine, anew = got.attention, wanted.attention
        alone, behind = [1] * padding, [0] * (len(mine.context_len) - padding - len(anew.context_lens))
        lens, contexts = anew.query_lens, anew.context_lens
        query_lens = [*lens[:single], *alone, *lens[single:], *(behind if got.last_rows is not None else [])]
        assert mine.query_start.diff().tolist() == query_lens
        assert mine.context_len.tolist() == [*contexts[:single], *[0] * padding, *contexts[single:], *behind]
        for seq in range(len(contexts)):
            used, place = anew.num_blocks(seq), seq + (padding if seq >= single else 0)
            assert torch.equal(mine.block_table[place, :used], anew.block_table[seq, :used])


def tokens_of(engine: LLMEngine, chunk: Chunk) -> StepTokens:
    return StepTokens.of(SchedulerOutput(1, [chunk], [chunk.sequence]), None, engine.blocks.block_size)


def num_adapted(routing: DeviceRouting) -> int:
    """Tokens that have an adapter."""
    chunks = routing.table[1 : 1 + int(routing.table[0, 0])]
    return int(chunks[:, 1].sum())


def add(
    engine: LLMEngine, world: TinyWorld, name: str, length: int, adapter: str | None, max_tokens: int, **others: Any
) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **others)
    ref = world.refs[adapter] if adapter is not None else None
    request = GenerateRequest(name, params, prompt=PROMPT[:length], adapter=ref)
    engine.add(request, engine.encode(request))


@pytest.fixture
def mirrored(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mirror]:
    def make(**settings: Any) -> Mirror:
        mirror = Mirror(make_engine(max_num_seqs=SIZE, max_num_batched_tokens=RAGGED_SIZE, **settings))
        monkeypatch.setattr(mirror.engine.runner, "_batch", mirror.batch)
        return mirror

    return make


@pytest.mark.parametrize("kv_cache_tokens", [2048, 80])
def test_what_was_sent_before_and_what_changed_make_the_whole(
    world: TinyWorld, mirrored: Callable[..., Mirror], kv_cache_tokens: int
) -> None:
    mirror = mirrored(kv_cache_tokens=kv_cache_tokens, num_adapter_slots=2)
    engine = mirror.engine
    for ref in world.refs.values():
        engine.host_cache.get(ref.digest).result()  # so that every run schedules alike
    names = [None, "a4", "b20", "c8", "a4", None, "b20", None]
    for i, name in enumerate(names):
        add(engine, world, str(i), 5 + 3 * i, name, 6 + 10 * (i % 4))
        for _ in range(i % 3):
            engine.step()
    engine.cancel("1", StepOutput())
    add(engine, world, "short", 1, None, 8)
    while engine.has_work:
        engine.step()
    add(engine, world, "alone", 5, None, 30)
    for _ in range(4):
        engine.step()
    add(engine, world, "joins", 1, None, 8)  # as a decode row whose token the host knows, beside one in flight
    while engine.has_work:
        engine.step()
    for kind in ("decode", "ragged"):
        assert mirror.seen[kind] > 5
        assert mirror.seen[f"{kind} adapted"] > 5
        assert mirror.seen[f"{kind} padded"] > 2
        assert (mirror.seen[f"{kind} pending"] > 4) == engine._overlap
        assert (mirror.seen[f"{kind} joined"] > 0) == engine._overlap
    assert mirror.seen["mixed"] > 4
    assert (engine.stats().num_preemptions > 0) == (kv_cache_tokens == 80)
    assert engine.stats().adapter_evictions > 0


def test_each_draft_is_a_row_of_its_own(world: TinyWorld, mirrored: Callable[..., Mirror]) -> None:
    mirror = mirrored(max_speculative_tokens=SIZE - 1)
    engine = mirror.engine
    for ref in world.refs.values():
        engine.host_cache.get(ref.digest).result()
    taking_turns: dict[str, Any] = {"logit_bias": {60: 90.0, 61: 90.0, 62: 90.0}, "frequency_penalty": 2.0}
    for i, (name, guessed) in enumerate([(None, 3), ("a4", 0), (None, 0), ("b20", 2), ("a4", 7)]):
        add(engine, world, str(i), 5 + i, name, 30 + i, num_speculative_tokens=guessed, **taking_turns)
    while engine.stats().num_accepted < 3:
        engine.step()
    for i in range(8):  # beside whose prompts there is room for drafts
        add(engine, world, f"late {i}", 6 + i, "a4", 1)
        engine.step()
    while engine.has_work:
        engine.step()
    assert mirror.seen["decode adapted"] > 10
    assert mirror.seen["ragged drafted"] > 0
    stats = engine.stats()
    assert stats.num_drafts > 15
    assert 5 < stats.num_accepted < stats.num_drafts - 5


def test_the_routing_is_built_when_rows_or_slots_change_and_only_then(
    world: TinyWorld, mirrored: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = mirrored(num_adapter_slots=1)
    engine, built = mirror.engine, []
    of = Routing.of
    monkeypatch.setattr(Routing, "of", lambda *args: built.append(args) or of(*args))
    for name in ("a4", "c8"):  # the same slot number twice
        add(engine, world, name, 5, name, 12)
        while engine.has_work:
            engine.step()
    assert mirror.seen["decode adapted"] > 20
    assert len(built) == 4  # for the prompt's rows, and for the one that decodes


def test_the_blocks_of_a_sequence_that_was_preempted_are_sent_anew(make_engine: MakeEngine, world: TinyWorld) -> None:
    mirror = Mirror(make_engine())
    engine, inputs = mirror.engine, mirror.inputs
    add(engine, world, "r", 9, None, 3)
    engine.step()
    (sequence,) = engine.scheduler.running
    before = list(sequence.block_table)
    inputs.fill(tokens_of(engine, Chunk(sequence, 8, 1)), None, SIZE)
    engine.blocks.release(sequence)
    engine.blocks.grow(sequence, 9)
    assert sequence.block_table != before
    inputs.fill(tokens_of(engine, Chunk(sequence, 8, 1)), None, SIZE)
    batch = inputs.batch(SIZE, most_pages=0)
    assert batch.attention.block_table[0, :3].tolist() == sequence.block_table


def test_before_any_step_all_is_padding(make_engine: MakeEngine) -> None:
    mirror = Mirror(make_engine())
    batch = mirror.inputs.batch(SIZE, most_pages=0)
    assert batch.attention.context_len.tolist() == [0] * SIZE
    assert batch.slot_mapping.tolist() == [mirror.engine.runner.cache.scratch_slot] * SIZE


def test_an_adapter_of_too_many_pages_does_not_fit(world: TinyWorld, build_engine: MakeEngine) -> None:
    engine = build_engine()
    add(engine, world, "r", 5, "b20", 3)
    while not engine.scheduler.running:
        engine.step()
    runner = engine.runner
    inputs = StepInputs(
        runner.cache, runner.slots, runner.rotary, torch.device("cpu"),
        size=SIZE, max_blocks=64, max_pages=1, max_pending=SIZE,
    )  # fmt: skip
    assert inputs.route(tokens_of(engine, Chunk(engine.scheduler.running[0], 4, 1)), SIZE) is None


def test_a_row_whose_adapter_has_no_pages_is_routed_as_the_base(world: TinyWorld, build_engine: MakeEngine) -> None:
    engine = build_engine()
    slots = engine.runner.slots
    slots.load(0, PageImage(0, (), virtual_tokens=torch.ones(3, 64)))
    slots.load(1, engine.host_cache.get(world.refs["a4"].digest).result())
    inputs = Mirror(engine).inputs
    assert inputs.route(rows_in([0, -1, 0]), SIZE) == 0
    assert inputs.route(rows_in([0, 1, -1]), SIZE) == 1
    segments = inputs.batch(SIZE, 2 * SIZE).segments
    assert segments is not None
    assert segments.routing.token_order[0] == 1
    assert segments.routing.table[0, :2].tolist() == [1, 1]
    assert inputs.route(rows_in([0, 0, 0]), SIZE) == 0
    assert segments.routing.table[0].tolist() == [0] * 8


def rows_in(slots: list[int]) -> StepTokens:
    """Decode rows of these adapter slots."""
    none, ones = np.zeros(len(slots), np.int64), np.ones(len(slots), np.int64)
    return StepTokens(
        ids=none, positions=none, cache_slots=none, adapter_slots=np.array(slots, np.int32), query_lens=ones,
        context_lens=ones, num_single=len(slots), block_tables=[], last_rows=np.arange(len(slots)),
    )  # fmt: skip
