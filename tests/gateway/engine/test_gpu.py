"""The engine through the Triton kernels on a GPU, against the plain-PyTorch path."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.blobs import BlobStore
from benchmarks.engine import write_adapter, write_base
from benchmarks.kv_cache import fp8_error
from gateway.config import EngineConfig
from gateway.engine.host_blocks import BlockCopy
from gateway.engine.host_tier import HostTier
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef, GenerateRequest, TokenLogprob
from gateway.engine.sampling_params import SamplingParams
from gateway.errors import InternalError
from gateway.layers import attention as attention_layer
from gateway.layers import bottleneck as bottleneck_layer
from gateway.layers import forward_batch
from gateway.layers import linear as linear_layer
from gateway.layers import mlp as mlp_layer
from gateway.layers import norm as norm_layer
from gateway.models.loader import load_model
from lora_kernels import activation, attention, nf4, nf4_lora, norm, rotary, sgmv, vectors
from tests.gateway.engine.test_kinds import World
from tests.tiny import save_bottleneck, save_loretta_bottleneck, store_adapter, uploaded_virtual_tokens

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
NUM_ADAPTERS = 16
Adapted = tuple[str, BlobStore, list[AdapterRef]]
# Three tokens, each penalized more with every time that it comes: many guesses come true, and many do not.
TAKING_TURNS: dict[str, Any] = {"logit_bias": {60: 90.0, 61: 90.0, 62: 90.0}, "frequency_penalty": 2.0}


def generate(
    engine: LLMEngine, refs: list[AdapterRef], count: int, guessed: int = 0, **sampling: Any
) -> dict[str, list[TokenLogprob]]:
    """Greedy tokens of adapters and a base row in one batch, each with the 20 likeliest; every other row guesses."""
    params = SamplingParams(**{"temperature": 0, "max_tokens": count, "ignore_eos": True, "logprobs": 20} | sampling)
    for i, ref in enumerate([*refs, None]):
        params = replace(params, num_speculative_tokens=guessed if i % 2 == 0 else 0)
        prompt = list(range(20 + i, 52 + 3 * i))
        engine.add(GenerateRequest(str(i), params, prompt=prompt, adapter=ref), prompt)
    tokens = drain(engine)
    engine.check_integrity()
    engine.close()
    return tokens


def drain(engine: LLMEngine) -> dict[str, list[TokenLogprob]]:
    tokens: dict[str, list[TokenLogprob]] = {}
    while engine.has_work:
        output = engine.step()
        for delta in output.deltas:
            tokens.setdefault(delta.request_id, []).extend(delta.logprobs)
        if output.num_tokens == 0:
            time.sleep(engine.poll_interval)  # threads that load adapters need Python's lock
    return tokens


def assert_as_near(
    ours: dict[str, list[TokenLogprob]], other: dict[str, list[TokenLogprob]], truth: dict[str, list[TokenLogprob]]
) -> None:
    """Near-ties of random weights break either way: ours may be as far from the truth as the other way is."""
    own, allowed = drift(ours, truth), drift(other, truth)
    print(f"log-probabilities within {own[0]:.4f} over {own[1]} positions; the other way {allowed}")
    assert own[0] <= 2 * allowed[0]
    assert own[1] >= allowed[1] / 2


@contextmanager
def no_waiting() -> Iterator[None]:
    """The host may not wait for the device, but where it asks for a step's tokens."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def engine_with(blobs: BlobStore, base: str, **settings: Any) -> LLMEngine:
    config = EngineConfig(base=base, kv_cache_tokens=16_384, max_num_seqs=24, max_lora_rank=16, **settings)
    return LLMEngine(config, blobs, lambda: None)


def serve(
    engine: LLMEngine, prompts: list[list[int]], max_tokens: int, refs: Seq[AdapterRef | None] = (None,)
) -> dict[str, list[int]]:
    """Greedy tokens of the adapters, or the bare base, in turn."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add(GenerateRequest(str(i), params, prompt=prompt, adapter=refs[i % len(refs)]), prompt)
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    engine.check_integrity()
    return tokens


def random_prompts(count: int, length: int) -> list[list[int]]:
    return torch.randint(3, 300, (count, length)).tolist()


def use_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every kernel call of the layers to its plain-PyTorch twin, on the same device."""
    monkeypatch.setattr(linear_layer, "nf4_matmul", nf4.nf4_matmul_ref)
    monkeypatch.setattr(linear_layer, "nf4_lora_matmul", nf4_lora.nf4_lora_matmul_ref)
    monkeypatch.setattr(linear_layer, "sgmv_shrink", sgmv.sgmv_shrink_ref)
    monkeypatch.setattr(linear_layer, "sgmv_expand", sgmv.sgmv_expand_ref)
    monkeypatch.setattr(bottleneck_layer, "sgmv_shrink", sgmv.sgmv_shrink_ref)
    monkeypatch.setattr(bottleneck_layer, "sgmv_expand", sgmv.sgmv_expand_ref)
    monkeypatch.setattr(attention_layer, "rotary_store", rotary.rotary_store_ref)
    monkeypatch.setattr(norm_layer, "rms_norm", norm.rms_norm_ref)
    monkeypatch.setattr(mlp_layer, "silu_mul", activation.silu_mul_ref)
    monkeypatch.setattr(attention_layer, "paged_attention", attention.paged_attention_ref)
    monkeypatch.setattr(forward_batch, "apply_vectors", vectors.apply_vectors_ref)


