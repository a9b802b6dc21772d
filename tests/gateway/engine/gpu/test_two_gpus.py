"""Two GPUs give the tokens of one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from adapters_store.blobs import BlobStore
from benchmarks.engine import write_adapter
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.errors import InternalError
from tests.gateway.engine.gpu.serving import (
    NUM_ADAPTERS,
    TAKING_TURNS,
    Adapted,
    assert_alike,
    assert_as_near,
    drain,
    engine_of_kinds,
    engine_with,
    generate,
    ids,
    random_prompts,
    serve,
    small_config,
    two_gpus,
)
from tests.gateway.engine.test_kinds import World

pytestmark = [pytest.mark.gpu, two_gpus]


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_two_gpus_give_one_gpu_s_tokens(adapted: Adapted, enforce_eager: bool) -> None:
    base, blobs, refs = adapted
    (truth, one), (fp32, two) = (
        [
            generate(
                engine_with(
                    blobs, base, device="cuda", dtype=d, tensor_parallel_size=size, enforce_eager=enforce_eager
                ),
                refs,
                32,
            )
            for d in ("float32", "bfloat16")
        ]
        for size in (1, 2)
    )
    assert ids(fp32) == ids(truth)
    assert_as_near(two, one, truth)


def test_a_worker_that_is_killed_ends_the_engine_though_the_device_waits_for_it(tmp_path: Path) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    engine = engine_with(blobs, "embedded", device="cuda", quantization="none", tensor_parallel_size=2)
    params = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
    engine.add(GenerateRequest("r", params, prompt=[5, 6, 7]), [5, 6, 7])
    for _ in range(20):
        engine.step()
    assert engine._workers is not None
    os.kill(engine._workers._processes[0].pid or 0, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(InternalError, match="Rank 1 of the engine has ended"):
        drain(engine)
    engine.abort_all("error", None)
    engine.check_integrity()
    engine.close()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("overlap_steps", [False, True])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_two_gpus_swap_adapters_and_blocks_and_give_one_gpu_s_tokens(
    tmp_path: Path, four_layers: str, overlap_steps: bool, enforce_eager: bool
) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")

    def engine_of(size: int, tokens: int, slots: int) -> LLMEngine:
        config = small_config(
            base=four_layers, device="cuda", dtype="float32", tensor_parallel_size=size, kv_cache_tokens=tokens,
            kv_host_bytes=1 << 30, num_adapter_slots=slots, host_cache_bytes=256 << 20, max_num_seqs=16,
            max_lora_rank=16, overlap_steps=overlap_steps, enforce_eager=enforce_eager, lend_adapter_pages=False,
        )  # fmt: skip
        return LLMEngine(config, blobs, lambda: None)

    prompts = random_prompts(12, 250)
    one = engine_of(1, 16_384, 12)
    refs = [write_adapter(blobs, tmp_path, one.model.spec, 16, i) for i in range(12)]
    wanted = serve(one, prompts, 64, refs)
    one.close()
    two = engine_of(2, 960, 4)
    got, again = serve(two, prompts, 64, refs), serve(two, prompts, 64, refs)
    stats = two.stats()
    two.close()
    assert stats.adapter_evictions > 0
    assert stats.kv_host_saved > 0
    assert stats.kv_host_loaded > 0  # prefixes of the first turn
    assert_alike(got, wanted)
    assert_alike(again, wanted)


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_two_gpus_guess_ahead_as_one_does(tmp_path: Path, enforce_eager: bool) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    settings = {"device": "cuda", "quantization": "none", "dtype": "float32", "enforce_eager": enforce_eager}
    one = engine_with(blobs, "embedded", **settings)
    refs = [write_adapter(blobs, tmp_path, one.model.spec, 8, i) for i in range(6)]
    wanted = generate(one, refs, 48, **TAKING_TURNS)
    two = engine_with(blobs, "embedded", tensor_parallel_size=2, **settings)
    assert ids(generate(two, refs, 48, guessed=4, **TAKING_TURNS)) == ids(wanted)
    assert 20 < two.stats().num_accepted < two.stats().num_drafts


def test_two_gpus_take_adapters_in_8_bits_as_two_cpu_ranks_do(tmp_path: Path) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    settings = {"quantization": "none", "dtype": "float32", "adapter_dtype": "int8", "tensor_parallel_size": 2}
    on_cpu = engine_with(blobs, "embedded", device="cpu", **settings)
    refs = [write_adapter(blobs, tmp_path, on_cpu.model.spec, 8, i) for i in range(NUM_ADAPTERS)]
    wanted = generate(on_cpu, refs, 48)
    on_gpus = engine_with(blobs, "embedded", device="cuda", num_adapter_slots=6, **settings)
    assert ids(generate(on_gpus, refs, 48)) == ids(wanted)


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_two_gpus_serve_every_kind_as_one_does(kinds: World, enforce_eager: bool) -> None:
    refs = list(kinds.refs.values())
    settings = {"num_adapter_slots": 6, "enforce_eager": enforce_eager}
    one, two = (generate(engine_of_kinds(kinds, tensor_parallel_size=n, **settings), refs, 48) for n in (1, 2))
    assert ids(two) == ids(one)
