import pytest
import torch

from lora_kernels.activation import silu_mul_ref
from tests.kernels.error_rule import assert_as_exact
from tests.kernels.test_vectors import PARTS, on, scaled_and_shifted, slot_vectors

SLOTS = [2, -1, 0, 0, 5]


@pytest.mark.parametrize("parts", [None, *PARTS.values()], ids=["base", *PARTS.keys()])
@pytest.mark.parametrize("width", [8, 1000, 2050])
def test_kernel_is_as_exact_as_the_plain_path(
    width: int, parts: tuple[bool, bool] | None, dtype: torch.dtype, device: str
) -> None:
    from lora_kernels.triton_activation import silu_mul_triton

    vectors = parts and slot_vectors(SLOTS, width, dtype, parts)
    gate_up = torch.randn(len(SLOTS), 2 * width + 8).to(dtype)[:, : 2 * width]
    y = silu_mul_triton(gate_up.to(device), on(device, vectors))
    gate, up = gate_up.double().chunk(2, dim=-1)
    truth = scaled_and_shifted(gate / (1 + (-gate).exp()) * up, vectors)
    assert_as_exact(y, silu_mul_ref(gate_up, vectors), truth)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's
def test_gates_far_from_zero_neither_overflow_nor_vanish(dtype: torch.dtype, device: str) -> None:
    from lora_kernels.triton_activation import silu_mul_triton

    gate = torch.tensor([[-1e4, -200.0, 200.0, 1e4]]).to(dtype)
    y = silu_mul_triton(torch.cat([gate, torch.ones_like(gate)], 1).to(device))
    assert torch.equal(y.cpu(), gate.clamp(min=0))
