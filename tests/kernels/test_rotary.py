from dataclasses import dataclass

import pytest
import torch

from gateway.layers.rotary import RotaryTable
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


def _caches(heads: Heads, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    return torch.full((2, 6, 4, heads.num_kv_heads, heads.head_dim), -3.0, dtype=dtype, device=device)


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


@pytest.mark.parametrize("has_norm", [False, True], ids=["no norm", "head norm"])
@pytest.mark.parametrize("parts", [None, *PARTS.values()], ids=["base", *PARTS.keys()])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_kernel_is_as_exact_as_the_plain_path(
    heads: Heads, parts: tuple[bool, bool] | None, has_norm: bool, dtype: torch.dtype, device: str
) -> None:
    from lora_kernels.triton_rotary import rotary_store_triton

    vectors = parts and slot_vectors(SLOTS, heads.width, dtype, parts)
    norm = HeadNorm(torch.randn(2, heads.head_dim).to(dtype), EPS) if has_norm else None
    qkv, (cos, sin), places = (
        torch.randn(len(SLOTS), heads.width).to(dtype),
        _tables(heads.head_dim, dtype),
        torch.tensor(PLACES),
    )
    plain, there = _caches(heads, dtype), _caches(heads, dtype, device)
    plain_q = rotary_store_ref(qkv, cos, sin, *plain, places, norm, vectors)
    q = rotary_store_triton(
        *(tensor.to(device, copy=True) for tensor in (qkv, cos, sin)),
        *there,
        places.to(device),
        norm and HeadNorm(norm.weight.to(device), EPS),
        on(device, vectors),
    )
    truth_q, truth_k, truth_v = _truth(qkv, cos, sin, heads, norm, vectors)
    truth = _caches(heads, torch.float64)
    rows = truth.view(2, -1, heads.num_kv_heads, heads.head_dim)
    rows[0, PLACES], rows[1, PLACES] = truth_k, truth_v
    assert_as_exact(q, plain_q, truth_q)
    for part in range(2):
        assert_as_exact(there[part], plain[part], truth[part])
    if vectors is None:
        assert torch.equal(there[1].cpu(), plain[1])  # values are copied
