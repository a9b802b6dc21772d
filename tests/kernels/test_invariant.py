"""A row's bits depend on neither its mates nor its place, and a token's not on where it was computed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_kernels.attention import AttentionMetadata, paged_attention_ref
from lora_kernels.invariant import invariant_attention, invariant_matmul, invariant_nf4_matmul
from lora_kernels.layer_cache import LayerCache
from lora_kernels.nf4 import NF4Tiles, blocks_of, nf4_matmul_ref, quantize_nf4, unpack_nf4_ref
from lora_kernels.nf4_plans import WidePlan, invariant_plans
from lora_kernels.segments import PAGE_RANK, AdapterPages, LoRASegments
from lora_kernels.sgmv import sgmv_expand, sgmv_shrink
from tests.kernels.error_rule import assert_as_exact
from tests.kernels.pages import NUM_PAGES, PAGES, zero_beyond_rank
from tests.kernels.test_attention import CASES, Case, _inputs, _meta, _on, _truth, padded


@pytest.mark.parametrize(("num_tokens", "out_features", "in_features"), [(1, 40, 88), (70, 200, 64), (0, 8, 16)])
def test_the_product_is_as_exact_as_the_plain_path(
    num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype, device: str
) -> None:
    from lora_kernels.triton_invariant_matmul import invariant_matmul_triton

    x, bias = torch.randn(num_tokens, 2 * in_features).to(dtype)[:, in_features:], torch.randn(out_features).to(dtype)
    weight = (torch.randn(out_features, in_features) / in_features**0.5).to(dtype)
    y = invariant_matmul_triton(x.to(device), weight.to(device), bias.to(device))
    assert y.shape == (num_tokens, out_features)
    if num_tokens:
        truth = F.linear(x.double(), weight.double(), bias.double())
        assert_as_exact(y, F.linear(x, weight, bias), truth)


@settings(max_examples=10, deadline=None)
@given(rows=st.lists(st.integers(0, 99), min_size=1, max_size=99, unique=True))
def test_a_row_s_product_is_the_same_among_any_others(rows: list[int], device: str) -> None:
    from lora_kernels.triton_invariant_matmul import invariant_matmul_triton

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 96, generator=generator).to(device)
    weight = torch.randn(70, 96, generator=generator).to(device)
    assert torch.equal(invariant_matmul_triton(x[rows], weight, None), invariant_matmul_triton(x, weight, None)[rows])


def _attend(case: Case, q: torch.Tensor, cache: LayerCache, meta: AttentionMetadata) -> torch.Tensor:
    from lora_kernels.triton_invariant_attention import invariant_attention_triton

    return invariant_attention_triton(q, cache, meta, 0.3, case.window)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_is_as_exact_as_the_plain_path(case: Case, dtype: torch.dtype, device: str) -> None:
    q, cache, tables = _inputs(case, dtype)
    out = _attend(case, q.to(device), _on(device, cache), _meta(case, tables, device))
    plain = paged_attention_ref(q, cache, _meta(case, tables), 0.3, case.window)
    assert_as_exact(out, plain, _truth(q, cache, tables, case, 0.3))


@dataclass(frozen=True)
class Context:
    """One sequence's cache and the queries of all of its positions, and what each attends to when computed alone."""

    case: Case
    q: torch.Tensor
    cache: LayerCache
    table: list[int]
    alone: torch.Tensor

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, device: str) -> "Context":
        ((num_tokens, context),) = case.seqs
        q, cache, (table,) = _inputs(case, dtype)
        q, cache = q.to(device), _on(device, cache)
        positions = range(context - num_tokens, context)
        # As decode steps compute them, one after the other.
        rows = [
            cls.attend(case, q[row : row + 1], cache, [(1, position + 1)], [table])
            for row, position in enumerate(positions)
        ]
        return cls(case, q, cache, table, torch.cat(rows))

    @staticmethod
    def attend(
        case: Case, q: torch.Tensor, cache: LayerCache, seqs: list[tuple[int, int]], tables: list[list[int]]
    ) -> torch.Tensor:
        return _attend(case, q, cache, _meta(replace(case, seqs=seqs, prefix_lens=None), tables, str(q.device)))

    def chunk(self, first: int, last: int, mates: list[tuple[int, int]]) -> torch.Tensor:
        """Rows `first` to `last` as one chunk, between other sequences over the same blocks."""
        offset = self.case.seqs[0][1] - len(self.q)
        seqs = [*mates, (last - first, offset + last), *mates]
        before = sum(length for length, _ in mates)
        others = torch.randn(before, *self.q.shape[1:]).to(self.q)
        q = torch.cat([others, self.q[first:last], others])
        out = self.attend(self.case, q, self.cache, seqs, [self.table] * len(seqs))
        return out[before : before + last - first]


