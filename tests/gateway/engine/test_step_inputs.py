"""The persistent inputs of decode steps against those that are made anew for each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from gateway.engine.decode_inputs import DecodeInputs
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.pending import PendingTokens
from gateway.engine.request import GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.scheduler import Chunk, SchedulerOutput
from gateway.engine.stats import StepOutput
from gateway.layers.forward_batch import ForwardBatch
from lora_kernels.segments import Routing
from tests.gateway.engine.conftest import TinyWorld

MakeEngine = Callable[..., LLMEngine]
SIZE = 8
PROMPT = list(range(40, 71))


@dataclass
class Mirror:
    """Fills decode inputs beside an engine's own batches, and compares the two at every decode step."""

    engine: LLMEngine
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        runner = self.engine.runner
        self.inputs = DecodeInputs(
            runner.cache, runner.slots, runner.rotary, torch.device("cpu"),
            size=SIZE, max_blocks=64, max_pages=2, max_pending=SIZE,
        )  # fmt: skip
        self._make = runner._batch

    def batch(self, output: SchedulerOutput, pending: PendingTokens | None) -> ForwardBatch:
        wanted = self._make(output, pending)
        if output.is_decode:
            slots = [sequence.slot for sequence, _, _ in output.scheduled]
            adapted = max(slots) >= 0
            if adapted:
                assert wanted.segments is not None
                num_pages = self.inputs.route(torch.tensor(slots, dtype=torch.int32).numpy(), SIZE)
                assert num_pages == wanted.segments.most_pages
            self.inputs.fill(output.scheduled, pending)
            self.compare(self.inputs.batch(SIZE, 2 * SIZE if adapted else 0), wanted)
            self.seen.update(steps=1, adapted=adapted, pending=pending is not None)
            self.seen["drafted"] += len(output.drafted)
            self.seen["joined"] += pending is not None and not pending.is_pending.all()
        return wanted

    def compare(self, got: ForwardBatch, wanted: ForwardBatch) -> None:
        rows = len(wanted.input_ids)
        for name in ("input_ids", "slot_mapping", "cos", "sin"):
            assert torch.equal(getattr(got, name)[:rows], getattr(wanted, name)), name
        assert got.slot_mapping[rows:].tolist() == [self.engine.runner.cache.scratch_slot] * (SIZE - rows)
        assert got.attention.context_len.tolist() == [*wanted.attention.context_lens, *[0] * (SIZE - rows)]
        for row in range(rows):
            used = wanted.attention.num_blocks(row)
            assert torch.equal(got.attention.block_table[row, :used], wanted.attention.block_table[row, :used])
        assert (got.segments is None) == (wanted.segments is None)
        if got.segments is not None and wanted.segments is not None:
            mine, anew = got.segments.routing, wanted.segments.routing
            assert torch.equal(mine.table[: len(anew.table)], anew.table)
            assert torch.equal(mine.token_order[: len(anew.token_order)], anew.token_order)


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
        mirror = Mirror(make_engine(max_num_seqs=SIZE, **settings))
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
    add(engine, world, "short", 1, None, 8)  # joins as a decode row whose token the host knows
    while engine.has_work:
        engine.step()
    assert mirror.seen["steps"] > 15
    assert mirror.seen["adapted"] > 5
    assert (mirror.seen["pending"] > 10) == engine._overlap
    assert (mirror.seen["joined"] > 0) == engine._overlap
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
    while engine.has_work:
        engine.step()
    assert mirror.seen["adapted"] > 10
    assert mirror.seen["drafted"] > 15
    stats = engine.stats()
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
    assert mirror.seen["adapted"] > 20
    assert len(built) == 2


def test_the_blocks_of_a_sequence_that_was_preempted_are_sent_anew(make_engine: MakeEngine, world: TinyWorld) -> None:
    mirror = Mirror(make_engine())
    engine, inputs = mirror.engine, mirror.inputs
    add(engine, world, "r", 9, None, 3)
    engine.step()
    (sequence,) = engine.scheduler.running
    before = list(sequence.block_table)
    inputs.fill([Chunk(sequence, 8, 1)], None)
    engine.blocks.release(sequence)
    engine.blocks.grow(sequence, 9)
    assert sequence.block_table != before
    inputs.fill([Chunk(sequence, 8, 1)], None)
    batch = inputs.batch(SIZE, most_pages=0)
    assert batch.attention.block_table[0, :3].tolist() == sequence.block_table


def test_without_rows_all_is_padding(make_engine: MakeEngine) -> None:
    mirror = Mirror(make_engine())
    mirror.inputs.fill([], None)
    batch = mirror.inputs.batch(SIZE, most_pages=0)
    assert batch.attention.context_len.tolist() == [0] * SIZE
    assert batch.slot_mapping.tolist() == [mirror.engine.runner.cache.scratch_slot] * SIZE


def test_an_adapter_of_too_many_pages_does_not_fit(world: TinyWorld, build_engine: MakeEngine) -> None:
    engine = build_engine()
    add(engine, world, "r", 5, "b20", 3)
    while not engine.scheduler.running:
        engine.step()
    runner = engine.runner
    inputs = DecodeInputs(
        runner.cache, runner.slots, runner.rotary, torch.device("cpu"),
        size=SIZE, max_blocks=64, max_pages=1, max_pending=SIZE,
    )  # fmt: skip
    slots = torch.tensor([engine.scheduler.running[0].slot], dtype=torch.int32).numpy()
    assert inputs.route(slots, SIZE) is None
