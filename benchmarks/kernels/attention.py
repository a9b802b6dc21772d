"""Paged attention beside torch's own kernels over the same keys and values in order, and FlashInfer where installed.

Llama-3.1-8B's heads in bf16 (32 of 128, 8 of keys and values), pages of 16 tokens scattered over the cache. A decode
case `64x2048` is 64 sequences of 2,048 tokens, one query each; its floor is the bytes of their keys and values.
A prefill case is one step of prompts, causal; `1024 on 8192` is a chunk whose context is cached. A case with `fp8` has
its pages in fp8, and is held against the same one in bf16.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from benchmarks.kernels.timing import Launch, Timing, copies, floor_us, measure, report, report_ratio
from lora_kernels.attention import AttentionMetadata, paged_attention
from lora_kernels.layer_cache import FP8, LayerCache

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
SCALE = HEAD_DIM**-0.5
DECODES = ((64, 2048), (64, 256), (1, 8192), (16, 8192), (256, 512))
# Name, sequences, and each one's queries and context.
PREFILLS = (("4096", 1, 4096, 4096), ("1024 on 8192", 1, 1024, 9216), ("16x256", 16, 256, 256))
SHARE_TARGET, SPEEDUP_TARGET, FP8_TARGET = 0.85, 0.9, 1.8
_PREFILL_LAUNCHES = 3
_BACKENDS = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch cuDNN": SDPBackend.CUDNN_ATTENTION}
# torch 2.11 shares key-value heads unasked, later ones want to be told.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


class Case:
    """Sequences of one length: queries, and the paged cache that holds their keys and values.

    q: [num_seqs * query_len, NUM_HEADS, HEAD_DIM].
    """

    def __init__(self, num_seqs: int, query_len: int, context_len: int, pages: torch.dtype = torch.bfloat16) -> None:
        self.num_seqs, self.lens = num_seqs, (query_len, context_len)
        blocks = -(-context_len // BLOCK_SIZE)
        self.q = _random(num_seqs * query_len, NUM_HEADS, HEAD_DIM)
        self.cache = _pages(num_seqs * blocks, pages)
        tables = torch.randperm(num_seqs * blocks).view(num_seqs, blocks).tolist()
        lens = ([length] * num_seqs for length in self.lens)
        self.meta = AttentionMetadata.build(*lens, tables, BLOCK_SIZE, "cuda")
        self.starts = [torch.arange(num_seqs + 1, device="cuda", dtype=torch.int32) * length for length in self.lens]

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that are read."""
        return sum(tensor.nbytes for tensor in self.cache.tensors)

    def paged(self) -> Tensor:
        """Our kernels."""
        return paged_attention(self.q, self.cache, self.meta, SCALE, None)

    def sdpa(self, backend: SDPBackend) -> Tensor:
        """The cache's keys and values as if they lay in order; of several queries, causal from the first position."""
        q, k, v = (
            x.view(self.num_seqs, -1, x.shape[-2], HEAD_DIM).transpose(1, 2)
            for x in (self.q, self.cache.k, self.cache.v)
        )
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.lens[0] > 1, scale=SCALE, enable_gqa=True)

    def varlen(self) -> Tensor:
        """FlashAttention for ragged batches, likewise in order; causal from the end of the context."""
        k, v = (x.view(-1, NUM_KV_HEADS, HEAD_DIM) for x in (self.cache.k, self.cache.v))
        return varlen_attn(self.q, k, v, *self.starts, *self.lens, scale=SCALE, window_size=(-1, 0), **_GROUPED)

    def flashinfer(self, backend: str) -> Launch:
        """FlashInfer over the same pages, planned beforehand; decode rows go through its prefill's tensor-core path."""
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        pages = self.meta.block_table.shape[1]
        wrapper.plan(
            self.starts[0],
            torch.arange(self.num_seqs + 1, device="cuda", dtype=torch.int32) * pages,
            self.meta.block_table.flatten(),
            torch.full((self.num_seqs,), BLOCK_SIZE, device="cuda", dtype=torch.int32),
            NUM_HEADS,
            NUM_KV_HEADS,
            HEAD_DIM,
            BLOCK_SIZE,
            causal=True,
            sm_scale=SCALE,
            q_data_type=self.q.dtype,
        )
        return partial(wrapper.run, self.q, (self.cache.k, self.cache.v), out=torch.empty_like(self.q))