CONTEXTS = {
    "short": Case([(16, 70)], head_dim=24),
    "several pieces": Case([(8, 1030)], num_kv_heads=1, block_size=16),
    "window": Case([(16, 90)], num_heads=7, num_kv_heads=1, window=21),
    "window, several pieces": Case([(8, 1284)], num_kv_heads=1, block_size=16, window=700),
}


@pytest.mark.parametrize("name", CONTEXTS)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_a_token_attends_alike_in_any_chunk_and_among_any_others(
    name: str, bits_dtype: torch.dtype, device: str, data: st.DataObject
) -> None:
    context = _context(name, bits_dtype, device)
    num_tokens, most = context.case.seqs[0]
    first = data.draw(st.integers(0, num_tokens - 1))
    last = data.draw(st.integers(first + 1, num_tokens))
    mate = st.integers(1, most).flatmap(lambda length: st.tuples(st.integers(1, min(length, 9)), st.just(length)))
    chunk = context.chunk(first, last, data.draw(st.lists(mate, max_size=2)))
    assert torch.equal(chunk, context.alone[first:last])


@cache
def _context(name: str, dtype: torch.dtype, device: str) -> Context:
    return Context.of(CONTEXTS[name], dtype, device)


def test_a_very_long_context_has_few_pieces_of_which_a_chunk_has_the_same(device: str) -> None:
    case = Case([(2, 8193)], num_heads=1, num_kv_heads=1, block_size=32)  # from 8,193 on pieces have 1,024 keys
    q, cache = torch.randn(2, 1, 16), LayerCache(*torch.randn(2, 128, 32, 1, 16))
    table = torch.randint(128, (257,)).tolist()
    there = q.to(device), _on(device, cache)
    whole = Context.attend(case, *there, case.seqs, [table])
    rows = [Context.attend(case, there[0][i : i + 1], there[1], [(1, 8192 + i)], [table]) for i in range(2)]
    assert torch.equal(whole, torch.cat(rows))
    assert_as_exact(whole, paged_attention_ref(q, cache, _meta(case, [table]), 0.3, None),
                    _truth(q, cache, [table], case, 0.3))  # fmt: skip


def test_a_recorded_step_s_padding_gives_zeros_and_changes_nothing(device: str) -> None:
    case = Case([(1, 5), (1, 600)], block_size=16)
    q, cache, tables = _inputs(case, torch.float32)
    q, cache = q.to(device), _on(device, cache)
    meta = _meta(case, tables, device)
    block_table = torch.zeros((4, 50), dtype=torch.int32, device=device)
    block_table[:2, : meta.block_table.shape[1]] = meta.block_table
    lens = torch.tensor([5, 600, 0, 0], dtype=torch.int32, device=device)
    fixed = AttentionMetadata.fixed(block_table, lens, torch.arange(5, dtype=torch.int32, device=device), 16)
    out = _attend(case, torch.cat((q, q)), cache, fixed)
    assert torch.equal(out[:2], _attend(case, q, cache, meta))
    assert torch.equal(out[2:], torch.zeros_like(out[2:]))


def test_a_ragged_recorded_step_gives_the_bits_of_a_fresh_one(device: str) -> None:
    padding, case = 9, Case([(1, 5), (1, 600), (12, 70), (3, 3)], block_size=16)
    q, cache, tables = _inputs(case, torch.float32)
    q, cache = q.to(device), _on(device, cache)
    meta = _meta(case, tables, device)
    fixed, rows = padded(meta, len(q) + padding)
    wider = torch.full((len(q) + padding, *q.shape[1:]), float("nan"), device=device)
    wider[rows] = q
    out = _attend(case, wider, cache, fixed)
    assert torch.equal(out[rows], _attend(case, q, cache, meta))
    assert not out[2 : 2 + padding].any()


