import bitsandbytes.functional as bnb
import pytest
import torch

from lora_kernels.nf4 import BLOCK, NF4Weight, dequantize_nf4, quantize_nf4

SOURCES = [torch.float32, torch.bfloat16, torch.float16]


def _weight(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.05
    weight[shape[0] // 2] = 0  # a row of blocks without a scale
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", SOURCES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (2, 64), (5, 192), (256, 64), (257, 704), (300, 1024)])
def test_quantizes_to_the_bits_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = _weight(shape, dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=BLOCK)
    ours = quantize_nf4(weight)
    assert torch.equal(ours.packed, packed.flatten())
    assert torch.equal(ours.absmax_u8, state.absmax)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert torch.equal(ours.nested_offset, state.offset)
    assert torch.equal(ours.nested_code, state.state2.code)
    assert (ours.shape, ours.dtype) == (shape, dtype)


@pytest.mark.parametrize("dtype", SOURCES, ids=str)
def test_dequantizes_a_bitsandbytes_weight_to_the_same_bits(dtype: torch.dtype) -> None:
    packed, state = bnb.quantize_4bit(
        _weight((257, 704), torch.float32), quant_type="nf4", compress_statistics=True, blocksize=BLOCK
    )
    read = NF4Weight(
        packed=packed.flatten(),
        absmax_u8=state.absmax,
        nested_absmax=state.state2.absmax,
        nested_offset=state.offset,
        nested_code=state.state2.code,
        shape=(257, 704),
        dtype=torch.float32,
    )
    assert torch.equal(dequantize_nf4(read, dtype), bnb.dequantize_4bit(packed, state).to(dtype))
