"""The second tier of the KV cache: its copies, and engines that preempt and reuse prefixes through it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gateway.engine.host_blocks import BlockCopy
from gateway.engine.host_tier import HostTier
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.pending import PendingTokens
from gateway.engine.request import GenerateRequest
from gateway.engine.scheduler_output import SchedulerOutput
from gateway.engine.sequence import Sequence
from tests.gateway.engine.conftest import TinyWorld
from tests.gateway.engine.test_in_flight import GREEDY, PROMPT, Call, MakeEngine, Run, call, run, serve

BLOCK_BYTES = 2048  # of the tiny base: 4 tokens of 2 layers, 2 heads of 16, fp32
NUM_BLOCKS = 12


def layers_of(*tensors: torch.Tensor) -> list[list[torch.Tensor]]:
    """Two layers of such tensors, each with other content."""
    return [[(tensor + layer).to(tensor.dtype) for tensor in tensors] for layer in range(2)]


def copies(*pairs: tuple[int, int]) -> list[BlockCopy]:
    return [BlockCopy(*pair) for pair in pairs]


@pytest.mark.parametrize("parts", [1, 2, 100])
def test_blocks_come_back_bit_for_bit_with_all_that_a_layer_holds(parts: int) -> None:
    keys = torch.randn(NUM_BLOCKS, 4, 2, 8).half()
    scales = torch.rand(NUM_BLOCKS, 4, 2)
    codes = torch.randint(0, 256, (NUM_BLOCKS, 4, 2, 8), dtype=torch.uint8)
    layers = layers_of(keys, scales, codes)
    before = [[tensor.clone() for tensor in layer] for layer in layers]
    tier = HostTier(layers, 8, staging_bytes=parts * 2 * (4 * 2) * (16 + 4 + 8))
    tier.move(copies((3, 5), (0, 1), (7, 0)), [])
    for layer in layers:
        for tensor in layer:
            tensor[[0, 3, 7]] = 0
    tier.move([], copies((7, 5), (2, 1), (3, 0)))
    for layer, old in zip(layers, before, strict=True):
        for tensor, was in zip(layer, old, strict=True):
            assert torch.equal(tensor[[7, 2, 3]], was[[3, 0, 7]])
            assert torch.equal(tensor[[1, 4, 5, 6, 8]], was[[1, 4, 5, 6, 8]])


def test_a_block_that_leaves_may_be_filled_in_the_same_step() -> None:
    layers = layers_of(torch.randn(NUM_BLOCKS, 4, 2, 8))
    keys = layers[0][0]
    first, second = keys[1].clone(), keys[2].clone()
    tier = HostTier(layers, 4)
    tier.move(copies((1, 0)), [])
    tier.move(copies((2, 1)), copies((2, 0)))
    assert torch.equal(keys[2], first)
    tier.move([], copies((1, 1)))
    assert torch.equal(keys[1], second)


class Witness:
    """What each link's block held when an engine offered it."""

    def __init__(self, engine: LLMEngine) -> None:
        self.seen: dict[bytes, set[bytes]] = {}
        self._engine = engine
        self._seal = engine.blocks.seal
        engine.blocks.seal = self._look  # type: ignore[method-assign]

    def check(self) -> int:
        """Assert that each block on the host holds what its link's did. Returns how many there are."""
        tier = self._engine.runner.host_tier
        assert tier is not None
        held = self._engine.blocks.host._block_of
        for link, place in held.items():
            assert tier.blocks[place].numpy().tobytes() in self.seen[link]
        return len(held)

    def _look(self, sequence: Sequence, num_tokens: int) -> None:
        first = sequence.num_sealed
        self._seal(sequence, num_tokens)
        for i in range(first, sequence.num_sealed):
            content = self._content(sequence.block_table[i])
            self.seen.setdefault(sequence.block_hashes[i], set()).add(content)

    def _content(self, block: int) -> bytes:
        layers = self._engine.runner.cache.layers
        return b"".join(tensor[block].numpy().tobytes() for layer in layers for tensor in layer.tensors)


def tight(build_engine: MakeEngine, num_host_blocks: int, **chosen: Any) -> LLMEngine:
    """An engine of 24 blocks and a second tier, of which a step moves two blocks at a time."""
    engine = build_engine(**({"kv_cache_tokens": 96, "kv_host_bytes": num_host_blocks * BLOCK_BYTES} | chosen))
    layers = [layer.tensors for layer in engine.runner.cache.layers]
    engine.runner.host_tier = HostTier(layers, num_host_blocks, staging_bytes=2 * BLOCK_BYTES)
    return engine


CALLS = st.lists(
    st.builds(
        Call,
        start=st.sampled_from([0, 0, 1, 2, 4]),
        length=st.integers(9, 27),
        adapter=st.sampled_from([None, None, "a4", "b20"]),
        sampling=st.just(0),
        n=st.sampled_from([1, 1, 3]),
        max_tokens=st.integers(8, 40),
        comes=st.integers(0, 30),
        goes=st.sampled_from([None, None, 1, 7]),
    ),
    min_size=5,
    max_size=9,
)
CHOSEN = st.fixed_dictionaries(
    {
        "max_num_batched_tokens": st.sampled_from([8, 16, 1024]),
        "overlap_steps": st.booleans(),
        "num_adapter_slots": st.sampled_from([1, 4]),
    }
)


