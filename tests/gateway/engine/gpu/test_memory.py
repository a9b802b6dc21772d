"""Adapters, blocks and their tiers on a GPU: what moves changes no token, and the host waits for no copy."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

import pytest
import torch

from adapters_store.blobs import BlobStore
from benchmarks.engine import write_adapter, write_base
from benchmarks.kv_cache import fp8_error
from gateway.config import EngineConfig
from gateway.engine.host_blocks import BlockCopy
from gateway.engine.host_tier import HostTier
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.models.loader import load_model
from tests.gateway.engine.gpu.serving import (
    NUM_ADAPTERS,
    Adapted,
    assert_alike,
    assert_as_near,
    drain,
    drift,
    engine_with,
    generate,
    no_waiting,
    random_prompts,
    serve,
    small_config,
    use_references,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_fp8_pages_give_what_the_cpu_path_gives_from_fp8_pages(tmp_path: Path, enforce_eager: bool) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    on_cpu = engine_with(blobs, "embedded", device="cpu", kv_cache_dtype="fp8")
    refs = [write_adapter(blobs, tmp_path, on_cpu.model.spec, 8, i) for i in range(NUM_ADAPTERS)]
    wanted = generate(on_cpu, refs, 48)
    exact = generate(engine_with(blobs, "embedded", device="cpu"), refs, 48)
    settings = {"dtype": "float32", "kv_cache_dtype": "fp8", "enforce_eager": enforce_eager}
    got = generate(engine_with(blobs, "embedded", device="cuda", **settings), refs, 48)
    # Sums in another order turn some number of fp8 into its neighbour: other bits, but nearer than fp8 itself is.
    ours, fp8 = drift(got, wanted), drift(wanted, exact)
    print(f"fp8: log-probabilities within {ours[0]:.4f} over {ours[1]} positions; of fp8 itself {fp8}")
    assert ours[0] < fp8[0]
    assert ours[1] > fp8[1]


def test_adapters_come_in_while_steps_run_and_the_host_never_waits(tmp_path: Path) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    engine = engine_with(blobs, "embedded", device="cuda", num_adapter_slots=6, host_cache_bytes=64 << 20)
    refs = [write_adapter(blobs, tmp_path, engine.model.spec, 8, i) for i in range(NUM_ADAPTERS)]
    running, coming = refs[:4], refs[4:]
    for ref in coming[::2]:  # the others come from the disk
        engine.host_cache.get(ref.digest).result()
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    for i in range(8):
        prompt = list(range(20 + i, 52 + 3 * i))
        engine.add(GenerateRequest(str(i), params, prompt=prompt, adapter=running[i // 2]), prompt)
    while engine.step().num_tokens != 8:
        pass
    engine.step()
    with no_waiting():
        while engine.has_work:
            if coming:
                engine.residency.prefetch(coming[:1])
            engine.step()
            if coming and coming[0].name in engine.residency.stats.resident:
                coming.pop(0)
    assert not coming
    assert engine.stats().adapter_evictions == NUM_ADAPTERS - 6
    engine.check_integrity()
    engine.close()


def siblings(engine: LLMEngine, length: int, *, may_wait: bool = True) -> list[list[int]]:
    """Greedy tokens of four sequences of one prompt. may_wait: whether the host may, once the prompt is computed."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, n=4)
    prompt = list(range(30, 30 + length))
    engine.add(GenerateRequest(str(length), params, prompt=prompt), prompt)
    tokens: list[list[int]] = [[] for _ in range(4)]
    try:
        while engine.has_work:
            for delta in engine.step().deltas:
                tokens[delta.index] += delta.token_ids
            if not may_wait:
                torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.check_integrity()
    return tokens


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_siblings_share_the_prompt_and_copy_its_last_block(
    tmp_path: Path, enforce_eager: bool, enable_prefix_caching: bool
) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    on_cpu, engine = (
        engine_with(blobs, "embedded", dtype="float32", enable_prefix_caching=enable_prefix_caching, **settings)
        for settings in ({"device": "cpu"}, {"device": "cuda", "enforce_eager": enforce_eager})
    )
    siblings(engine, 40)
    for length in (53, 64, 65):  # within a block of 16, at its end and behind it
        assert siblings(engine, length, may_wait=enforce_eager) == siblings(on_cpu, length)
    engine.close()
    on_cpu.close()


