"""The KV cache: pages in fp8, which serve as others do, where they are refused, and copies of blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.kv_cache import demo_dialogues, fp8_error
from gateway.config import EngineConfig
from gateway.engine.kv_cache import KVCache, block_bytes, cache_dtype
from gateway.engine.llm_engine import LLMEngine
from gateway.errors import ConfigInvalid
from gateway.models.config import DecoderConfig
from gateway.models.loader import load_model
from lora_kernels.layer_cache import FP8
from tests.gateway.engine.conftest import TinyWorld
from tests.gateway.engine.test_llm_engine import PROMPT, request, run, tokens

MakeEngine = Callable[..., LLMEngine]
CPU = torch.device("cpu")


@pytest.fixture
def shape(world: TinyWorld) -> DecoderConfig:
    """Llama-3.1-8B's."""
    return replace(DecoderConfig.from_folder(world.base), num_layers=32, num_kv_heads=8, head_dim=128)


def test_a_block_in_fp8_takes_half_of_one_in_bf16_and_eight_bytes_beside_it_a_token_and_head(
    shape: DecoderConfig,
) -> None:
    # Four of scales; blocks are numbered by halves, so that every other place is nobody's.
    assert block_bytes(shape, 16, torch.bfloat16) == 2 << 20
    assert block_bytes(shape, 16, FP8) == (1 << 20) + 32 * 16 * 8 * 8


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=["auto", "fp8"])
def test_a_block_and_the_scratch_block_are_one_index_of_every_tensor(world: TinyWorld, dtype: torch.dtype) -> None:
    config = DecoderConfig.from_folder(world.base)
    cache = KVCache.zeros(config, 10, 4, CPU, dtype)
    tensors = [tensor for layer in cache.layers for tensor in layer.tensors]
    assert {tensor.shape[0] for tensor in tensors} == {11}
    assert cache.scratch_slot == 40


def test_fp8_is_refused_on_a_card_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    device, fp8 = torch.device("cuda"), EngineConfig(kv_cache_dtype="fp8")
    with pytest.raises(ConfigInvalid, match=r'A100 has no fp8 .*; set engine.kv_cache_dtype to "auto"'):
        cache_dtype(fp8, torch.bfloat16, device)
    assert cache_dtype(EngineConfig(), torch.bfloat16, device) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert cache_dtype(fp8, torch.bfloat16, device) == FP8


def test_chunks_reused_prefixes_and_preemption_change_no_token_in_fp8(
    world: TinyWorld, make_engine: MakeEngine
) -> None:
    names = [None, "a4", "b20", "c8"]
    requests = [request(world, str(i), PROMPT[i:], name, max_tokens=40) for i, name in enumerate(names)]
    whole, chunked = make_engine(kv_cache_dtype="fp8"), make_engine(kv_cache_dtype="fp8", max_num_batched_tokens=8)
    tight = make_engine(kv_cache_dtype="fp8", kv_cache_tokens=140, enable_prefix_caching=False)
    wanted = {name: tokens(deltas) for name, deltas in run(whole, *requests).items()}
    for engine in (chunked, tight, whole):  # the last for the second time
        again = run(engine, *(replace(one, request_id=one.request_id + "'") for one in requests))
        assert {name[:-1]: tokens(deltas) for name, deltas in again.items()} == wanted
    assert again["0'"][-1].usage is not None
    assert again["0'"][-1].usage.cached_tokens == 28
    assert tight.stats().num_preemptions > 0


def test_fp8_stays_near_the_compute_dtype_on_the_embedded_base() -> None:
    error = fp8_error(load_model(EngineConfig(device="cpu")), demo_dialogues(16))
    assert 0.01 < error.attention < 0.05  # a number of e4m3 is off by 2.5 %, rms
    assert 0 < error.mean_drift < 0.02
    assert error.same_likeliest > 0.98


def test_batch_invariant_mode_refuses_fp8() -> None:
    with pytest.raises(ConfigInvalid, match="batch_invariant"):
        cache_dtype(EngineConfig(kv_cache_dtype="fp8", batch_invariant=True), torch.float32, CPU)


def make_cache(base: Path, device: str) -> KVCache:
    cache = KVCache.zeros(DecoderConfig.from_folder(base), 8, 4, torch.device(device), torch.float32)
    for layer in cache.layers:
        for tensor in layer.tensors:
            tensor.normal_()
    return cache


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_blocks_are_copied_in_every_layer_and_no_other_changes(world: TinyWorld, device: str) -> None:
    cache = make_cache(world.base, device)
    before = [tensor.clone() for layer in cache.layers for tensor in layer.tensors]
    sources, targets = torch.tensor([1, 1, 5], device=device), torch.tensor([0, 5, 7], device=device)
    cache.copy_blocks(sources, targets)
    for tensor, old in zip((t for layer in cache.layers for t in layer.tensors), before, strict=True):
        # Block 5 is read before it is written.
        assert torch.equal(tensor, old[[1, 1, 2, 3, 4, 1, 6, 5, 8]])
