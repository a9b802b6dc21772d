"""The engine through the Triton kernels on a GPU, against the plain-PyTorch path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.blobs import BlobStore
from benchmarks.engine import write_adapter, write_base
from gateway.config import EngineConfig
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef, GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.layers import attention as attention_layer
from gateway.layers import linear as linear_layer
from lora_kernels import attention, kv_store, nf4, sgmv

pytestmark = pytest.mark.gpu
NUM_ADAPTERS = 16


def generate(engine: LLMEngine, refs: list[AdapterRef], count: int) -> dict[str, list[int]]:
    """Greedy tokens of 16 adapters and a base row in one batch."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    for i, ref in enumerate([*refs, None]):
        prompt = list(range(20 + i, 52 + 3 * i))
        engine.add(GenerateRequest(str(i), params, prompt=prompt, adapter=ref), prompt)
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    engine.check_integrity()
    engine.close()
    return tokens


def engine_with(blobs: BlobStore, base: str, **settings: Any) -> LLMEngine:
    return LLMEngine(EngineConfig(base=base, kv_cache_tokens=16_384, max_lora_rank=16, **settings), blobs, lambda: None)


def use_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every kernel call of the layers to its plain-PyTorch twin, on the same device."""
    monkeypatch.setattr(linear_layer, "nf4_matmul", nf4.nf4_matmul_ref)
    monkeypatch.setattr(linear_layer, "sgmv_shrink", sgmv.sgmv_shrink_ref)
    monkeypatch.setattr(linear_layer, "sgmv_expand", sgmv.sgmv_expand_ref)
    monkeypatch.setattr(attention_layer, "store_kv", kv_store.store_kv_ref)
    monkeypatch.setattr(attention_layer, "paged_attention", attention.paged_attention_ref)


def agreement(a: dict[str, list[int]], b: dict[str, list[int]]) -> float:
    """The share of tokens before each row's first difference."""
    same = total = 0
    for key, row in a.items():
        total += len(row)
        same += next((i for i, (x, y) in enumerate(zip(row, b[key], strict=True)) if x != y), len(row))
    return same / total


def test_the_embedded_base_gives_the_cpu_path_s_tokens(tmp_path: Path) -> None:
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    on_cpu = engine_with(blobs, "embedded", device="cpu")
    refs = [write_adapter(blobs, tmp_path, on_cpu.model.spec, 8, i) for i in range(NUM_ADAPTERS)]
    wanted = generate(on_cpu, refs, 48)
    assert generate(engine_with(blobs, "embedded", device="cuda", dtype="float32"), refs, 48) == wanted


@pytest.mark.parametrize(("dtype", "least"), [("float32", 1.0), ("bfloat16", 0.3)])
def test_an_8b_shaped_base_gives_the_reference_path_s_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, least: float
) -> None:
    torch.manual_seed(0)
    base = write_base(tmp_path / "base", layers=4)
    blobs = BlobStore(f"file://{tmp_path / 'blobs'}")
    kernels = engine_with(blobs, str(base), device="cuda", dtype=dtype)
    refs = [write_adapter(blobs, tmp_path, kernels.model.spec, 16, i) for i in range(NUM_ADAPTERS)]
    got = generate(kernels, refs, 32)
    use_references(monkeypatch)
    wanted = generate(engine_with(blobs, str(base), device="cuda", dtype=dtype), refs, 32)
    share = agreement(got, wanted)
    print(f"{dtype}: {share:.4f} of tokens before the first difference")
    # In bf16 near-ties of random weights break either way; fp32 has none.
    assert share >= least
