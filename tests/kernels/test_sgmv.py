from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels.segments import PAGE_RANK, SHORT_STEP, LoRASegments, Routing, fixed_size, order_capacity
from lora_kernels.sgmv import Activation, sgmv_expand, sgmv_expand_ref, sgmv_shrink, sgmv_shrink_ref
from tests.kernels.error_rule import assert_as_exact
from tests.kernels.pages import NUM_PAGES, PAGES, zero_beyond_rank

WIDTHS = [(24,), (40, 16), (33, 8, 8)]
SLOTS = st.lists(st.integers(-1, 5), min_size=1, max_size=60).filter(lambda slots: max(slots) >= 0)

LAYOUTS = {
    "one row": [0],
    "mixed ranks and base rows": [2, -1, 0, 0, 1, -1, 2, 3],
    "run of pages": [4, 5, 4, 5],
    "in order": [4, 4, 5, 5],
    "rank 256": [6, 3, 6],
    "long segment": [-1, 1, 0, *[2] * 37],
    "two long segments": [*[0] * 40, *[1] * 33],
    "long step": [*[0] * 330, *[1] * 180, -1, 2, 2, 5],
}


def _pools(in_features: int, widths: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.randn(NUM_PAGES, len(widths), PAGE_RANK, in_features) / in_features**0.5
    b = torch.randn(NUM_PAGES, PAGE_RANK, sum(widths))
    return zero_beyond_rank(a, 1).to(dtype), zero_beyond_rank(b, 0).to(dtype)


def _segments(slots: list[int], device: str = "cpu") -> LoRASegments:
    segments = LoRASegments.build(np.array(slots, dtype=np.int32), PAGES, device)
    assert segments is not None
    return segments


def _ranks(slot: int) -> int:
    """Places that h has for a row."""
    return len(PAGES[slot]) * PAGE_RANK if slot >= 0 else 0


def _whole(h: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """h without planes, and with zeros where it is undefined."""
    h = h.cpu().sum(0)
    for row, slot in enumerate(slots):
        h[row, :, _ranks(slot) :] = 0
    return h


def _shrink_truth(x: torch.Tensor, a: torch.Tensor, slots: list[int]) -> torch.Tensor:
    max_pages = max(len(PAGES[slot]) for slot in slots if slot >= 0)
    h = torch.zeros(len(slots), a.shape[1], max_pages * PAGE_RANK, dtype=torch.float64)
    for row, slot in enumerate(slots):
        for place, page in enumerate(PAGES[slot].ids if slot >= 0 else []):
            h[row, :, place * PAGE_RANK : (place + 1) * PAGE_RANK] = a[page].double() @ x[row].double()
    return h


def _expand_truth(
    h: torch.Tensor, b: torch.Tensor, slots: list[int], y: torch.Tensor, widths: tuple[int, ...]
) -> torch.Tensor:
    """h: [num_tokens, num_slices, ranks], without planes."""
    y = y.double()
    for row, slot in enumerate(slots):
        for place, page in enumerate(PAGES[slot].ids if slot >= 0 else []):
            ranks = h[row, :, place * PAGE_RANK : (place + 1) * PAGE_RANK].double()
            parts = zip(ranks, b[page].double().split_with_sizes(widths, 1), strict=True)
            y[row] += torch.cat([rank @ part for rank, part in parts])
    return y


@settings(max_examples=60, deadline=None)
@given(SLOTS, st.sampled_from(WIDTHS))
def test_plain_path_equals_a_product_a_row(slots: list[int], widths: tuple[int, ...]) -> None:
    a, b = _pools(64, widths, torch.float32)
    x, y = torch.randn(len(slots), 64), torch.randn(len(slots), sum(widths))
    segments = _segments(slots)
    h = sgmv_shrink(x, a, segments)
    torch.testing.assert_close(_whole(h, slots).double(), _shrink_truth(x, a, slots), atol=1e-5, rtol=1e-5)
    truth = _expand_truth(_whole(h, slots), b, slots, y, widths)
    sgmv_expand(h, b, segments, y, widths)
    torch.testing.assert_close(y.double(), truth, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("in_features", [88, 1024], ids=["odd inputs", "several planes"])
@pytest.mark.parametrize("slots", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_shrink_kernel_is_as_exact_as_the_plain_path(
    slots: list[int], in_features: int, dtype: torch.dtype, device: str
) -> None:
    from lora_kernels.triton_shrink import sgmv_shrink_triton

    a, _ = _pools(in_features, (8, 8), dtype)
    x = torch.randn(len(slots), in_features).to(dtype)
    h = sgmv_shrink_triton(x.to(device), a.to(device), _segments(slots, device))
    plain = sgmv_shrink_ref(x, a, _segments(slots))
    assert_as_exact(_whole(h, slots), _whole(plain, slots), _shrink_truth(x, a, slots))


@pytest.mark.parametrize(
    ("slots", "widths"),
    list(zip(LAYOUTS.values(), WIDTHS * 2 + [(1024, 256), (40, 16)], strict=True)),
    ids=LAYOUTS.keys(),
)
def test_expand_kernel_is_as_exact_as_the_plain_path(
    slots: list[int], widths: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    from lora_kernels.triton_expand import sgmv_expand_triton

    a, b = _pools(64, widths, dtype)
    h = sgmv_shrink_ref(torch.randn(len(slots), 64).to(dtype), a, _segments(slots))
    h = torch.cat([0.25 * h, 0.75 * h])
    before = torch.randn(len(slots), sum(widths)).to(dtype)
    plain, y = before.clone(), before.to(device, copy=True)
    sgmv_expand_ref(h, b, _segments(slots), plain, widths)
    truth = _expand_truth(h.sum(0), b, slots, before, widths)
    for row, slot in enumerate(slots):
        h[:, row, :, _ranks(slot) :] = torch.nan  # a shrink may leave anything there
    sgmv_expand_triton(h.to(device), b.to(device), _segments(slots, device), y, widths)
    assert_as_exact(y, plain, truth)
    base = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(y.cpu()[base], before[base])


@pytest.mark.parametrize("slots", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_columns_are_the_rounded_shrink_at_the_places_of_a_row_s_own_pages(
    slots: list[int], dtype: torch.dtype, device: str
) -> None:
    from lora_kernels.triton_shrink import sgmv_shrink_to_columns, sgmv_shrink_triton

    if device == "cpu" and dtype == torch.float32:
        pytest.skip("the interpreter is slow, and fp32 is not rounded")
    a = _pools(600, (8, 8), dtype)[0].to(device)
    x, segments = torch.randn(len(slots), 600).to(dtype).to(device), _segments(slots, device)
    columns = segments.columns(2, dtype)
    sgmv_shrink_to_columns(x, a, segments, columns)
    h = _whole(sgmv_shrink_triton(x, a, segments), slots).to(dtype)
    wanted = torch.zeros_like(columns, device="cpu")
    page_ids = Routing.of(np.array(slots, np.int32), len(slots), PAGES).page_ids.tolist()
    for row, slot in enumerate(slots):
        for nth, page in enumerate(PAGES[slot].ids if slot >= 0 else []):
            place = page_ids.index(page) * PAGE_RANK
            wanted[row, :, place : place + PAGE_RANK] = h[row, :, nth * PAGE_RANK : (nth + 1) * PAGE_RANK]
    assert torch.equal(columns.cpu(), wanted)


@settings(max_examples=8, deadline=None)
@given(slots=SLOTS)
def test_kernels_equal_a_product_a_row_on_any_layout(slots: list[int], device: str) -> None:
    from lora_kernels.triton_expand import sgmv_expand_triton
    from lora_kernels.triton_shrink import sgmv_shrink_triton

    widths = (20, 12)
    a, b = _pools(32, widths, torch.float32)
    x, y = torch.randn(len(slots), 32), torch.randn(len(slots), sum(widths))
    segments = _segments(slots, device)
    h = sgmv_shrink_triton(x.to(device), a.to(device), segments)
    out = y.to(device, copy=True)
    sgmv_expand_triton(h, b.to(device), segments, out, widths)
    truth = _expand_truth(_shrink_truth(x, a, slots), b, slots, y, widths)
    torch.testing.assert_close(out.cpu().double(), truth, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("slots", [LAYOUTS["mixed ranks and base rows"], LAYOUTS["long segment"], [1, 1, -1, 6, 6]])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_bottlenecks_and_pages_in_8_bits_are_as_exact_as_the_plain_path(
    slots: list[int], activation: Activation, device: str
) -> None:
    from lora_kernels.triton_expand import sgmv_expand_triton
    from lora_kernels.triton_shrink import sgmv_shrink_triton

    widths, dtype = (33, 8), torch.float16
    a, b = (torch.randint(-127, 128, pool.shape, dtype=torch.int8) for pool in _pools(64, widths, dtype))
    scales = [torch.rand(NUM_PAGES, 2, PAGE_RANK) / 500 for _ in range(2)]
    bias = torch.randn(NUM_PAGES, 2, PAGE_RANK)
    for tensor, dim in ((a, 1), (b, 0), (scales[0], 1), (scales[1], 1), (bias, 1)):
        zero_beyond_rank(tensor, dim)
    unused = sorted(set(range(NUM_PAGES)).difference(*(pages.ids for pages in PAGES.values())))
    for tensor in (*scales, bias):
        tensor[unused] = torch.nan  # whatever was there before
    x, before = torch.randn(len(slots), 64).to(dtype), torch.randn(len(slots), sum(widths)).to(dtype)
    plain, y = before.clone(), before.to(device, copy=True)
    h = sgmv_shrink_ref(x, a, _segments(slots), scales[0])
    sgmv_expand_ref(h, b, _segments(slots), plain, widths, scales[1], bias, activation)
    on_device = [tensor.to(device) for tensor in (x, a, b, bias, *scales)]
    segments = _segments(slots, device)
    h = sgmv_shrink_triton(on_device[0], on_device[1], segments, on_device[4])
    sgmv_expand_triton(h, on_device[2], segments, y, widths, on_device[5], on_device[3], activation)
    assert_as_exact(y, plain, _bottleneck_truth(x, a, b, bias, scales, slots, before, widths, activation))


def _bottleneck_truth(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor,
    scales: list[torch.Tensor],
    slots: list[int],
    y: torch.Tensor,
    widths: tuple[int, ...],
    activation: Activation,
) -> torch.Tensor:
    h = _shrink_truth(x, a.double() * scales[0].double()[..., None], slots)
    functions = {"none": lambda h: h, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
    for row, slot in enumerate(slots):
        for place, page in enumerate(PAGES[slot].ids if slot >= 0 else []):
            own = h[row, :, place * PAGE_RANK : (place + 1) * PAGE_RANK]
            own[:] = functions[activation](own + bias[page].double()) * scales[1][page].double()
    return _expand_truth(h, b, slots, y, widths)


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
    from lora_kernels.triton_shrink import sgmv_shrink_triton

    a, _ = _pools(64, (8,), torch.float32)
    x = torch.randn(5, 64)
    mixed = sgmv_shrink_triton(x.to(device), a.to(device), _segments([2, 0, -1, 1, 0], device))
    alone = sgmv_shrink_triton(x[rows].to(device), a.to(device), _segments([slot] * len(rows), device))
    assert torch.equal(mixed[:, rows, :, : _ranks(slot)], alone[..., : _ranks(slot)])


@pytest.mark.parametrize("slots", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_kernels_give_the_same_bits_in_every_run(slots: list[int], bits_dtype: torch.dtype, device: str) -> None:
    from lora_kernels.triton_expand import sgmv_expand_triton
    from lora_kernels.triton_shrink import sgmv_shrink_triton

    if device == "cpu" and len(slots) > SHORT_STEP:
        pytest.skip("the interpreter is slow, and runs programs one after the other")
    a, b = (pool.to(device) for pool in _pools(600, (40, 16), bits_dtype))
    x, y = (torch.randn(len(slots), width).to(device, bits_dtype) for width in (600, 56))
    results = [y.clone(), y.clone()]
    for out in results:
        segments = _segments(slots, device)
        sgmv_expand_triton(sgmv_shrink_triton(x, a, segments), b, segments, out, (40, 16))
    assert torch.equal(*results)


def test_a_routing_padded_to_fixed_sizes_is_the_same_routing(device: str) -> None:
    from lora_kernels.triton_expand import sgmv_expand_triton
    from lora_kernels.triton_shrink import sgmv_shrink_triton

    slots, widths = [2, 0, -1, 0, 1], (40, 16)
    a, b = (pool.to(device) for pool in _pools(64, widths, torch.float32))
    x, y = torch.randn(5, 64).to(device), torch.randn(5, sum(widths)).to(device)
    packed = torch.full((fixed_size(9, 6),), -1, dtype=torch.int32)
    filled = Routing.of(np.array(slots, dtype=np.int32), 5, PAGES).packed(order_capacity(9))
    packed[: len(filled)] = torch.from_numpy(filled)
    fixed = LoRASegments.fixed(packed.to(device), num_tokens=5, max_tokens=9, max_pages=6, most_pages=30)
    results = []
    for segments in (_segments(slots, device), fixed):
        results.append(y.clone())
        sgmv_expand_triton(sgmv_shrink_triton(x, a, segments), b, segments, results[-1], widths)
    assert torch.equal(*results)
