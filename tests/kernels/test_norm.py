import pytest
import torch

from lora_kernels.norm import rms_norm, rms_norm_ref
from lora_kernels.vectors import SlotVectors
from tests.kernels.error_rule import assert_as_exact
from tests.kernels.test_vectors import PARTS, on, scaled_and_shifted, slot_vectors

EPS = 1e-5
SLOTS = [2, -1, 0, 0, 5]


def _truth(x: torch.Tensor, weight: torch.Tensor, tuned: SlotVectors | None) -> torch.Tensor:
    """The norm of x as it is, in fp64; a tuned scale stands in the weight's place."""
    y = x.double()
    y = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt()
    rows = torch.ones(len(x), dtype=torch.bool)
    if tuned is not None and tuned.scale is not None:
        rows = tuned.token_slots < 0
    y[rows] *= weight.double()
    return scaled_and_shifted(y, tuned)


@pytest.mark.parametrize("parts", [None, *PARTS.values()], ids=["base", *PARTS.keys()])
@pytest.mark.parametrize("width", [8, 64, 1000])
@pytest.mark.parametrize("has_delta", [True, False], ids=["with delta", "alone"])
def test_kernel_is_as_exact_as_the_plain_path(
    has_delta: bool, width: int, parts: tuple[bool, bool] | None, dtype: torch.dtype, device: str
) -> None:
    from lora_kernels.triton_norm import rms_norm_triton

    tuned = parts and slot_vectors(SLOTS, width, dtype, parts)
    weight = torch.randn(width).to(dtype)
    x, delta = torch.randn(2, len(SLOTS), width + 8).to(dtype)[..., :width]  # strided
    x_there = x.to(device, copy=True)
    delta_there, wanted = (delta.to(device), x + delta) if has_delta else (None, x.clone())
    y = rms_norm_triton(x_there, weight.to(device), EPS, delta_there, on(device, tuned))
    plain = rms_norm_ref(x, weight, EPS, delta if has_delta else None, tuned)
    assert torch.equal(x_there.cpu(), wanted)
    assert torch.equal(x, wanted)
    assert_as_exact(y, plain, _truth(wanted, weight, tuned))


def test_rows_of_the_bare_base_do_not_depend_on_tuned_rows(device: str) -> None:
    x, weight = torch.randn(len(SLOTS), 48).to(device), torch.randn(48).to(device)
    tuned = on(device, slot_vectors(SLOTS, 48, torch.float32, (True, True)))
    alone, mixed = rms_norm(x, weight, EPS), rms_norm(x, weight, EPS, tuned=tuned)
    assert torch.equal(mixed[1], alone[1])
    assert not torch.isclose(mixed[[0, 2, 3, 4]], alone[[0, 2, 3, 4]]).all(1).any()


def test_plain_path_is_transformers_norm() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    oracle = LlamaRMSNorm(64, EPS)
    torch.nn.init.normal_(oracle.weight)
    x = torch.randn(3, 64)
    torch.testing.assert_close(rms_norm_ref(x, oracle.weight, EPS), oracle(x), atol=1e-6, rtol=1e-6)
