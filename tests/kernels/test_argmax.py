"""The largest logit of each row: against PyTorch, with ties, NaN and rows of nothing but -inf."""

import pytest
import torch

from lora_kernels.argmax import row_argmax_ref


def triton_argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from lora_kernels.triton_argmax import row_argmax_triton

    return row_argmax_triton(logits)


@pytest.mark.parametrize("width", [1, 63, 640, 8192, 20_000])
@pytest.mark.parametrize("kernel", [row_argmax_ref, triton_argmax], ids=["ref", "triton"])
def test_first_of_the_largest(kernel, width: int, device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    # Few distinct numbers, so that the largest is there many times.
    logits = torch.randint(-3, 3, (5, width), device=device).to(dtype)
    highest, index = kernel(logits)
    expected = logits.float().max(-1).values
    assert torch.equal(highest, expected)
    assert index.dtype == torch.int64
    first = [row.tolist().index(value) for row, value in zip(logits, expected.tolist(), strict=True)]
    assert index.tolist() == first


@pytest.mark.parametrize("kernel", [row_argmax_ref, triton_argmax], ids=["ref", "triton"])
def test_a_nan_is_the_largest_and_an_empty_row_has_an_index(kernel, device: str, dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 20_000, device=device, dtype=dtype)
    logits[0, [9000, 17_000]] = torch.tensor([float("inf"), float("nan")], device=device, dtype=dtype)
    logits[1] = float("-inf")
    logits[2, [12_345, 6]] = torch.tensor([float("inf"), float("inf")], device=device, dtype=dtype)
    highest, index = kernel(logits)
    assert highest[0].isnan()
    assert highest[1:].tolist() == [float("-inf"), float("inf")]
    assert index.tolist() == [17_000, 0, 6]


def test_rows_may_be_part_of_a_wider_matrix(device: str, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 1000, device=device).to(dtype)
    for highest, index in (row_argmax_ref(logits[:, :900]), triton_argmax(logits[:, :900])):
        assert torch.equal(highest, logits[:, :900].float().max(-1).values)
        assert torch.equal(logits.gather(1, index[:, None])[:, 0].float(), highest)
