import pytest
import torch

from lora_kernels.vectors import SlotVectors, apply_vectors_ref
from tests.kernels.error_rule import assert_as_exact

NUM_SLOTS = 6
SLOTS = {"mixed": [2, -1, 0, 0, 5, -1, 1], "one row": [3], "bare base": [-1, -1]}
PARTS = {"scale": (True, False), "bias": (False, True), "both": (True, True)}


def slot_vectors(slots: list[int], width: int, dtype: torch.dtype, parts: tuple[bool, bool]) -> SlotVectors:
    """Random vectors of NUM_SLOTS slots: scales, biases or both."""
    scale, bias = (torch.randn(NUM_SLOTS, width).to(dtype) if wanted else None for wanted in parts)
    return SlotVectors(torch.tensor(slots, dtype=torch.int32), scale, bias)


def on(device: str, vectors: SlotVectors | None) -> SlotVectors | None:
    """The same vectors on the kernel's device."""
    return vectors and SlotVectors(*(None if tensor is None else tensor.to(device) for tensor in vectors))


def scaled_and_shifted(y: torch.Tensor, vectors: SlotVectors | None) -> torch.Tensor:
    """The truth in fp64, a row at a time."""
    y = y.double().clone()
    if vectors is not None:
        for row, slot in enumerate(vectors.token_slots.tolist()):
            if slot >= 0 and vectors.scale is not None:
                y[row] *= vectors.scale[slot].double()
            if slot >= 0 and vectors.bias is not None:
                y[row] += vectors.bias[slot].double()
    return y


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS.keys())
@pytest.mark.parametrize("width", [8, 1000, 2050])
def test_kernel_is_as_exact_as_the_plain_path(
    slots: list[int], width: int, parts: tuple[bool, bool], dtype: torch.dtype, device: str
) -> None:
    from lora_kernels.triton_vectors import apply_vectors_triton

    vectors = slot_vectors(slots, width, dtype, parts)
    before = torch.randn(len(slots), width + 24).to(dtype)  # y is a strided part of it
    there, plain = before.to(device, copy=True), before[:, :width].clone()
    apply_vectors_triton(there[:, :width], on(device, vectors))
    apply_vectors_ref(plain, vectors)
    assert_as_exact(there[:, :width], plain, scaled_and_shifted(before[:, :width], vectors))
    assert torch.equal(there[:, width:].cpu(), before[:, width:])


def test_rows_of_the_bare_base_stay_as_they_were(device: str) -> None:
    from lora_kernels.triton_vectors import apply_vectors_triton

    vectors = slot_vectors([1, -1, -1], 40, torch.float32, (True, True))
    before = torch.randn(3, 40)
    y, plain = before.to(device, copy=True), before.clone()
    apply_vectors_triton(y, on(device, vectors))
    apply_vectors_ref(plain, vectors)
    for after in (y.cpu(), plain):
        assert torch.equal(after[1:], before[1:])
        assert not torch.equal(after[0], before[0])
