import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels.segments import PAGE_RANK, LoRASegments, chunk_tables
from lora_kernels.sgmv import sgmv_expand, sgmv_expand_ref, sgmv_shrink, sgmv_shrink_ref
from tests.kernels.error_rule import assert_as_exact

NUM_PAGES = 14
PAGES = {0: [3], 1: [4, 9], 2: [1, 2, 7, 11], 3: [12], 4: [5], 5: [6]}
WIDTHS = [(24,), (40, 16), (33, 8, 8)]
SLOTS = st.lists(st.integers(-1, 5), min_size=1, max_size=60).filter(lambda slots: max(slots) >= 0)

LAYOUTS = {
    "one row": [0],
    "mixed ranks and base rows": [2, -1, 0, 0, 1, -1, 2, 3],
    "run of pages": [4, 5, 4, 5],
    "long segment": [-1, 1, 0, *[2] * 37],
    "two long segments": [*[0] * 40, *[1] * 33],
}


def _pools(in_features: int, widths: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.randn(NUM_PAGES, len(widths), PAGE_RANK, in_features) / in_features**0.5
    return a.to(dtype), torch.randn(NUM_PAGES, PAGE_RANK, sum(widths)).to(dtype)


def _segments(slots: list[int], device: str = "cpu") -> LoRASegments:
    segments = LoRASegments.build(np.array(slots, dtype=np.int32), PAGES, device)
    assert segments is not None
    return segments


def _shrink_truth(x: torch.Tensor, a: torch.Tensor, slots: list[int]) -> torch.Tensor:
    max_pages = max(len(PAGES[slot]) for slot in slots if slot >= 0)
    h = torch.zeros(len(slots), a.shape[1], max_pages * PAGE_RANK, dtype=torch.float64)
    for row, slot in enumerate(slots):
        for place, page in enumerate(PAGES[slot] if slot >= 0 else []):
            h[row, :, place * PAGE_RANK : (place + 1) * PAGE_RANK] = a[page].double() @ x[row].double()
    return h


def _expand_truth(
    h: torch.Tensor, b: torch.Tensor, slots: list[int], y: torch.Tensor, widths: tuple[int, ...]
) -> torch.Tensor:
    y = y.double()
    for row, slot in enumerate(slots):
        for place, page in enumerate(PAGES[slot] if slot >= 0 else []):
            ranks = h[row, :, place * PAGE_RANK : (place + 1) * PAGE_RANK].double()
            parts = zip(ranks, b[page].double().split_with_sizes(widths, 1), strict=True)
            y[row] += torch.cat([rank @ part for rank, part in parts])
    return y


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-1, 5), min_size=1, max_size=60).filter(lambda slots: max(slots) >= 0), st.sampled_from(WIDTHS)
)
def test_plain_path_equals_a_product_a_row(slots: list[int], widths: tuple[int, ...]) -> None:
    a, b = _pools(64, widths, torch.float32)
    x, y = torch.randn(len(slots), 64), torch.randn(len(slots), sum(widths))
    segments = _segments(slots)
    h = sgmv_shrink(x, a, segments)
    torch.testing.assert_close(h.double(), _shrink_truth(x, a, slots), atol=1e-5, rtol=1e-5)
    truth = _expand_truth(h, b, slots, y, widths)
    sgmv_expand(h, b, segments, y, widths)
    torch.testing.assert_close(y.double(), truth, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("slots", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_shrink_kernel_is_as_exact_as_the_plain_path(slots: list[int], dtype: torch.dtype, device: str) -> None:
    from lora_kernels.triton_sgmv import sgmv_shrink_triton

    a, _ = _pools(88, (8, 8), dtype)
    x = torch.randn(len(slots), 88).to(dtype)
    h = sgmv_shrink_triton(x.to(device), a.to(device), _segments(slots, device))
    assert_as_exact(h, sgmv_shrink_ref(x, a, _segments(slots)), _shrink_truth(x, a, slots))


@pytest.mark.parametrize(
    ("slots", "widths"), list(zip(LAYOUTS.values(), WIDTHS + WIDTHS, strict=False)), ids=LAYOUTS.keys()
)
def test_expand_kernel_is_as_exact_as_the_plain_path(
    slots: list[int], widths: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    from lora_kernels.triton_sgmv import sgmv_expand_triton

    a, b = _pools(64, widths, dtype)
    h = sgmv_shrink_ref(torch.randn(len(slots), 64).to(dtype), a, _segments(slots))
    before = torch.randn(len(slots), sum(widths)).to(dtype)
    plain, y = before.clone(), before.to(device, copy=True)
    sgmv_expand_ref(h, b, _segments(slots), plain, widths)
    sgmv_expand_triton(h.to(device), b.to(device), _segments(slots, device), y, widths)
    assert_as_exact(y, plain, _expand_truth(h, b, slots, before, widths))
    base = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(y.cpu()[base], before[base])


@settings(max_examples=8, deadline=None)
@given(slots=SLOTS)
def test_kernels_equal_a_product_a_row_on_any_layout(slots: list[int], device: str) -> None:
    from lora_kernels.triton_sgmv import sgmv_expand_triton, sgmv_shrink_triton

    widths = (20, 12)
    a, b = _pools(32, widths, torch.float32)
    x, y = torch.randn(len(slots), 32), torch.randn(len(slots), sum(widths))
    segments = _segments(slots, device)
    h = sgmv_shrink_triton(x.to(device), a.to(device), segments)
    out = y.to(device, copy=True)
    sgmv_expand_triton(h, b.to(device), segments, out, widths)
    truth = _expand_truth(_shrink_truth(x, a, slots), b, slots, y, widths)
    torch.testing.assert_close(out.cpu().double(), truth, atol=1e-4, rtol=1e-5)


def test_rows_of_a_bare_base_stay_as_they_were_in_the_plain_path() -> None:
    slots = [0, -1, 2, -1]
    a, b = _pools(64, (24,), torch.float32)
    x, y = torch.randn(4, 64), torch.randn(4, 24)
    before = y.clone()
    sgmv_expand_ref(sgmv_shrink_ref(x, a, _segments(slots)), b, _segments(slots), y, (24,))
    assert torch.equal(y[[1, 3]], before[[1, 3]])
    assert not torch.equal(y[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize(("slot", "rows"), [(2, [0]), (0, [1, 4])], ids=["one row", "two rows"])
def test_an_adapters_rows_do_not_depend_on_other_adapters_rows(slot: int, rows: list[int], device: str) -> None:
    from lora_kernels.triton_sgmv import sgmv_shrink_triton

    a, _ = _pools(64, (8,), torch.float32)
    x = torch.randn(5, 64)
    mixed = sgmv_shrink_triton(x.to(device), a.to(device), _segments([2, 0, -1, 1, 0], device))
    alone = sgmv_shrink_triton(x[rows].to(device), a.to(device), _segments([slot] * len(rows), device))
    assert torch.equal(mixed[rows, :, : alone.shape[2]], alone)


def test_a_routing_padded_to_fixed_sizes_is_the_same_routing(device: str) -> None:
    from lora_kernels.triton_sgmv import sgmv_expand_triton, sgmv_shrink_triton

    slots, widths = [2, 0, -1, 0, 1], (40, 16)
    a, b = (pool.to(device) for pool in _pools(64, widths, torch.float32))
    x, y = torch.randn(5, 64).to(device), torch.randn(5, sum(widths)).to(device)
    built = _segments(slots, device)
    order, chunks = chunk_tables(np.array(slots, dtype=np.int32), PAGES)
    assert torch.equal(built.chunks.cpu(), torch.from_numpy(chunks))
    spare = np.zeros((5, chunks.shape[1] + 2), dtype=np.int32)
    spare[: len(chunks), : chunks.shape[1]] = chunks
    padded = np.concatenate([order, np.zeros(5 - len(order), np.int32)])
    fixed = LoRASegments.fixed(torch.from_numpy(padded).to(device), torch.from_numpy(spare).to(device))
    results = []
    for segments in (built, fixed):
        results.append(y.clone())
        sgmv_expand_triton(sgmv_shrink_triton(x, a, segments), b, segments, results[-1], widths)
    assert torch.equal(*results)