def _adapters(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(NUM_PAGES, 2, PAGE_RANK, 600, generator=generator) / 600**0.5
    b = torch.randn(NUM_PAGES, PAGE_RANK, 56, generator=generator)
    return zero_beyond_rank(a, 1).to(device, dtype), zero_beyond_rank(b, 0).to(device, dtype)


def _added(
    x: torch.Tensor, y: torch.Tensor, slots: list[int], pools: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    from lora_kernels.triton_expand import sgmv_expand_triton
    from lora_kernels.triton_shrink import sgmv_shrink_triton

    segments = LoRASegments.build(np.array(slots, np.int32), PAGES, x.device, invariant=True)
    out = y.clone()
    if segments is not None:
        sgmv_expand_triton(sgmv_shrink_triton(x, pools[0], segments), pools[1], segments, out, (40, 16))
    return out


# Of which the rows that are compared have adapters.
LONG_STEP = [*chain.from_iterable([slot, 2, 6, *[-1] * 127] for slot in (0, 1, 3, 5)), 6, 4]


@settings(max_examples=2, deadline=None)
@given(slots=st.lists(st.integers(-1, 6), min_size=1, max_size=24))
@example(slots=LONG_STEP)
def test_an_adapter_adds_the_same_to_a_row_among_any_others(
    slots: list[int], bits_dtype: torch.dtype, device: str
) -> None:
    pools = _adapters(bits_dtype, device)
    x, y = (torch.randn(len(slots), width).to(device, bits_dtype) for width in (600, 56))
    together = _added(x, y, slots, pools)
    for row in range(0, len(slots), max(1, len(slots) // 4)):
        own = slice(row, row + 1)
        assert torch.equal(together[own], _added(x[own], y[own], slots[own], pools))


PLANS = {(9, 0): (16, 32, 64, 128, 256), (8, 0): (8, 16, 32), (8, 9): (8, 16, 32), (7, 0): ()}


@pytest.mark.parametrize("capability", PLANS, ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (28672, 4096), (4096, 14336), (1152, 896), (24, 64)], ids=str)
def test_plans_differ_in_nothing_that_a_sum_shows(shape: tuple[int, int], capability: tuple[int, int]) -> None:
    plans = invariant_plans(*shape, capability)
    assert tuple(plan.tokens for plan in plans) == PLANS[capability]
    shown = {
        (plan.row_groups, plan.in_groups, plan.span, plan.share)
        if isinstance(plan, WidePlan)
        else (plan.warps, plan.blocks)
        for plan in plans
    }
    assert len(shown) == bool(plans)


SHAPES_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1001, 320)]
COUNTS = [
    1,
    2,
    3,
    7,
    8,
    9,
    15,
    16,
    17,
    24,
    31,
    32,
    33,
    48,
    63,
    64,
    65,
    96,
    127,
    128,
    129,
    192,
    255,
    256,
    257,
    300,
    2048,
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES_8B, ids=str)
def test_a_row_of_an_nf4_product_is_the_same_at_any_place_among_any_number(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = NF4Tiles.of(*(part.cuda() for part in blocks_of(quantize_nf4(torch.randn(shape) * 0.05))))
    _assert_rows_alike(lambda x: invariant_nf4_matmul(x, weight), shape[1], dtype)
    x = torch.randn(300, shape[1], dtype=dtype, device="cuda")
    truth = F.linear(x.double(), unpack_nf4_ref(*weight.blocks(), torch.float32).double())
    assert_as_exact(invariant_nf4_matmul(x, weight), nf4_matmul_ref(x, weight), truth.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", [(128_256, 4096), (4096, 14336), (1001, 320)], ids=str)
def test_a_row_of_a_dense_product_is_the_same_at_any_place_among_any_number(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, dtype=dtype, device="cuda") * 0.05
    _assert_rows_alike(lambda x: invariant_matmul(x, weight), shape[1], dtype)


def _assert_rows_alike(multiply: Callable[[torch.Tensor], torch.Tensor], in_features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    row = torch.randn(1, in_features, dtype=dtype, device="cuda")
    alone = multiply(row)
    for count in COUNTS if dtype != torch.float32 else COUNTS[::5]:
        x = torch.randn(count, in_features, dtype=dtype, device="cuda")
        places = sorted({0, count // 3, count // 2, count - 1})
        x[places] = row
        assert torch.equal(multiply(x)[places], alone.expand(len(places), -1)), count


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(4096, 1024, 1024), (4096,), (14336, 14336)], ids=str)
@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])
def test_an_8b_adapter_adds_the_same_to_a_row_among_1_to_64_pages(
    widths: tuple[int, ...], pool_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    ranks = [16, 8, 64, 1, 32, 16, 20]
    pages, num_pages = {}, 0
    for slot in range(32):
        rank = ranks[slot % len(ranks)]
        pages[slot] = AdapterPages(rank, tuple(range(num_pages, num_pages := num_pages + -(-rank // PAGE_RANK))))
    shapes = (num_pages, len(widths), PAGE_RANK, 4096), (num_pages, PAGE_RANK, sum(widths))
    a, b = ((torch.randn(shape, device="cuda") * 20).to(pool_dtype) for shape in shapes)
    scales = [
        torch.rand(num_pages, len(widths), PAGE_RANK, device="cuda") / 500 if pool_dtype == torch.int8 else None
    ] * 2

    def add(x: torch.Tensor, y: torch.Tensor, slots: list[int]) -> torch.Tensor:
        segments = LoRASegments.build(np.array(slots, np.int32), pages, "cuda", invariant=True)
        assert segments is not None
        out = y.clone()
        sgmv_expand(sgmv_shrink(x, a, segments, scales[0]), b, segments, out, widths, scales[1])
        return out

    x, y = (torch.randn(1, width, dtype=torch.bfloat16, device="cuda") for width in (4096, sum(widths)))
    for slot in (0, 2, 3, 6):
        alone = add(x, y, [slot])
        for count in (2, 16, 17, 64, 65, 300, 512, 513, 2048):
            for others in ([slot], [-1, slot, *range(32)], [-1, 0, 1]):
                slots = [others[row % len(others)] for row in range(count)]
                places = sorted({0, count // 2, count - 1})
                for place in places:
                    slots[place] = slot
                all_x, all_y = (torch.randn(count, part.shape[1], dtype=part.dtype, device="cuda") for part in (x, y))
                all_x[places], all_y[places] = x, y
                assert torch.equal(add(all_x, all_y, slots)[places], alone.expand(len(places), -1)), (slot, count)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1000], ids=["whole", "window"])
def test_8b_attention_is_alike_in_any_chunk_and_among_any_others(window: int | None) -> None:
    torch.manual_seed(0)
    num_tokens, block_size, context = 9000, 16, 9000  # past 8,192, from where pieces are twice as long
    cache = LayerCache(*torch.randn(2, 1200, block_size, 8, 128, dtype=torch.bfloat16, device="cuda"))
    table = torch.randperm(1200)[: -(-context // block_size)].tolist()
    q = torch.randn(num_tokens, 32, 128, dtype=torch.bfloat16, device="cuda")

    def attend(q: torch.Tensor, seqs: list[tuple[int, int]]) -> torch.Tensor:
        meta = AttentionMetadata.build(*map(list, zip(*seqs, strict=True)), [table] * len(seqs), block_size, "cuda")
        return invariant_attention(q, cache, meta, 128**-0.5, window)

    whole = attend(q, [(num_tokens, context)])
    for first, last in ((0, 1), (0, 700), (5, 64), (511, 513), (1000, 3048), (8190, 8195), (8999, 9000)):
        assert torch.equal(attend(q[first:last], [(last - first, last)]), whole[first:last])
    rows = [0, 1, 63, 64, 511, 512, 2047, 4096, 8191, 8192, 8999]
    for count in (1, len(rows)):
        for at in range(0, len(rows), count):
            own = rows[at : at + count]
            assert torch.equal(attend(q[own], [(1, row + 1) for row in own]), whole[own])
    mixed = torch.cat([q[rows], q[100:300], q[8000:8500]])
    got = attend(mixed, [*((1, row + 1) for row in rows), (200, 300), (500, 8500)])
    assert torch.equal(got, torch.cat([whole[rows], whole[100:300], whole[8000:8500]]))
    plain = paged_attention_ref(
        q[-64:], cache, AttentionMetadata.build([64], [context], [table], block_size, "cuda"), 128**-0.5, window
    )
    torch.testing.assert_close(whole[-64:], plain, atol=4e-3, rtol=2e-2)
