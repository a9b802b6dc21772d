"""Adapters of every kind on a GPU, against the plain-PyTorch path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.blobs import BlobStore
from benchmarks.engine import write_adapter
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from tests.gateway.engine.gpu.serving import (
    assert_as_near,
    drain,
    engine_of_kinds,
    engine_with,
    generate,
    ids,
    no_waiting,
    two_gpus,
    use_references,
)
from tests.gateway.engine.test_kinds import World
from tests.tiny import save_bottleneck, save_loretta_bottleneck, store_adapter, uploaded_virtual_tokens

pytestmark = pytest.mark.gpu


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
