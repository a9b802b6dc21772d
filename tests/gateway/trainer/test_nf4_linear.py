from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gateway.trainer.nf4_linear import NF4Linear
from lora_kernels.nf4 import dequantize_nf4, quantize_nf4


def make_layers(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[NF4Linear, nn.Linear]:
    torch.manual_seed(0)
    packed = quantize_nf4(torch.randn(96, 128, dtype=torch.bfloat16))
    values = torch.randn(96) if bias else None
    dense = nn.Linear(128, 96, bias=bias, dtype=dtype)
    dense.weight.data = dequantize_nf4(packed, dtype)
    if values is not None:
        dense.bias.data = values.to(dtype)
    return NF4Linear(packed, values, dtype), dense


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keeps_dense", [False, True])
def test_forward_and_input_gradient_equal_the_dequantized_linear(bias: bool, keeps_dense: bool) -> None:
    nf4, dense = make_layers(bias)
    if not keeps_dense:  # the path that CUDA takes: dequantize in each pass
        nf4.dense = None
    x = torch.randn(2, 5, 128)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = nf4(ours), dense(theirs)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5)


def test_holds_the_packed_bytes_and_trains_nothing() -> None:
    packed = quantize_nf4(torch.randn(64, 64))
    layer = NF4Linear(packed, torch.zeros(64), torch.float32)
    assert torch.equal(layer.nf4.packed, packed.packed)
    assert torch.equal(layer.nf4.absmax(), packed.absmax())
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.state_dict().keys() == {"bias"}  # no copy of the base in any checkpoint


def test_peft_wraps_it_as_a_linear_and_trains_through_it() -> None:
    model = nn.ModuleDict({"proj": make_layers(bias=True)[0]})
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["proj"]))
    lora = wrapped.base_model.model["proj"]
    assert isinstance(lora.get_base_layer(), NF4Linear)
    assert lora.lora_A["default"].weight.shape == (4, 128)
    lora(torch.randn(3, 128)).sum().backward()
    assert lora.lora_B["default"].weight.grad.abs().sum() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_only_packed_bytes_stay(dtype: torch.dtype) -> None:
    on_cpu, _ = make_layers(bias=False, dtype=dtype)
    packed = quantize_nf4(torch.randn(96, 128, dtype=torch.bfloat16, device="cuda"))
    layer = NF4Linear(packed, None, dtype)
    assert on_cpu.dense is not None
    assert layer.dense is None
    x = torch.randn(7, 128, dtype=dtype, device="cuda", requires_grad=True)
    expected = x @ dequantize_nf4(packed, dtype).T
    y = layer(x)
    assert torch.equal(y, expected)
    (ours,) = torch.autograd.grad(y.sum(), x)
    (theirs,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(ours, theirs)
