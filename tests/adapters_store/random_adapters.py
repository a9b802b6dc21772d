"""Stored adapters of random weights for a base of small, all different widths, without the upload pipeline."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save_file

from adapters_store.base_spec import (
    BOTTLENECK_TENSORS,
    NORMS,
    bottleneck_tensor_name,
    lora_tensor_name,
    tensor_name,
)
from adapters_store.blobs import BlobStore
from adapters_store.bottleneck_layout import BottleneckLayout, BottleneckShape
from adapters_store.lora_layout import LoRALayout, num_pages_for
from adapters_store.manifest import (
    ADAPTER_METADATA_KEY,
    PROMPT_TENSOR,
    AdapterSpec,
    Bottleneck,
    BottleneckSite,
    BottleneckSize,
    LoRADelta,
    VectorSite,
    VirtualTokens,
)
from adapters_store.page_image import PageImage, fill_pages
from adapters_store.slots import AdapterSlots
from adapters_store.vector_layout import VectorLayout
from adapters_store.weights import AdapterWeights, BottleneckTensors, BottleneckWeights

NUM_LAYERS = 2
SHAPES = {
    "q_proj": (10, 12),
    "k_proj": (6, 12),
    "v_proj": (8, 12),
    "o_proj": (12, 10),
    "gate_proj": (20, 12),
    "up_proj": (22, 12),
    "down_proj": (12, 20),
}
LAYOUT = LoRALayout.from_linears(SHAPES, NUM_LAYERS)
BASE_NORMS = {norm: torch.randn(1 if norm == "norm" else NUM_LAYERS, 12) for norm in NORMS}
VECTORS = VectorLayout(LAYOUT, BASE_NORMS)
BOTTLENECKS = BottleneckLayout(NUM_LAYERS, SHAPES["q_proj"][1], torch.float32)


@dataclass(frozen=True)
class StoredAdapter:
    name: str
    digest: str
    rank: int
    num_virtual_tokens: int = 0

    @property
    def tenant(self) -> str:
        return self.name.partition("/")[0]


class GatedBlobStore(BlobStore):
    """A blob store whose reads wait until the gate is open, and are counted."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.gate = threading.Event()
        self.num_reads = 0

    def open(self, digest: str) -> BinaryIO:
        self.num_reads += 1
        assert self.gate.wait(timeout=30)
        return super().open(digest)


def random_weights(
    rank: int, seed: int, linears: Iterable[str] = SHAPES, num_layers: int = NUM_LAYERS
) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        rank,
        {
            (layer, linear): (
                torch.randn(rank, SHAPES[linear][1], generator=generator),
                torch.randn(SHAPES[linear][0], rank, generator=generator),
            )
            for layer in range(num_layers)
            for linear in linears
        },
    )


def make_image(weights: AdapterWeights, dtype: torch.dtype = torch.float32, layout: LoRALayout = LAYOUT) -> PageImage:
    """The weights in memory that held something else before."""
    memory = torch.full((num_pages_for(weights.rank), layout.page_bytes(dtype)), 0x41, dtype=torch.uint8)
    fill_pages(tuple(memory), weights, layout, dtype)
    return PageImage(weights.rank, tuple(memory))


def put_adapter(blobs: BlobStore, folder: Path, rank: int, seed: int = 0) -> StoredAdapter:
    """Store random weights of this rank, alike for the same (rank, seed)."""
    weights = random_weights(rank, seed)
    spec = AdapterSpec(
        base_fingerprint="f" * 64,
        deltas=tuple(
            LoRADelta(linear=linear, rank=rank, scale=1.0, layers=tuple(range(NUM_LAYERS))) for linear in SHAPES
        ),
    )
    tensors = {
        lora_tensor_name(layer, linear, side): matrix
        for (layer, linear), pair in weights.tensors.items()
        for side, matrix in zip("AB", pair, strict=True)
    }
    path = folder / f"rank{rank}-seed{seed}.safetensors"
    save_file(tensors, path, {ADAPTER_METADATA_KEY: spec.canonical_json()})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    blobs.put(digest, path)
    return StoredAdapter(f"tenant/rank{rank}:{seed}", digest, rank)


