from dataclasses import dataclass

import pytest
import torch

from gateway.layers.rotary import RotaryTable
from lora_kernels.layer_cache import FP8, LayerCache
from lora_kernels.rotary import HeadNorm, rotary_store_ref
from lora_kernels.vectors import SlotVectors
from tests.kernels.error_rule import assert_as_exact
from tests.kernels.test_vectors import PARTS, on, scaled_and_shifted, slot_vectors

EPS = 1e-6
POSITIONS = [4, 0, 17, 100, 3]
PLACES = [7, 0, 19, 4, 12]
SLOTS = [2, -1, 0, 0, 5]


@dataclass(frozen=True)
class Heads:
    """A model's heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Columns of the fused linear."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


HEADS = {
    "grouped": Heads(6, 2, 16),
    "one key head, no power of two": Heads(7, 1, 24),
    "tiles end at each part": Heads(8, 8, 8),
}


def _tables(head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    inv_freq = 1 / 100 ** (torch.arange(0, head_dim, 2) / head_dim)
    return RotaryTable(inv_freq, 1.0, 128, torch.device("cpu"), dtype).at(torch.tensor(POSITIONS))


def _cache(heads: Heads, pages: torch.dtype, device: str = "cpu") -> LayerCache:
    cache = LayerCache.zeros(6, 4, heads.num_kv_heads, heads.head_dim, dtype=pages, device=device)
    rows = torch.full((24, heads.num_kv_heads, heads.head_dim), -3.0, device=device)
    rows = rows if pages == FP8 else rows.to(pages)
    cache.store(torch.arange(24, device=device), rows, rows)
    return cache


def _contents(cache: LayerCache, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all positions."""
    return cache.blocks(torch.arange(6, device=cache.k.device), dtype)


def _truth(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: Heads,
    norm: HeadNorm | None,
    vectors: SlotVectors | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in fp64."""
    rows = scaled_and_shifted(qkv, vectors).view(len(qkv), -1, heads.head_dim)
    q, k, v = rows.split_with_sizes((heads.num_heads, heads.num_kv_heads, heads.num_kv_heads), 1)
    if norm is not None:
        q, k = (
            x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
            for x, weight in zip((q, k), norm.weight, strict=True)
        )
    half = heads.head_dim // 2
    turned = []
    for x in (q, k):
        low, high = x[..., :half], x[..., half:]
        c, s = cos[..., :half].double(), sin[..., half:].double()
        turned.append(torch.cat((low * c - high * s, high * c + low * s), -1))
    return turned[0], turned[1], v


@pytest.mark.parametrize("fp8", [False, True], ids=["same", "fp8"])
@pytest.mark.parametrize("has_norm", [False, True], ids=["no norm", "head norm"])
@pytest.mark.parametrize("parts", [None, *PARTS.values()], ids=["base", *PARTS.keys()])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_kernel_is_as_exact_as_the_plain_path(
    heads: Heads, parts: tuple[bool, bool] | None, has_norm: bool, fp8: bool, dtype: torch.dtype, device: str
) -> None:
    from lora_kernels.triton_rotary import rotary_store_triton

    vectors = parts and slot_vectors(SLOTS, heads.width, dtype, parts)
    norm = HeadNorm(torch.randn(2, heads.head_dim).to(dtype), EPS) if has_norm else None
    qkv, (cos, sin), places = (
        torch.randn(len(SLOTS), heads.width).to(dtype),
        _tables(heads.head_dim, dtype),
        torch.tensor(PLACES),
    )
    plain, there = (_cache(heads, FP8 if fp8 else dtype, at) for at in ("cpu", device))
    plain_q = rotary_store_ref(qkv, cos, sin, plain, places, norm, vectors)
    q = rotary_store_triton(
        *(tensor.to(device, copy=True) for tensor in (qkv, cos, sin)),
        there,
        places.to(device),
        norm and HeadNorm(norm.weight.to(device), EPS),
        on(device, vectors),
    )
    truth_q, *truth_kv = _truth(qkv, cos, sin, heads, norm, vectors)
    assert_as_exact(q, plain_q, truth_q)
    for kernel, same_dtype, written in zip(
        *(_contents(c, torch.float32) for c in (there, plain)), truth_kv, strict=True
    ):
        truth = torch.full(kernel.shape, -3.0, dtype=torch.float64)
        truth[PLACES] = written
        assert_as_exact(kernel, same_dtype, truth)
    if vectors is None:  # values are copied
        assert torch.equal(_contents(there, dtype)[1].cpu(), _contents(plain, dtype)[1])


@pytest.mark.parametrize("pages", [torch.float16, FP8], ids=["same", "fp8"])
def test_rows_go_to_blocks_that_lie_between_others(pages: torch.dtype, device: str) -> None:
    from lora_kernels.triton_rotary import rotary_store_triton

    heads = HEADS["grouped"]
    qkv, tables = torch.randn(len(SLOTS), heads.width).half(), _tables(heads.head_dim, torch.float16)
    places = torch.tensor(PLACES)
    half = 4 * heads.num_kv_heads * heads.head_dim * pages.itemsize
    memory = torch.zeros(12 * half, dtype=torch.uint8, device=device)
    interleaved = LayerCache.interleaved(memory, 4, heads.num_kv_heads, heads.head_dim, pages)
    own = LayerCache.zeros(6, 4, heads.num_kv_heads, heads.head_dim, dtype=pages, device=device)
    for cache, at in ((own, places), (interleaved, places // 4 * 8 + places % 4)):
        rotary_store_triton(*(tensor.to(device, copy=True) for tensor in (qkv, *tables)), cache, at.to(device))
    for ours, theirs in zip(interleaved.tensors, own.tensors, strict=True):
        assert torch.equal(ours.view(torch.uint8)[:12:2], theirs.view(torch.uint8))


def test_zeros_and_a_lone_outlier_keep_fp8_finite_and_the_outlier_as_it_is(device: str) -> None:
    from lora_kernels.triton_rotary import rotary_store_triton

    heads = Heads(2, 1, 16)
    qkv = torch.zeros(len(PLACES), heads.width)
    qkv[1, -16:] = 1e-3
    qkv[1, -1] = 5e4
    cos, sin = _tables(16, torch.float32)
    cache = _cache(heads, FP8, device)
    rotary_store_triton(*(x.to(device) for x in (qkv, cos, sin)), cache, torch.tensor(PLACES, device=device))
    values = _contents(cache, torch.float32)[1].cpu()[PLACES, 0]
    assert not values[[0, 2, 3, 4]].any()
    assert values[1].tolist() == [0.0] * 15 + [pytest.approx(5e4, rel=2**-8)]