@pytest.mark.parametrize("overlap_steps", [False, True])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_preempting_by_the_second_tier_changes_no_token_and_makes_the_host_wait_for_no_copy(
    tmp_path: Path, four_layers: str, monkeypatch: pytest.MonkeyPatch, overlap_steps: bool, enforce_eager: bool
) -> None:
    def engine_of(tokens: int, host_bytes: int) -> LLMEngine:
        config = small_config(
            base=four_layers, device="cuda", dtype="float32", kv_cache_tokens=tokens, kv_host_bytes=host_bytes,
            max_num_seqs=16, max_lora_rank=16, overlap_steps=overlap_steps, enforce_eager=enforce_eager,
            lend_adapter_pages=False,
        )  # fmt: skip
        return LLMEngine(config, BlobStore(f"file://{tmp_path / 'blobs'}"), lambda: None)

    prompts = random_prompts(12, 250)
    ample, tight = engine_of(16_384, 0), engine_of(2560, 1 << 30)
    # Its buffers hold 8 blocks of 512 KiB, so that steps move theirs in parts.
    num_host_blocks = tight.blocks.host.num_blocks
    layers = [layer.tensors for layer in tight.runner.cache.layers]
    tier = tight.runner.host_tier = HostTier(layers, num_host_blocks, staging_bytes=8 << 19)
    move = tier.move

    def move_without_waiting(saves: Seq[BlockCopy], loads: Seq[BlockCopy]) -> None:
        with no_waiting():
            move(saves, loads)

    monkeypatch.setattr(tier, "move", move_without_waiting)
    wanted, got = serve(ample, prompts, 80), serve(tight, prompts, 80)
    again = serve(tight, prompts, 80)
    stats = tight.stats()
    assert stats.num_preemptions > 0
    assert stats.kv_host_saved > 0
    assert stats.kv_host_loaded > 0
    assert_alike(got, wanted)
    assert_alike(again, wanted)
    for engine in (ample, tight):
        engine.close()


@pytest.mark.parametrize("overlap_steps", [False, True])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_pages_that_move_between_adapters_and_the_cache_change_no_token(
    tmp_path: Path, four_layers: str, overlap_steps: bool, enforce_eager: bool
) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")

    def engine_of(tokens: int, pages: int, *, lends: bool) -> LLMEngine:
        config = small_config(
            base=four_layers, device="cuda", dtype="float32", kv_cache_tokens=tokens, kv_host_bytes=1 << 28,
            max_num_seqs=16, max_lora_rank=16, num_adapter_slots=8, num_adapter_pages=pages, lend_adapter_pages=lends,
            overlap_steps=overlap_steps, enforce_eager=enforce_eager,
        )  # fmt: skip
        return LLMEngine(config, blobs, lambda: None)

    ample, lending = engine_of(32_768, 8, lends=False), engine_of(1024, 4, lends=True)
    refs = [write_adapter(blobs, tmp_path, ample.model.spec, 16, i) for i in range(6)]
    served: list[Seq[AdapterRef | None]] = [(None,), refs, (None, *refs), (None, None, None, refs[0]), refs]
    for turn in served:
        prompts = random_prompts(24, 300)
        assert_alike(serve(lending, prompts, 80, turn), serve(ample, prompts, 80, turn))
        assert (lending.stats().lent_pages > 0) or turn is refs
    assert lending.stats().adapter_evictions > 0
    for engine in (ample, lending):
        engine.close()


def test_a_decode_step_that_saves_blocks_waits_for_nothing_but_the_step_before(
    tmp_path: Path, four_layers: str
) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    config = small_config(
        base=four_layers, device="cuda", kv_cache_tokens=2048, kv_host_bytes=1 << 30, max_num_seqs=16, max_lora_rank=16,
        lend_adapter_pages=False,
    )  # fmt: skip
    engine = LLMEngine(config, blobs, lambda: None)
    serve(engine, random_prompts(16, 200), 2)  # from here on each block that is taken holds a prefix
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    for i, prompt in enumerate(random_prompts(8, 100)):
        engine.add(GenerateRequest(str(i), params, prompt=prompt), prompt)
    while engine.step().num_tokens != 8:
        pass
    engine.step()
    saved = engine.stats().kv_host_saved
    with no_waiting():
        drain(engine)
    assert engine.stats().kv_host_saved > saved
    engine.check_integrity()
    engine.close()


def test_an_8b_shaped_base_over_fp8_pages_is_as_exact_as_the_reference_path(
    adapted: Adapted, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, blobs, refs = adapted
    settings = {"device": "cuda", "kv_cache_dtype": "fp8"}
    bf16 = generate(engine_with(blobs, base, dtype="bfloat16", **settings), refs, 32)
    use_references(monkeypatch)
    truth, plain = (
        generate(engine_with(blobs, base, dtype=dtype, enforce_eager=True, **settings), refs, 32)
        for dtype in ("float32", "bfloat16")
    )
    assert_as_near(bf16, plain, truth)


def test_fp8_pages_of_an_8b_shaped_base_stay_near_bf16(tmp_path: Path) -> None:
    """The row of docs/engine.md: run it with -s."""
    torch.manual_seed(0)
    model = load_model(EngineConfig(base=str(write_base(tmp_path / "base", layers=32)), device="cuda"))
    ids = torch.randint(10, 100_000, (8, 2048)).tolist()
    error = fp8_error(model, [(row[:1], row[1:]) for row in ids])
    print(f"8B shape, random weights, 8 x 2,048 random tokens: {error}")
    assert error.attention < 0.05