def run() -> None:
    """Measure and record every case."""
    for num_seqs, context_len in DECODES:
        _decode(num_seqs, context_len)
    for name, *sizes in PREFILLS:
        ours = _prefill(f"prefill attention {name}", Case(*sizes))
        case = Case(*sizes, pages=FP8)
        _fp8(f"prefill attention {name} fp8", [case] * _PREFILL_LAUNCHES, case.kv_bytes + 2 * case.q.nbytes, ours)


def _decode(num_seqs: int, context_len: int) -> None:
    name = f"decode attention {num_seqs}x{context_len}"
    first = Case(num_seqs, 1, context_len)
    cases = [first, *(Case(num_seqs, 1, context_len) for _ in range(copies(first.kv_bytes) - 1))]
    timing = measure([case.paged for case in cases])
    report(name, timing, nbytes=first.kv_bytes)
    target = SHARE_TARGET if (num_seqs, context_len) == DECODES[0] else None
    report_ratio(name, "share_of_floor", floor_us(first.kv_bytes) / timing.us, target)
    peers: dict[str, list[Launch]] = {
        system: [partial(case.sdpa, backend) for case in cases] for system, backend in _BACKENDS.items()
    }
    if find_spec("flashinfer"):
        peers["FlashInfer fa2"] = [case.flashinfer("fa2") for case in cases]
    for system, launches in peers.items():
        report(name, measure(launches), nbytes=first.kv_bytes, system=system)
    half = Case(num_seqs, 1, context_len, FP8)
    halves = [half, *(Case(num_seqs, 1, context_len, FP8) for _ in range(copies(half.kv_bytes) - 1))]
    share = _fp8(f"{name} fp8", halves, half.kv_bytes, timing, FP8_TARGET if target else None)
    report_ratio(f"{name} fp8", "share_of_floor", share, target)


def _fp8(name: str, cases: list[Case], nbytes: int, bf16: Timing, target: float | None = None) -> float:
    """Record a case over fp8 pages beside its time over bf16; the share of its floor."""
    timing = measure([case.paged for case in cases])
    report(name, timing, nbytes=nbytes)
    report_ratio(name, "speedup_vs_bf16_pages", bf16.us / timing.us, target)
    return floor_us(nbytes) / timing.us


def _prefill(name: str, case: Case) -> Timing:
    query_len, context_len = case.lens
    peers: dict[str, Launch] = {"patchbay": case.paged, "torch varlen flash": case.varlen}
    if query_len == context_len:
        peers |= {system: partial(case.sdpa, backend) for system, backend in _BACKENDS.items()}
    if find_spec("flashinfer"):
        peers |= {f"FlashInfer {backend}": case.flashinfer(backend) for backend in ("fa2", "fa3")}
    nbytes = case.kv_bytes + 2 * case.q.nbytes
    times = {system: measure([launch] * _PREFILL_LAUNCHES) for system, launch in peers.items()}
    for system, timing in times.items():
        report(name, timing, nbytes=nbytes, system=system)
    flash = times.get("torch flash", times["torch varlen flash"])
    target = SPEEDUP_TARGET if name.endswith(f" {PREFILLS[0][0]}") else None
    report_ratio(name, "speedup_vs_flash", flash.us / times["patchbay"].us, target)
    return times["patchbay"]


def _pages(num_blocks: int, dtype: torch.dtype) -> LayerCache:
    sizes = (num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    cache = LayerCache.zeros(*sizes, dtype=dtype, device="cuda")
    cache.store(torch.arange(num_blocks * BLOCK_SIZE, device="cuda"), *_random(2, *sizes).flatten(1, 2))
    return cache


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)
