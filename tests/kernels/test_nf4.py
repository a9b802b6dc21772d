import pytest
import torch
import torch.nn.functional as F

from lora_kernels.nf4 import (
    NF4_CODE,
    block_major,
    blocks_of,
    nf4_matmul,
    nf4_matmul_ref,
    quantize_nf4,
    unpack_nf4_ref,
)
from tests.kernels.error_rule import assert_as_exact


def _weight(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.05
    weight[shape[0] // 2] = 0  # a row of blocks without a scale
    return weight.to(dtype)


def _packed(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    return blocks_of(quantize_nf4(_weight((out_features, in_features), torch.float32)))


def test_takes_the_nearest_code() -> None:
    weight = torch.linspace(-1, 1, 64 * 50).view(50, 64)
    weight[:, 0] = 1  # every block's scale is one
    codes = quantize_nf4(weight).packed
    nearest = (weight.view(-1, 1) - NF4_CODE).abs().argmin(1)
    assert torch.equal(codes >> 4, nearest[::2].to(torch.uint8))
    assert torch.equal(codes & 15, nearest[1::2].to(torch.uint8))


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4, 32), torch.zeros(64), torch.zeros(4, 64, dtype=torch.int64)],
    ids=["part of a block", "one dimension", "not floats"],
)
def test_refuses_what_it_cannot_quantize(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="NF4 needs"):
        quantize_nf4(weight)


def test_refuses_factors_that_do_not_match() -> None:
    packed, absmax = _packed(8, 128)
    with pytest.raises(ValueError, match="do not match"):
        nf4_matmul(torch.zeros(2, 64), packed, absmax)


@pytest.mark.parametrize("shape", [(3, 64), (33, 192)])
def test_unpack_kernel_gives_the_bits_of_the_plain_path(
    shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    from lora_kernels.triton_nf4 import unpack_nf4_triton

    packed, absmax = _packed(*shape)
    expected = unpack_nf4_ref(packed, absmax, dtype)
    for order in (torch.Tensor.contiguous, block_major):
        unpacked = unpack_nf4_triton(order(packed.to(device)), order(absmax.to(device)), dtype)
        assert torch.equal(unpacked.cpu(), expected)


@pytest.mark.parametrize(
    ("num_tokens", "out_features", "in_features"),
    [(1, 64, 64), (3, 40, 192), (17, 65, 320), (2, 24, 2048), (64, 8, 64), (70, 24, 128)],
    ids=["one row", "odd", "two tiles of rows", "split", "full tile", "unpacked first"],
)
def test_matmul_kernel_is_as_exact_as_the_plain_path(
    num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype, device: str
) -> None:
    from lora_kernels.triton_nf4 import nf4_matmul_triton

    packed, absmax = _packed(out_features, in_features)
    x = torch.randn(num_tokens, in_features).to(dtype)
    truth = F.linear(x.double(), unpack_nf4_ref(packed, absmax, torch.float32).double())
    plain = nf4_matmul_ref(x, packed, absmax)
    for order in (torch.Tensor.contiguous, block_major):
        y = nf4_matmul_triton(x.to(device), order(packed.to(device)), order(absmax.to(device)))
        assert_as_exact(y, plain, truth)


def test_another_order_in_memory_is_the_same_factor() -> None:
    packed, _ = _packed(6, 192)
    tiled = block_major(packed)
    assert torch.equal(tiled, packed)
    assert torch.equal(tiled.transpose(0, 1).reshape(-1), packed.transpose(0, 1).reshape(-1))
    assert tiled.transpose(0, 1).is_contiguous()


def test_matmul_kernel_takes_rows_that_lie_apart(device: str) -> None:
    from lora_kernels.triton_nf4 import nf4_matmul_triton

    packed, absmax = _packed(16, 64)
    x = torch.randn(4, 160)[:, 32:96]
    truth = F.linear(x.double(), unpack_nf4_ref(packed, absmax, torch.float32).double())
    y = nf4_matmul_triton(x.to(device), packed.to(device), absmax.to(device))
    assert_as_exact(y, nf4_matmul_ref(x, packed, absmax), truth)


@pytest.mark.gpu
def test_a_gpu_quantizes_to_the_bits_of_a_cpu() -> None:
    weight = _weight((512, 2048), torch.bfloat16)
    here, there = quantize_nf4(weight), quantize_nf4(weight.cuda())
    for name in ("packed", "absmax_u8", "nested_absmax", "nested_offset", "nested_code"):
        assert torch.equal(getattr(here, name), getattr(there, name).cpu()), name