@pytest.mark.parametrize("num_host_blocks", [3, 200])
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=set(Phase) - {Phase.shrink},  # which takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(calls=CALLS, chosen=CHOSEN)
def test_few_blocks_and_a_second_tier_give_the_tokens_of_ample_blocks(
    world: TinyWorld, build_engine: MakeEngine, calls: list[Call], num_host_blocks: int, chosen: dict[str, Any]
) -> None:
    engine = tight(build_engine, num_host_blocks, **chosen)
    witness = Witness(engine)
    got = serve(engine, world, calls)
    wanted = serve(build_engine(), world, [replace(call, goes=None) for call in calls])
    assert got.deltas.keys() == wanted.deltas.keys()
    for (name, index), deltas in got.deltas.items():
        tokens, whole = got.tokens(name, index), wanted.tokens(name, index)
        cancelled = deltas[-1].finish_reason == "cancelled"
        assert tokens == (whole[: len(tokens)] if cancelled else whole)
    witness.check()


def crowd(count: int = 6) -> list[GenerateRequest]:
    return [call(GREEDY | {"max_tokens": 40}, str(i), PROMPT[i : i + 16]) for i in range(count)]


@pytest.fixture(params=[False, True], ids=["in_turn", "overlapping"])
def overlap_steps(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_a_preempted_sequence_computes_no_full_block_again(build_engine: MakeEngine, overlap_steps: bool) -> None:
    engine = tight(build_engine, 200, overlap_steps=overlap_steps)
    witness = Witness(engine)
    ample, done = run(build_engine(), *crowd()), run(engine, *crowd())
    stats = engine.stats()
    assert done.story == ample.story
    assert stats.num_preemptions > 0
    assert stats.kv_host_loaded > 0
    assert stats.kv_host_hits == 4 * stats.kv_host_loaded
    assert witness.check() == stats.kv_host_saved == round(stats.kv_host_usage * 200)
    assert done.num_rows - ample.num_rows <= engine.blocks.block_size * stats.num_preemptions


@pytest.mark.parametrize("off", [{"kv_host_bytes": 0}, {"kv_host_bytes": None}, {"enable_prefix_caching": False}])
def test_without_the_tier_a_preempted_sequence_is_computed_again(
    build_engine: MakeEngine, overlap_steps: bool, off: dict[str, Any]
) -> None:
    engine = build_engine(**({"kv_cache_tokens": 96, "kv_host_bytes": 1 << 20, "overlap_steps": overlap_steps} | off))
    assert engine.runner.host_tier is None
    assert run(engine, *crowd()).story == run(build_engine(), *crowd()).story
    assert engine.stats().num_preemptions > 0
    assert engine.stats().kv_host_saved == 0


def test_a_prefix_that_left_the_device_is_reported_as_cached(build_engine: MakeEngine, overlap_steps: bool) -> None:
    engine = tight(build_engine, 200, overlap_steps=overlap_steps)
    short = GREEDY | {"max_tokens": 2}
    first = run(engine, call(short))
    for start in range(4):
        run(engine, call(short, prompt=[100 + start * 30 + i for i in range(30)]))
    again = run(engine, call(short))
    usage = again.deltas["r", 0][-1].usage
    assert usage is not None
    assert usage.cached_tokens == 28
    assert engine.stats().kv_host_hits == 28
    assert again.tokens("r") == first.tokens("r")


def test_a_fetched_prefix_is_on_the_device_for_others(build_engine: MakeEngine, overlap_steps: bool) -> None:
    engine = tight(build_engine, 200, overlap_steps=overlap_steps)
    run(engine, call(GREEDY | {"max_tokens": 2}))
    for start in range(4):
        run(engine, call(GREEDY | {"max_tokens": 2}, prompt=[100 + start * 30 + i for i in range(30)]))
    run(engine, call(GREEDY | {"max_tokens": 2, "n": 3}))
    assert engine.stats().kv_host_loaded == 7


def test_after_a_failed_step_nothing_is_taken_from_the_host(
    build_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tight(build_engine, 200, overlap_steps=True)
    run(engine, *crowd())
    assert engine.stats().kv_host_usage > 0
    execute = engine.runner.execute

    def fail(scheduled: SchedulerOutput, pending: PendingTokens | None) -> torch.Tensor:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine.runner, "execute", fail)
    for one in crowd():
        engine.add(one, engine.encode(one))
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.step()
    done = Run()
    done.take(engine.abort_all("error", None))
    engine.check_integrity()
    assert engine.stats().kv_host_usage == 0
    monkeypatch.setattr(engine.runner, "execute", execute)
    assert run(engine, *crowd()).story == run(build_engine(), *crowd()).story


def test_a_running_sequence_s_host_blocks_may_leave_without_harm(build_engine: MakeEngine, overlap_steps: bool) -> None:
    engine = tight(build_engine, 3, overlap_steps=overlap_steps)
    assert run(engine, *crowd()).story == run(build_engine(), *crowd()).story
    stats = engine.stats()
    assert stats.kv_host_saved > 3
    assert stats.kv_host_usage == 1
