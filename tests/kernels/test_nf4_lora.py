from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels.nf4 import NF4Tiles, blocks_of, nf4_matmul_ref, quantize_nf4, unpack_nf4_ref
from lora_kernels.nf4_lora import (
    hides_shrink,
    most_fused_pages,
    nf4_lora_matmul,
    nf4_lora_matmul_ref,
    page_limits,
)
from lora_kernels.segments import PAGE_RANK, LoRASegments, Routing, order_capacity
from tests.kernels.error_rule import assert_as_exact
from tests.kernels.pages import NUM_PAGES, PAGES, zero_beyond_rank


def _weight(out_features: int, in_features: int, device: str = "cpu") -> NF4Tiles:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(out_features)) * 0.05
    tiles = NF4Tiles.of(*blocks_of(quantize_nf4(weight)))
    return NF4Tiles(tiles.tiles.to(device), tiles.scales.to(device), tiles.shape)


def _pools(in_features: int, widths: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.randn(NUM_PAGES, len(widths), PAGE_RANK, in_features) / in_features**0.5
    b = torch.randn(NUM_PAGES, PAGE_RANK, sum(widths)) * 0.5
    return zero_beyond_rank(a, 1).to(dtype), zero_beyond_rank(b, 0).to(dtype)


def _in_bytes(
    a: torch.Tensor, b: torch.Tensor, widths: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pools in 8 bits and their scales."""
    a_scales = a.abs().amax(-1).float() / 127
    parts = b.float().split(widths, 2)
    b_scales = torch.stack([part.abs().amax(-1) for part in parts], 1) / 127
    whole = [part / b_scales[:, i, :, None].clamp(min=1e-9) for i, part in enumerate(parts)]
    a = (a.float() / a_scales[..., None].clamp(min=1e-9)).round().to(torch.int8)
    return a, torch.cat(whole, 2).round().to(torch.int8), a_scales, b_scales


def _out_of_bytes(
    a: torch.Tensor, b: torch.Tensor, a_scales: torch.Tensor, b_scales: torch.Tensor, widths: tuple[int, ...]
) -> list[torch.Tensor]:
    """The numbers that pools in 8 bits stand for."""
    parts = [part.double() * b_scales[:, i, :, None].double() for i, part in enumerate(b.split(widths, 2))]
    return [a.double() * a_scales.double()[..., None], torch.cat(parts, 2)]


def _segments(slots: list[int], device: str) -> LoRASegments:
    segments = LoRASegments.build(np.array(slots, np.int32), PAGES, device)
    assert segments is not None
    return segments


def _truth(
    x: torch.Tensor, weight: NF4Tiles, a: torch.Tensor, b: torch.Tensor, slots: list[int], widths: tuple[int, ...]
) -> torch.Tensor:
    y = x.double() @ unpack_nf4_ref(*weight.blocks(), torch.float32).double().T
    for slot in set(slots) - {-1}:
        rows = [row for row, other in enumerate(slots) if other == slot]
        for page in PAGES[slot].ids:
            h = (x[rows].double() @ a[page].double().transpose(1, 2)).unbind(0)
            parts = zip(h, b[page].double().split(widths, 1), strict=True)
            y[rows] += torch.cat([own @ part for own, part in parts], 1)
    return y.cpu()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-1, 6), min_size=1, max_size=40).filter(lambda slots: max(slots) >= 0))
def test_the_plain_path_equals_a_product_a_row(slots: list[int]) -> None:
    widths, weight = (40, 24), _weight(64, 128)
    a, b = _pools(128, widths, torch.float32)
    x = torch.randn(len(slots), 128)
    y = nf4_lora_matmul(x, weight, None, a, b, _segments(slots, "cpu"), widths)
    torch.testing.assert_close(y.double(), _truth(x, weight, a, b, slots, widths), atol=1e-4, rtol=1e-5)


def test_what_is_done_beside_the_base_depends_on_how_much_it_is() -> None:
    assert 0 < most_fused_pages(8) < most_fused_pages(16) < most_fused_pages(64)
    assert 0 < most_fused_pages(2048) < most_fused_pages(64)
    assert hides_shrink(64, 64, 28672, 2)
    assert hides_shrink(64, 64, 6144, 3)
    assert not hides_shrink(64, 64, 3072, 3)
    assert not hides_shrink(64, 128, 6144, 3)
    assert hides_shrink(64, 128, 4096, 1)
    assert hides_shrink(256, 128, 6144, 3)
    assert not hides_shrink(256, 129, 28672, 2)
    assert not hides_shrink(1024, 1, 28672, 2)
    assert not hides_shrink(16, 1, 28672, 2)


@pytest.mark.parametrize(
    ("num_tokens", "most_pages", "limits"),
    [
        (1, 1, [1]),
        (8, 128, [4, 128]),
        (16, 256, [8, 256]),
        (24, 24, [16, 24]),
        (24, 96, [16, 24, 96]),
        (64, 64, [16, 64]),
        (64, 256, [16, 64, 128, 256]),
        (96, 256, [16, 64, 96, 128, 256]),
        (128, 128, [16, 64, 128]),
        (256, 256, [16, 64, 128, 256]),
        (384, 384, [16, 384]),
        (2048, 99, [8, 99]),
    ],
)
def test_steps_run_alike_up_to_few_some_and_all_pages(num_tokens: int, most_pages: int, limits: list[int]) -> None:
    assert page_limits(num_tokens, most_pages) == limits


LAYOUTS = {
    "one adapter": lambda rows: [0] * rows,
    "one of rank 64, and base rows": lambda rows: [2 if row % 3 else -1 for row in range(rows)],
    "rank 256": lambda rows: [6] * rows,
    "mixed ranks": lambda rows: [(-1, 0, 1, 2, 3, 4, 5)[row * 5 % 7] for row in range(rows)],
    "one row": lambda rows: [-1] * (rows - 1) + [1],
}
FEW_PAGES_LAYOUTS = {
    "one adapter": LAYOUTS["one adapter"],
    "one of rank 64, and base rows": lambda rows: [-1 if row % 3 == 1 else 2 for row in range(rows)],
    "three adapters": lambda rows: [(0, -1, 1, 3)[row * 3 % 4] for row in range(rows)],
    "one row": LAYOUTS["one row"],
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(
    ("way", "num_tokens"),
    [*(("columns", rows) for rows in (17, 64, 130, 512, 600)), *(("planes", rows) for rows in (17, 64, 300))],
)
@pytest.mark.parametrize(
    ("widths", "in_features"), [((256, 64, 64), 4096), ((320,), 512), ((1000,), 1024), ((128, 192), 896)], ids=str
)
def test_a_shrink_beside_the_base_is_as_exact_as_the_plain_path_and_gives_equal_bits(
    widths: tuple[int, ...], in_features: int, way: str, num_tokens: int, layout: Callable[[int], list[int]],
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from lora_kernels import cuda_nf4_lora

    monkeypatch.setattr(cuda_nf4_lora, "most_fused_pages", lambda _: 16 if way == "columns" else 0)
    monkeypatch.setattr(cuda_nf4_lora, "hides_shrink", lambda *_: way == "planes")
    torch.manual_seed(0)
    slots, weight = layout(num_tokens), _weight(sum(widths), in_features, "cuda")
    a, b = (pool.cuda() for pool in _pools(in_features, widths, dtype))
    x, bias = torch.randn(num_tokens, in_features).to(dtype).cuda(), torch.randn(sum(widths)).to(dtype).cuda()
    results = [
        cuda_nf4_lora.nf4_lora_matmul_cuda(x, weight, bias, a, b, _segments(slots, "cuda"), widths) for _ in range(4)
    ]
    y, *again = (result for result in results if result is not None)
    plain = nf4_lora_matmul_ref(x.cpu(), _weight(sum(widths), in_features), bias.cpu(), a.cpu(), b.cpu(),
                                _segments(slots, "cpu"), widths)  # fmt: skip
    assert_as_exact(y, plain, _truth(x, weight, a, b, slots, widths) + bias.double().cpu())
    assert len(again) == 3
    assert all(torch.equal(result, y) for result in again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("layout", FEW_PAGES_LAYOUTS.values(), ids=FEW_PAGES_LAYOUTS.keys())
@pytest.mark.parametrize("num_tokens", [1, 5, 8, 9, 16])
@pytest.mark.parametrize("in_bytes", [False, True], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize(
    ("widths", "in_features"), [((256, 64, 64), 4096), ((320,), 14336), ((1000,), 1024), ((128, 192), 896)], ids=str
)
def test_few_pages_of_few_rows_are_as_exact_as_the_plain_path_and_give_equal_bits(
    widths: tuple[int, ...], in_features: int, in_bytes: bool, num_tokens: int, layout: Callable[[int], list[int]],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    from lora_kernels.cuda_nf4 import fused_plan
    from lora_kernels.cuda_nf4_lora import nf4_lora_matmul_cuda
    from lora_kernels.nf4_plans import WidePlan

    torch.manual_seed(0)
    slots, weight = layout(num_tokens), _weight(sum(widths), in_features, "cuda")
    pools: tuple[torch.Tensor, ...] = _pools(in_features, widths, torch.float32 if in_bytes else dtype)
    exact = [pool.double() for pool in pools]
    if in_bytes:
        pools = _in_bytes(pools[0], pools[1], widths)
        exact = _out_of_bytes(*pools, widths)
    a, b, *scales = (pool.cuda() for pool in pools)
    x, bias = torch.randn(num_tokens, in_features).to(dtype).cuda(), torch.randn(sum(widths)).to(dtype).cuda()
    fused = nf4_lora_matmul_cuda(x, weight, bias, a, b, _segments(slots, "cuda"), widths, *scales)
    y, *again = [nf4_lora_matmul(x, weight, bias, a, b, _segments(slots, "cuda"), widths, *scales) for _ in range(4)]
    if in_bytes and isinstance(fused_plan(x, weight), WidePlan):
        assert fused is None  # columns are 16 bits
    else:
        assert fused is not None
        assert torch.equal(fused, y)
    plain = nf4_lora_matmul_ref(x.cpu(), _weight(sum(widths), in_features), bias.cpu(), pools[0], pools[1],
                                _segments(slots, "cpu"), widths, *pools[2:])  # fmt: skip
    exact_a, exact_b = (pool.cuda() for pool in exact)
    assert_as_exact(y, plain, _truth(x, weight, exact_a, exact_b, slots, widths) + bias.double().cpu())
    assert all(torch.equal(result, y) for result in again)


@pytest.mark.gpu
@pytest.mark.parametrize("in_bytes", [False, True], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize(
    ("widths", "in_features"),
    [
        ((1024, 256, 256), 4096),  # more stages of work than thread blocks: these share tiles
        ((101,), 192),  # one warp multiplies; in 8 bits some parts of the inputs are empty
    ],
    ids=str,
)
def test_few_rows_of_a_wider_matrix_are_as_exact_as_the_plain_path_however_their_work_is_cut(
    widths: tuple[int, ...], in_features: int, in_bytes: bool
) -> None:
    from lora_kernels.cuda_nf4_lora import nf4_lora_matmul_cuda

    torch.manual_seed(0)
    slots, weight = [0, -1, 1, 3, 1, 0, -1], _weight(sum(widths), in_features, "cuda")
    pools: tuple[torch.Tensor, ...] = _pools(in_features, widths, torch.float32 if in_bytes else torch.bfloat16)
    exact = [pool.double() for pool in pools]
    if in_bytes:
        pools = _in_bytes(pools[0], pools[1], widths)
        exact = _out_of_bytes(*pools, widths)
    a, b, *scales = (pool.cuda() for pool in pools)
    x = torch.randn(len(slots), in_features + 64).bfloat16().cuda()[:, :in_features]
    y, *again = (
        nf4_lora_matmul_cuda(x, weight, None, a, b, _segments(slots, "cuda"), widths, *scales) for _ in range(4)
    )
    assert y is not None
    assert all(result is not None and torch.equal(result, y) for result in again)
    plain = nf4_lora_matmul_ref(x.cpu(), _weight(sum(widths), in_features), None, pools[0], pools[1],
                                _segments(slots, "cpu"), widths, *pools[2:])  # fmt: skip
    exact_a, exact_b = (pool.cuda() for pool in exact)
    assert_as_exact(y, plain, _truth(x, weight, exact_a, exact_b, slots, widths))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("slots", "widths"),
    [
        ([2, 0, -1], (320,)),  # five pages
        ([0, -1, 1], (12_800,)),  # more tiles than multiprocessors
        ([6] * 12, (320,)),  # sixteen pages of more than eight rows
    ],
    ids=["pages", "tiles", "pages as columns"],
)
def test_what_few_rows_cannot_take_along_is_added_behind_the_base(slots: list[int], widths: tuple[int, ...]) -> None:
    from lora_kernels.cuda_nf4_lora import nf4_lora_matmul_cuda

    torch.manual_seed(0)
    weight, (a, b) = _weight(sum(widths), 64, "cuda"), (pool.cuda() for pool in _pools(64, widths, torch.bfloat16))
    x, segments = torch.randn(len(slots), 64).bfloat16().cuda(), _segments(slots, "cuda")
    assert nf4_lora_matmul_cuda(x, weight, None, a, b, segments, widths) is None
    plain = nf4_lora_matmul_ref(x, weight, None, a, b, segments, widths)
    y = nf4_lora_matmul(x, weight, None, a, b, segments, widths)
    assert_as_exact(y, plain, _truth(x, weight, a, b, slots, widths))


@pytest.mark.gpu
def test_launches_of_few_rows_are_told_apart_when_their_number_starts_again() -> None:
    from lora_kernels.cuda_nf4_lora import _few_scratch, nf4_lora_matmul_cuda

    torch.manual_seed(0)
    widths, weight = (256, 64), _weight(320, 1024, "cuda")
    a, b = (pool.cuda() for pool in _pools(1024, widths, torch.bfloat16))
    sums, launches = _few_scratch(a.device)

    def run(x: torch.Tensor) -> torch.Tensor:
        y = nf4_lora_matmul_cuda(x, weight, None, a, b, _segments([0, 1, -1, 3], "cuda"), widths)
        assert y is not None
        return y

    inputs = torch.randn(4, 4, 1024).bfloat16().cuda().unbind()
    wanted = [run(x) for x in inputs]
    sums.zero_()  # else what the first launches left would be taken for what the next ones do
    launches[0] = 2**31 - 2
    assert all(torch.equal(run(x), y) for x, y in zip(inputs, wanted, strict=True))
    assert 0 < launches[0] < 4
    assert launches[1] == 0


@pytest.mark.gpu
def test_layers_that_follow_each_other_in_a_graph_give_the_bits_of_each_by_itself() -> None:
    """A kernel begins before the one ahead ends, whose result is its x; all of them leave sums in one place."""
    from lora_kernels.cuda_nf4_lora import nf4_lora_matmul_cuda
    from lora_kernels.segments import fixed_size

    torch.manual_seed(0)
    shapes = [((256, 64, 64), 320), ((320,), 384)] * 6
    weights = {widths: _weight(sum(widths), in_features, "cuda") for widths, in_features in shapes}
    pools = {widths: [pool.cuda() for pool in _pools(inner, widths, torch.bfloat16)] for widths, inner in shapes}
    packed = torch.zeros(fixed_size(8, 4), dtype=torch.int32, device="cuda")
    segments = LoRASegments.fixed(packed, 8, 8, max_pages=4, most_pages=4)
    x = torch.randn(8, 320).bfloat16().cuda()

    def run(is_alone: bool) -> torch.Tensor:
        y = x
        for widths, _ in shapes:
            fused = nf4_lora_matmul_cuda(y, weights[widths], None, *pools[widths], segments, widths)
            assert fused is not None
            y = fused
            if is_alone:
                torch.cuda.synchronize()
        return y

    run(is_alone=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(is_alone=False)
    for slots in ([0, -1, 1, 3] * 2, [2] * 8, [-1] * 7 + [5], [1, 1, 4, 3, -1, -1, 3, 1]) * 3:
        filled = Routing.of(np.array(slots, np.int32), 8, PAGES).packed(order_capacity(8))
        packed[: len(filled)] = torch.from_numpy(filled).cuda()
        wanted = run(is_alone=True)
        assert wanted.isfinite().all()
        graph.replay()
        assert torch.equal(y, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("num_tokens", [17, 64, 300])
@pytest.mark.parametrize(("widths", "in_features"), [((256, 64, 64), 4096), ((320,), 512), ((128, 192), 896)], ids=str)
def test_pages_in_8_bits_beside_the_base_are_as_exact_as_the_plain_path_and_give_equal_bits(
    widths: tuple[int, ...], in_features: int, num_tokens: int, layout: Callable[[int], list[int]], dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from lora_kernels import cuda_nf4_lora

    monkeypatch.setattr(cuda_nf4_lora, "hides_shrink", lambda *_: True)
    torch.manual_seed(0)
    slots, weight = layout(num_tokens), _weight(sum(widths), in_features, "cuda")
    pools = _in_bytes(*_pools(in_features, widths, torch.float32), widths)
    a, b, *scales = (pool.cuda() for pool in pools)
    x = torch.randn(num_tokens, in_features).to(dtype).cuda()
    results = [
        cuda_nf4_lora.nf4_lora_matmul_cuda(x, weight, None, a, b, _segments(slots, "cuda"), widths, *scales)
        for _ in range(4)
    ]
    y, *again = (result for result in results if result is not None)
    on_cpu = [pool.cpu() for pool in pools]
    plain = nf4_lora_matmul_ref(x.cpu(), _weight(sum(widths), in_features), None, *on_cpu[:2],
                                _segments(slots, "cpu"), widths, *on_cpu[2:])  # fmt: skip
    exact_a, exact_b = (pool.cuda() for pool in _out_of_bytes(*pools, widths))
    assert_as_exact(y, plain, _truth(x, weight, exact_a, exact_b, slots, widths))
    assert len(again) == 3
    assert all(torch.equal(result, y) for result in again)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [6, 12, 64])
def test_rows_do_not_depend_on_the_adapters_of_others(rows: int) -> None:
    torch.manual_seed(0)
    widths, weight = (256, 64), _weight(320, 1024, "cuda")
    a, b = (pool.cuda() for pool in _pools(1024, widths, torch.bfloat16))
    x = torch.randn(rows, 1024).bfloat16().cuda()
    slots = [(0, 3, -1)[row % 3] for row in range(rows)]
    before = nf4_lora_matmul(x, weight, None, a, b, _segments(slots, "cuda"), widths)
    a[PAGES[3].ids[0]] = float("nan")
    b[PAGES[3].ids[0]] *= 1e4
    after = nf4_lora_matmul(x, weight, None, a, b, _segments(slots, "cuda"), widths)
    others = [row for row, slot in enumerate(slots) if slot != 3]
    assert torch.equal(after[others], before[others])
    assert after[[row for row, slot in enumerate(slots) if slot == 3]].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "steps", "in_bytes"),
    [
        (4, ([2] * 4, [0, -1] * 2, [0, 1, 3, 0]), False),
        (4, ([2] * 4, [0, -1] * 2, [0, 1, 3, 0]), True),
        (12, ([2] * 12, [0, -1] * 6, [1, 3, 4, 5] * 3), False),
        (48, ([6] * 48, [0, -1] * 24, [1, 2, 3, 4] * 12), False),
    ],
)
def test_a_recorded_step_takes_any_few_pages(rows: int, steps: tuple[list[int], ...], in_bytes: bool) -> None:
    from lora_kernels.cuda_nf4_lora import nf4_lora_matmul_cuda
    from lora_kernels.segments import fixed_size

    torch.manual_seed(0)
    widths, weight = (256, 64), _weight(320, 1024, "cuda")
    pools: tuple[torch.Tensor, ...] = _pools(1024, widths, torch.float32 if in_bytes else torch.bfloat16)
    exact = [pool.cuda() for pool in pools]
    if in_bytes:
        pools = _in_bytes(pools[0], pools[1], widths)
        exact = [pool.cuda() for pool in _out_of_bytes(*pools, widths)]
    a, b, *scales = (pool.cuda() for pool in pools)
    x = torch.randn(rows, 1024).bfloat16().cuda()
    packed = torch.zeros(fixed_size(64, 16), dtype=torch.int32, device="cuda")

    def fill(slots: list[int]) -> None:
        filled = Routing.of(np.array(slots, np.int32), rows, PAGES).packed(order_capacity(64))
        packed[: len(filled)] = torch.from_numpy(filled).cuda()

    def run() -> torch.Tensor | None:
        segments = LoRASegments.fixed(packed, rows, 64, max_pages=16, most_pages=most_fused_pages(rows))
        return nf4_lora_matmul_cuda(x, weight, None, a, b, segments, widths, *scales)

    fill([0] * rows)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    assert y is not None
    for slots in steps:
        fill(slots)
        graph.replay()
        plain = nf4_lora_matmul_ref(x, weight, None, a, b, _segments(slots, "cuda"), widths, *scales)
        assert_as_exact(y, plain, _truth(x, weight, exact[0], exact[1], slots, widths))
    fill([-1] * rows)
    graph.replay()
    assert_as_exact(y, nf4_matmul_ref(x, weight, None), _truth(x, weight, exact[0], exact[1], [-1] * rows, widths))