def ids(rows: dict[str, list[TokenLogprob]]) -> dict[str, list[int]]:
    return {key: [token.token_id for token in row] for key, row in rows.items()}


def drift(a: dict[str, list[TokenLogprob]], b: dict[str, list[TokenLogprob]]) -> tuple[float, int]:
    """The largest difference of a token's log-probability while the rows agree, and over how many positions."""
    worst, positions = 0.0, 0
    for key, row in a.items():
        for x, y in zip(row, b[key], strict=True):
            other = {token_id: logprob for token_id, _, logprob in y.top}
            worst = max([worst, *(abs(p - other[token_id]) for token_id, _, p in x.top if token_id in other)])
            positions += 1
            if x.token_id != y.token_id:
                break
    return worst, positions


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return str(write_base(tmp_path_factory.mktemp("base"), layers=4))


@pytest.fixture(scope="module")
def adapted(four_layers: str, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """A base of four layers of Llama-3.1-8B's shape, and adapters of it."""
    folder = tmp_path_factory.mktemp("adapted")
    blobs = BlobStore(f"file://{folder / 'blobs'}")
    spec = load_model(EngineConfig(base=four_layers, device="cuda")).spec
    return four_layers, blobs, [write_adapter(blobs, folder, spec, 16, i) for i in range(NUM_ADAPTERS)]


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


VIRTUAL = [("PROMPT_TUNING", 5), ("P_TUNING", 21), ("PREFIX_TUNING", 7), ("PREFIX_TUNING", 32)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"overlap_steps": False},
        {"enforce_eager": True, "max_num_batched_tokens": 24},
        {"num_adapter_slots": 3},
        {"kv_host_bytes": 1 << 30, "num_adapter_slots": 6},
        pytest.param({"tensor_parallel_size": 2}, marks=two_gpus),
    ],
)
def test_virtual_tokens_beside_adapters_give_the_cpu_path_s_tokens(tmp_path: Path, settings: dict[str, Any]) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    quantization = {"quantization": "none"} if "tensor_parallel_size" in settings else {}
    on_cpu = engine_with(blobs, "embedded", device="cpu", **quantization)
    spec = on_cpu.model.spec
    refs = [uploaded_virtual_tokens(spec, tmp_path, blobs, *kind, seed=i) for i, kind in enumerate(VIRTUAL)]
    refs += [write_adapter(blobs, tmp_path, spec, 8, i) for i in range(3)]
    wanted = generate(on_cpu, refs, 48)
    on_gpu = engine_with(blobs, "embedded", device="cuda", dtype="float32", **quantization, **settings)
    assert ids(generate(on_gpu, refs, 48)) == ids(wanted)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_the_host_waits_for_no_prefix_and_its_blocks_hold_it(tmp_path: Path, kv_cache_dtype: Any) -> None:
    """Prompts of one token: a step that writes prefixes is a decode step, from a graph."""
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    engine = engine_with(blobs, "embedded", device="cuda", dtype="float32", kv_cache_dtype=kv_cache_dtype)
    refs = [uploaded_virtual_tokens(engine.model.spec, tmp_path, blobs, "PREFIX_TUNING", 21, seed=i) for i in range(3)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for turn in range(2):  # the first loads the adapters, and whatever is set up at first use
        for i, ref in enumerate(refs):
            engine.add(GenerateRequest(f"{turn}-{i}", params, prompt=[40 + turn], adapter=ref), [40 + turn])
        if turn == 0:
            drain(engine)
    with no_waiting():
        while len(engine.scheduler.running) < len(refs):
            engine.step()
        engine.step()
    for sequence in engine.scheduler.running:
        held = engine.runner.slots.virtual_tokens(sequence.slot)
        assert held is not None
        assert held.is_pinned()
        for index, layer in enumerate(engine.runner.cache.layers):
            slots = [sequence.block_table[p // 16] * 16 + p % 16 for p in range(21)]
            pages = layer.tokens(torch.tensor(slots, device="cuda"), torch.float32)
            for part, rows in zip(pages, held[:, 2 * index : 2 * index + 2].unbind(1), strict=True):
                bound = 0.08 if kv_cache_dtype == "fp8" else 0.0
                torch.testing.assert_close(part.flatten(1).cpu(), rows, rtol=bound, atol=bound / 4)
    drain(engine)
    engine.check_integrity()
    engine.close()


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


@two_gpus
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


@two_gpus
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


@two_gpus
@pytest.mark.parametrize("overlap_steps", [False, True])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_two_gpus_swap_adapters_and_blocks_and_give_one_gpu_s_tokens(
    tmp_path: Path, four_layers: str, overlap_steps: bool, enforce_eager: bool
) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")

    def engine_of(size: int, tokens: int, slots: int) -> LLMEngine:
        config = EngineConfig(
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
    assert got == again == wanted


@two_gpus
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


@two_gpus
def test_two_gpus_take_adapters_in_8_bits_as_two_cpu_ranks_do(tmp_path: Path) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    settings = {"quantization": "none", "dtype": "float32", "adapter_dtype": "int8", "tensor_parallel_size": 2}
    on_cpu = engine_with(blobs, "embedded", device="cpu", **settings)
    refs = [write_adapter(blobs, tmp_path, on_cpu.model.spec, 8, i) for i in range(NUM_ADAPTERS)]
    wanted = generate(on_cpu, refs, 48)
    on_gpus = engine_with(blobs, "embedded", device="cuda", num_adapter_slots=6, **settings)
    assert ids(generate(on_gpus, refs, 48)) == ids(wanted)


@pytest.mark.parametrize("overlap_steps", [False, True])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_preempting_by_the_second_tier_changes_no_token_and_makes_the_host_wait_for_no_copy(
    tmp_path: Path, four_layers: str, monkeypatch: pytest.MonkeyPatch, overlap_steps: bool, enforce_eager: bool
) -> None:
    def engine_of(tokens: int, host_bytes: int) -> LLMEngine:
        config = EngineConfig(
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
    assert got == again == wanted
    for engine in (ample, tight):
        engine.close()


@pytest.mark.parametrize("overlap_steps", [False, True])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_pages_that_move_between_adapters_and_the_cache_change_no_token(
    tmp_path: Path, four_layers: str, overlap_steps: bool, enforce_eager: bool
) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")

    def engine_of(tokens: int, pages: int, *, lends: bool) -> LLMEngine:
        config = EngineConfig(
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
        assert serve(lending, prompts, 80, turn) == serve(ample, prompts, 80, turn)
        assert (lending.stats().lent_pages > 0) or turn is refs
    assert lending.stats().adapter_evictions > 0
    for engine in (ample, lending):
        engine.close()


def test_a_decode_step_that_saves_blocks_waits_for_nothing_but_the_step_before(
    tmp_path: Path, four_layers: str
) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    config = EngineConfig(
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


def test_batch_invariant_mode_gives_a_request_s_bits_alone_and_in_any_batch(tmp_path: Path, four_layers: str) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=5)

    def engine_of(**settings: Any) -> LLMEngine:
        chosen: dict[str, Any] = {"kv_cache_tokens": 65_536, "kv_host_bytes": 0, "num_adapter_slots": 24} | settings
        config = EngineConfig(
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


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An adapter of every kind, on a base whose q, k and v have biases."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    return World(tmp_path_factory.mktemp("kinds"), "qwen2", **shape)


def engine_of_kinds(kinds: World, **settings: Any) -> LLMEngine:
    defaults = {"device": "cuda", "dtype": "float32", "max_lora_rank": 256, "num_adapter_slots": 16}
    defaults |= {"num_bottleneck_pages": 40}
    config = EngineConfig(base=str(kinds.base), kv_cache_tokens=8192, max_num_seqs=24, **defaults | settings)
    return LLMEngine(config, kinds.blobs, lambda: None)


@pytest.mark.parametrize("overlap_steps", [False, True])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_every_kind_in_one_batch_gives_the_cpu_path_s_tokens(
    kinds: World, overlap_steps: bool, enforce_eager: bool
) -> None:
    refs = list(kinds.refs.values())
    wanted = generate(engine_of_kinds(kinds, device="cpu"), refs, 48)
    settings = {"overlap_steps": overlap_steps, "enforce_eager": enforce_eager}
    assert ids(generate(engine_of_kinds(kinds, **settings), refs, 48)) == ids(wanted)
    taking_turns = engine_of_kinds(kinds, num_adapter_slots=5, num_vector_slots=2, **settings)
    assert ids(generate(taking_turns, refs, 48)) == ids(wanted)


def test_every_kind_in_bf16_is_as_exact_as_the_reference_path(kinds: World, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = list(kinds.refs.values())
    truth = generate(engine_of_kinds(kinds, device="cpu"), refs, 32)
    ours = generate(engine_of_kinds(kinds, dtype="bfloat16"), refs, 32)
    use_references(monkeypatch)
    plain = generate(engine_of_kinds(kinds, dtype="bfloat16", enforce_eager=True), refs, 32)
    assert_as_near(ours, plain, truth)


def test_the_host_waits_neither_where_magnitudes_are_resolved_nor_in_steps_with_vectors(kinds: World) -> None:
    engine = engine_of_kinds(kinds)
    params = SamplingParams(temperature=0, max_tokens=180, ignore_eos=True)
    for name in ("dora", "ia3", "beft", "ln_tuning", "lora"):
        prompt = list(range(20, 52))
        engine.add(GenerateRequest(name, params, prompt=prompt, adapter=kinds.refs[name]), prompt)
    while engine.step().num_tokens != 5:
        pass
    other = kinds.refs["dora and own biases"]
    while (slot := engine.residency.acquire(other)) is None:
        engine.step()
    engine.step()
    assert engine.runner.raw_vectors is not None
    with no_waiting():
        engine.runner.raw_vectors.resolve(slot)
        drain(engine)
    engine.residency.release(other.digest)
    engine.check_integrity()
    engine.close()


def test_kinds_in_a_batch_leave_a_request_s_bits_under_batch_invariance(kinds: World) -> None:
    names = ["dora", "ia3", "ln_tuning", "lora and all biases"]
    together = generate(engine_of_kinds(kinds, batch_invariant=True), [kinds.refs[name] for name in names], 32)
    for i, name in enumerate(names):
        engine = engine_of_kinds(kinds, batch_invariant=True)
        params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=20)
        prompt = list(range(20 + i, 52 + 3 * i))
        engine.add(GenerateRequest(str(i), params, prompt=prompt, adapter=kinds.refs[name]), prompt)
        assert drain(engine)[str(i)] == together[str(i)]
        engine.close()


@pytest.fixture(scope="module")
def bottlenecks(kinds: World, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    """Bottleneck adapters of each activation, of each thing to read and at each site, of one page and of several."""
    root = tmp_path_factory.mktemp("bottlenecks")
    configs: list[tuple[int, dict[str, Any]]] = [
        (16, {"non_linearity": "relu", "original_ln_before": True}),
        (70, {"non_linearity": "swish"}),
        (5, {"non_linearity": "tanh", "is_parallel": True, "scaling": 4.0}),
        (40, {"non_linearity": "gelu", "original_ln_before": True}),
        (33, {"non_linearity": "swish", "scaling": 0.5}),
        (8, {"non_linearity": "linear"}),
    ]
    folders = [save_bottleneck(root / str(i), 256, 2, size, i, **config) for i, (size, config) in enumerate(configs)]
    for i, targets in enumerate((["gate_proj", "up_proj", "down_proj"], ["up_proj"])):
        modules = [f"{layer}.mlp.{target}" for layer in (0, 1) for target in targets]
        folders.append(save_loretta_bottleneck(root / f"loretta{i}", 256, targets, modules, 20, i))
    return [store_adapter(kinds.base, folder, kinds.blobs, f"t/b{i}:1") for i, folder in enumerate(folders)]


@pytest.mark.parametrize("overlap_steps", [False, True])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_bottlenecks_among_other_kinds_give_the_cpu_path_s_tokens(
    kinds: World, bottlenecks: list[AdapterRef], overlap_steps: bool, enforce_eager: bool
) -> None:
    refs = [*bottlenecks, *(kinds.refs[name] for name in ("lora", "dora", "ia3"))]
    wanted = generate(engine_of_kinds(kinds, device="cpu"), refs, 48)
    settings = {"overlap_steps": overlap_steps, "enforce_eager": enforce_eager}
    assert ids(generate(engine_of_kinds(kinds, **settings), refs, 48)) == ids(wanted)
    taking_turns = engine_of_kinds(kinds, num_adapter_slots=5, num_bottleneck_pages=10, **settings)
    assert ids(generate(taking_turns, refs, 48)) == ids(wanted)


def test_bottlenecks_in_bf16_are_as_exact_as_the_reference_path(
    kinds: World, bottlenecks: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = generate(engine_of_kinds(kinds, device="cpu"), bottlenecks, 32)
    ours = generate(engine_of_kinds(kinds, dtype="bfloat16"), bottlenecks, 32)
    use_references(monkeypatch)
    plain = generate(engine_of_kinds(kinds, dtype="bfloat16", enforce_eager=True), bottlenecks, 32)
    assert_as_near(ours, plain, truth)


@two_gpus
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_two_gpus_serve_every_kind_as_one_does(kinds: World, enforce_eager: bool) -> None:
    refs = list(kinds.refs.values())
    settings = {"num_adapter_slots": 6, "enforce_eager": enforce_eager}
    one, two = (generate(engine_of_kinds(kinds, tensor_parallel_size=n, **settings), refs, 48) for n in (1, 2))
    assert ids(two) == ids(one)
