"""Engines on a GPU and on the CPU, and how their tokens compare."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters_store.blobs import BlobStore
from gateway.config import EngineConfig
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import AdapterRef, GenerateRequest, TokenLogprob
from gateway.engine.sampling_params import SamplingParams
from gateway.layers import attention as attention_layer
from gateway.layers import bottleneck as bottleneck_layer
from gateway.layers import forward_batch
from gateway.layers import linear as linear_layer
from gateway.layers import mlp as mlp_layer
from gateway.layers import norm as norm_layer
from lora_kernels import activation, attention, nf4, nf4_lora, norm, rotary, sgmv, vectors
from tests.gateway.engine.test_kinds import World

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


def small_config(**settings: Any) -> EngineConfig:
    """With little host memory, where it is not told: what is pinned is taken, and tests run side by side."""
    return EngineConfig(**{"host_cache_bytes": 512 << 20, "kv_host_bytes": 256 << 20} | settings)


def engine_with(blobs: BlobStore, base: str, **settings: Any) -> LLMEngine:
    config = small_config(base=base, kv_cache_tokens=16_384, max_num_seqs=24, max_lora_rank=16, **settings)
    return LLMEngine(config, blobs, lambda: None)


def serve(
    engine: LLMEngine, prompts: list[list[int]], max_tokens: int, refs: Seq[AdapterRef | None] = (None,)
) -> dict[str, list[TokenLogprob]]:
    """Greedy tokens of the adapters, or the bare base, in turn; each with the two likeliest."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=2)
    for i, prompt in enumerate(prompts):
        engine.add(GenerateRequest(str(i), params, prompt=prompt, adapter=refs[i % len(refs)]), prompt)
    tokens = drain(engine)
    engine.check_integrity()
    return tokens


def assert_alike(ours: dict[str, list[TokenLogprob]], other: dict[str, list[TokenLogprob]]) -> None:
    """The same tokens in fp32, as likely, up to one where two are as likely: there rounding chooses, and so the batch.

    Behind that token a row has nothing to be compared with.
    """
    assert ours.keys() == other.keys()
    for key, row in ours.items():
        for token, wanted in zip(row, other[key], strict=True):
            likeliest = {token_id: logprob for token_id, _, logprob in wanted.top}
            assert token.logprob == pytest.approx(likeliest.get(token.token_id), abs=2e-4), (key, token, wanted)
            if token.token_id != wanted.token_id:
                assert likeliest[token.token_id] == pytest.approx(wanted.logprob, abs=2e-4), (key, token, wanted)
                break


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


def engine_of_kinds(kinds: World, **settings: Any) -> LLMEngine:
    defaults = {"device": "cuda", "dtype": "float32", "max_lora_rank": 256, "num_adapter_slots": 16}
    defaults |= {"num_bottleneck_pages": 40}
    config = small_config(base=str(kinds.base), kv_cache_tokens=8192, max_num_seqs=24, **defaults | settings)
    return LLMEngine(config, kinds.blobs, lambda: None)
