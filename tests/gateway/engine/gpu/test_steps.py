"""The engine through the Triton kernels on a GPU, against the plain-PyTorch path."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.blobs import BlobStore
from benchmarks.engine import write_adapter
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef, GenerateRequest, TokenLogprob
from gateway.engine.sampling_params import SamplingParams
from tests.gateway.engine.gpu.serving import (
    NUM_ADAPTERS,
    TAKING_TURNS,
    Adapted,
    assert_as_near,
    drain,
    engine_with,
    generate,
    ids,
    no_waiting,
    random_prompts,
    small_config,
    two_gpus,
    use_references,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("overlap_steps", [False, True])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_the_embedded_base_gives_the_cpu_path_s_tokens(
    tmp_path: Path, overlap_steps: bool, enforce_eager: bool
) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    on_cpu = engine_with(blobs, "embedded", device="cpu")
    refs = [write_adapter(blobs, tmp_path, on_cpu.model.spec, 8, i) for i in range(NUM_ADAPTERS)]
    wanted = generate(on_cpu, refs, 48)
    settings = {"dtype": "float32", "overlap_steps": overlap_steps, "enforce_eager": enforce_eager}
    got = generate(engine_with(blobs, "embedded", device="cuda", **settings), refs, 48)
    assert ids(got) == ids(wanted)


@pytest.mark.parametrize("overlap_steps", [False, True])
@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("sampling", [TAKING_TURNS, TAKING_TURNS | {"temperature": 0.7, "seed": 5}])
def test_guessing_ahead_gives_the_cpu_path_s_tokens(
    tmp_path: Path, overlap_steps: bool, enforce_eager: bool, sampling: dict[str, Any]
) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    on_cpu = engine_with(blobs, "embedded", device="cpu")
    refs = [write_adapter(blobs, tmp_path, on_cpu.model.spec, 8, i) for i in range(6)]
    wanted = generate(on_cpu, refs, 48, **sampling)
    settings = {"dtype": "float32", "overlap_steps": overlap_steps, "enforce_eager": enforce_eager}
    engine = engine_with(blobs, "embedded", device="cuda", **settings)
    assert ids(generate(engine, refs, 48, guessed=4, **sampling)) == ids(wanted)
    assert 20 < engine.stats().num_accepted < engine.stats().num_drafts


@pytest.mark.parametrize(
    ("settings", "guessed"),
    [
        ({}, 0),
        ({"kv_cache_dtype": "fp8"}, 0),
        ({}, 3),
        # In NF4 two ranks would cut the embedded base's blocks of 64.
        pytest.param({"tensor_parallel_size": 2, "quantization": "none"}, 0, marks=two_gpus),
        pytest.param({"tensor_parallel_size": 2, "quantization": "none", "kv_cache_dtype": "fp8"}, 3, marks=two_gpus),
    ],
)
def test_the_host_never_waits_in_a_decode_step_but_for_the_step_before(
    tmp_path: Path, settings: dict[str, Any], guessed: int
) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    engine = engine_with(blobs, "embedded", device="cuda", **settings)
    refs = [write_adapter(blobs, tmp_path, engine.model.spec, 8, i) for i in range(4)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 5},
        {"top_p": 0.9, "top_k": 50, "min_p": 0.01},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "min_tokens": 90, "logit_bias": {7: 1.0}},
    ]
    guesses = TAKING_TURNS | {"num_speculative_tokens": guessed} if guessed else {}
    for i in range(16):
        # Rows end one by one, so that batches change on the way.
        params = SamplingParams(**kinds[i % 4] | guesses, max_tokens=100 + i, ignore_eos=True)
        prompt = list(range(20 + i, 52 + 3 * i))
        engine.add(GenerateRequest(str(i), params, prompt=prompt, adapter=refs[i // 4]), prompt)
    while engine.scheduler.waiting or any(sequence.num_uncomputed > 1 for sequence in engine.scheduler.running):
        engine.step()
    engine.step()
    with no_waiting():
        drain(engine)
    assert (engine.stats().num_accepted > 100) == bool(guessed)
    engine.check_integrity()
    engine.close()


def test_an_engine_without_adapter_slots_records_its_graphs_and_gives_the_cpu_path_s_tokens(tmp_path: Path) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    settings: dict[str, Any] = {"num_adapter_slots": 0, "dtype": "float32"}
    wanted = generate(engine_with(blobs, "embedded", device="cpu", **settings), [], 48)
    assert ids(generate(engine_with(blobs, "embedded", device="cuda", **settings), [], 48)) == ids(wanted)


@pytest.mark.parametrize("overlap_steps", [False, True])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_adapters_in_8_bits_give_the_cpu_path_s_tokens(
    tmp_path: Path, overlap_steps: bool, enforce_eager: bool
) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    on_cpu = engine_with(blobs, "embedded", device="cpu", adapter_dtype="int8")
    refs = [write_adapter(blobs, tmp_path, on_cpu.model.spec, 8, i) for i in range(NUM_ADAPTERS)]
    wanted = generate(on_cpu, refs, 48)
    settings = {"dtype": "float32", "overlap_steps": overlap_steps, "enforce_eager": enforce_eager}
    # Fewer slots than adapters: they take turns, and come in while others run.
    on_gpu = engine_with(blobs, "embedded", device="cuda", adapter_dtype="int8", num_adapter_slots=6, **settings)
    assert ids(generate(on_gpu, refs, 48)) == ids(wanted)


def refuse_kernels_one_by_one(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> LLMEngine:
    """Let every step replay a graph or fail."""

    def forward(*_: Any) -> torch.Tensor:
        raise AssertionError("a step ran without a graph")

    monkeypatch.setattr(engine.runner, "_forward", forward)
    return engine


def come_and_go(engine: LLMEngine, refs: list[AdapterRef]) -> dict[tuple[str, int], list[int]]:
    """Greedy tokens of requests that come while others decode, some with prefixes that these have left, or siblings."""
    tokens: dict[tuple[str, int], list[int]] = {}
    shared = list(range(30, 110))

    def step() -> None:
        output = engine.step()
        for delta in output.deltas:
            tokens.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
        if output.num_tokens == 0:
            time.sleep(engine.poll_interval)

    for i in range(16):
        prompt = [*shared[: 20 * (i % 5)], *range(40 + i, 41 + 2 * i + 60 * (i % 4))]
        params = SamplingParams(temperature=0, max_tokens=20 + i, ignore_eos=True, n=3 if i % 6 == 2 else 1)
        ref = refs[i % 3] if i % 4 else None
        engine.add(GenerateRequest(str(i), params, prompt=prompt, adapter=ref), prompt)
        for _ in range(2 * (i % 4)):
            step()
    while engine.has_work:
        step()
    engine.check_integrity()
    return tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"overlap_steps": False},
        {"overlap_steps": True},
        {"adapter_dtype": "int8"},
        pytest.param({"tensor_parallel_size": 2, "quantization": "none"}, marks=two_gpus),
    ],
    ids=str,
)
@pytest.mark.parametrize("max_num_batched_tokens", [512, 77])
def test_prompts_beside_decode_rows_give_the_same_tokens_from_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], max_num_batched_tokens: int
) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    settings = settings | {"device": "cuda", "dtype": "float32", "max_num_batched_tokens": max_num_batched_tokens}
    eager = engine_with(blobs, "embedded", enforce_eager=True, **settings)
    refs = [write_adapter(blobs, tmp_path, eager.model.spec, rank, i) for i, rank in enumerate((8, 16, 4))]
    wanted = come_and_go(eager, refs)
    eager.close()
    graphs = refuse_kernels_one_by_one(engine_with(blobs, "embedded", **settings), monkeypatch)
    assert come_and_go(graphs, refs) == wanted
    assert come_and_go(graphs, refs) == wanted  # what it computed is in the prefix cache
    graphs.close()


@pytest.mark.parametrize("num_adapters", [0, 2, NUM_ADAPTERS])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_prompts_of_an_8b_shaped_base_are_as_exact_from_graphs_as_without(
    adapted: Adapted, monkeypatch: pytest.MonkeyPatch, kv_cache_dtype: str, num_adapters: int
) -> None:
    base, blobs, refs = adapted
    settings = {"device": "cuda", "kv_cache_dtype": kv_cache_dtype, "max_num_batched_tokens": 200}
    graphs = refuse_kernels_one_by_one(engine_with(blobs, base, dtype="bfloat16", **settings), monkeypatch)
    ours = generate(graphs, refs[:num_adapters], 32)
    plain, truth = (
        generate(engine_with(blobs, base, dtype=dtype, enforce_eager=True, **settings), refs[:num_adapters], 32)
        for dtype in ("bfloat16", "float32")
    )
    assert_as_near(ours, plain, truth)


@pytest.mark.parametrize(
    "settings", [{}, {"batch_invariant": True}, {"kv_cache_dtype": "fp8"}, {"max_num_batched_tokens": 50}], ids=str
)
def test_the_host_never_waits_where_prompts_join_decode_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    engine = engine_with(blobs, "embedded", device="cuda", **settings)
    refs = [write_adapter(blobs, tmp_path, engine.model.spec, 8, i) for i in range(3)]
    come_and_go(engine, refs)  # the adapters are there, and kernels of the sampler compiled
    refuse_kernels_one_by_one(engine, monkeypatch)
    with no_waiting():
        come_and_go(engine, refs)
    engine.close()


def test_an_8b_shaped_base_gives_the_reference_path_s_tokens(adapted: Adapted, monkeypatch: pytest.MonkeyPatch) -> None:
    base, blobs, refs = adapted
    fp32, bf16 = (generate(engine_with(blobs, base, device="cuda", dtype=d), refs, 32) for d in ("float32", "bfloat16"))
    use_references(monkeypatch)
    truth, plain = (
        generate(engine_with(blobs, base, device="cuda", dtype=d, enforce_eager=True), refs, 32)
        for d in ("float32", "bfloat16")
    )
    assert ids(fp32) == ids(truth)
    assert_as_near(bf16, plain, truth)


def test_batch_invariant_mode_gives_a_request_s_bits_alone_and_in_any_batch(tmp_path: Path, four_layers: str) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=5)

    def engine_of(**settings: Any) -> LLMEngine:
        chosen: dict[str, Any] = {"kv_cache_tokens": 65_536, "kv_host_bytes": 0, "num_adapter_slots": 24} | settings
        config = small_config(
            base=four_layers, device="cuda", batch_invariant=True, max_num_seqs=64, max_lora_rank=32,
            lend_adapter_pages=False, **chosen,
        )  # fmt: skip
        return LLMEngine(config, blobs, lambda: None)

    def answers(engine: LLMEngine, asked: Iterable[int]) -> dict[str, list[TokenLogprob]]:
        for i in asked:
            engine.add(GenerateRequest(str(i), params, prompt=prompts[i], adapter=refs[i % len(refs)]), prompts[i])
        told: dict[str, list[TokenLogprob]] = {}
        while engine.has_work:
            for delta in engine.step().deltas:
                told.setdefault(delta.request_id, []).extend(delta.logprobs)
        engine.check_integrity()
        return told

    roomy = engine_of()
    ranks = (16, 32, 8, 20)
    refs = [None, *(write_adapter(blobs, tmp_path, roomy.model.spec, ranks[i % 4], i) for i in range(NUM_ADAPTERS))]
    prompts = [prompt for (prompt,) in (random_prompts(1, 20 + 37 * i % 900) for i in range(49))]
    alone = {key: row for i in range(49) for key, row in answers(roomy, [i]).items()}
    assert answers(roomy, range(49)) == alone  # among 48 others, on what the prefix cache has
    roomy.close()
    cases: list[dict[str, Any]] = [
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 100},
        {"max_num_batched_tokens": 777, "enforce_eager": True, "overlap_steps": False},
        {"kv_cache_tokens": 4096, "enable_prefix_caching": False},
        {"kv_cache_tokens": 4096, "kv_host_bytes": 1 << 30},
        {"adapter_dtype": "int8", "enforce_eager": True},
        {"adapter_dtype": "int8", "max_num_batched_tokens": 100},
    ]
    told = []
    for settings in cases:
        engine = engine_of(**settings)
        told.append(answers(engine, range(48, -1, -1)))
        preempted = engine.stats().num_preemptions > 0
        engine.close()
        assert preempted == (settings.get("kv_cache_tokens") == 4096)
    *whole, int8, int8_in_chunks = told
    assert all(one == alone for one in whole)
    assert int8 == int8_in_chunks


def test_the_host_never_waits_in_a_batch_invariant_decode_step(tmp_path: Path) -> None:
    engine = engine_with(BlobStore(f"file://{tmp_path / 'blobs'}"), "embedded", device="cuda", batch_invariant=True)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=3)
    for i, prompt in enumerate(random_prompts(12, 40)):
        engine.add(GenerateRequest(str(i), params, prompt=prompt), prompt)
    while engine.step().num_tokens != 12:
        pass
    engine.step()
    with no_waiting():
        drain(engine)
    engine.check_integrity()
    engine.close()