def put_virtual_tokens(blobs: BlobStore, folder: Path, num_tokens: int, *, is_prefix: bool = False) -> StoredAdapter:
    """Store virtual tokens whose numbers count up."""
    width = 2 * NUM_LAYERS * SHAPES["k_proj"][0] if is_prefix else SHAPES["q_proj"][1]
    spec = AdapterSpec(
        kind="PREFIX_TUNING" if is_prefix else "PROMPT_TUNING",
        base_fingerprint="f" * 64,
        virtual_tokens=VirtualTokens(num_tokens=num_tokens, num_layers=NUM_LAYERS if is_prefix else None),
    )
    path = folder / f"virtual{num_tokens}-{width}.safetensors"
    rows = torch.arange(num_tokens * width, dtype=torch.float32).view(num_tokens, width)
    save_file({PROMPT_TENSOR: rows}, path, {ADAPTER_METADATA_KEY: spec.canonical_json()})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    blobs.put(digest, path)
    return StoredAdapter(f"tenant/{path.stem}:1", digest, 0, num_tokens)


def put_vectors(blobs: BlobStore, folder: Path, seed: int = 0) -> StoredAdapter:
    """Store an adapter of no rank that scales the outputs of k_proj."""
    site = VectorSite(module="k_proj", role="out_scale", tensor="ia3_l", layers=(0, 1))
    spec = AdapterSpec(kind="IA3", base_fingerprint="f" * 64, vectors=(site,))
    generator = torch.Generator().manual_seed(seed)
    tensors = {tensor_name(layer, "k_proj", "ia3_l"): torch.randn(6, 1, generator=generator) for layer in (0, 1)}
    path = folder / f"vectors-seed{seed}.safetensors"
    save_file(tensors, path, {ADAPTER_METADATA_KEY: spec.canonical_json()})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    blobs.put(digest, path)
    return StoredAdapter(f"tenant/vectors:{seed}", digest, 0)


def random_bottlenecks(
    sizes: Mapping[BottleneckSite, int], seed: int = 0, layers: Iterable[int] = range(NUM_LAYERS)
) -> BottleneckWeights:
    hidden, generator = SHAPES["q_proj"][1], torch.Generator().manual_seed(seed)
    shapes = {site: ((size, hidden), (size,), (hidden, size), (hidden,)) for site, size in sizes.items()}
    tensors = {
        (layer, site): BottleneckTensors(*(torch.randn(shape, generator=generator) for shape in shapes[site]))
        for layer in layers
        for site in sizes
    }
    return BottleneckWeights("sum", "relu", tensors)


def bottleneck_image(weights: BottleneckWeights, layout: BottleneckLayout = BOTTLENECKS) -> PageImage:
    """The weights in memory that held something else before."""
    shape = BottleneckShape.of(weights)
    memory = torch.full((shape.num_pages, layout.page_bytes), 0x41, dtype=torch.uint8)
    layout.fill(tuple(memory), weights)
    return PageImage(0, tuple(memory), bottleneck=shape)


def put_bottleneck(blobs: BlobStore, folder: Path, size: int, seed: int = 0) -> StoredAdapter:
    """Store a bottleneck adapter at the output of every layer."""
    spec = AdapterSpec(
        kind="BOTTLENECK",
        base_fingerprint="f" * 64,
        bottleneck=Bottleneck(
            name="x",
            hidden_size=SHAPES["q_proj"][1],
            sites=("output",),
            sizes=(BottleneckSize(size=size, layers=tuple(range(NUM_LAYERS))),),
            reads="sum",
            activation="relu",
            scale=1.0,
        ),
    )
    tensors = {
        bottleneck_tensor_name(layer, site, "x", name): tensor
        for (layer, site), each in random_bottlenecks({"output": size}, seed).tensors.items()
        for name, tensor in zip(BOTTLENECK_TENSORS, each, strict=True)
    }
    path = folder / f"bottleneck{size}-{seed}.safetensors"
    save_file(tensors, path, {ADAPTER_METADATA_KEY: spec.canonical_json()})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    blobs.put(digest, path)
    return StoredAdapter(f"tenant/{path.stem}:1", digest, 0)


def assert_slot_holds(slots: AdapterSlots, slot: int, weights: AdapterWeights) -> None:
    """The slot's pages, put together again, are the adapter's matrices and zeros everywhere else."""
    pages = list(slots.pages_of(slot).ids)
    for layer in range(slots.layout.num_layers):
        for group in slots.layout.groups:
            pools = slots.pools(layer, group.name)
            for index, linear in enumerate(group.linears):
                a = pools.a[pages, index].flatten(0, 1)
                b = pools.b[pages][:, :, group.columns(linear)].flatten(0, 1)
                pair = weights.tensors.get((layer, linear))
                rank = 0 if pair is None else pair[0].shape[0]
                if pair is not None:
                    assert torch.equal(a[:rank], pair[0].to(a.dtype))
                    assert torch.equal(b[:rank], pair[1].T.to(b.dtype))
                assert not a[rank:].any()
                assert not b[rank:].any()
