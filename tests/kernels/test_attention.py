from dataclasses import dataclass

import pytest
import torch

from lora_kernels.attention import AttentionMetadata, paged_attention_ref
from lora_kernels.kv_store import store_kv_ref
from tests.kernels.error_rule import assert_as_exact

NUM_BLOCKS = 64


@dataclass(frozen=True)
class Case:
    """Sequences as (query_len, context_len), and the model's heads."""

    seqs: list[tuple[int, int]]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 4
    window: int | None = None


CASES = {
    "decode": Case([(1, 5), (1, 16), (1, 1), (1, 40)]),
    "decode, contexts far apart": Case([(1, 3), (1, 100), (1, 4)]),
    "decode, seven heads a group": Case([(1, 9), (1, 2)], num_heads=7, num_kv_heads=1, head_dim=24),
    "prefill": Case([(5, 5), (33, 33)], num_heads=2),
    "prefill behind a cached prefix": Case([(3, 20), (2, 9)], head_dim=40),
    "mixed, a chunk of one at the end": Case([(1, 12), (1, 7), (6, 18), (4, 4), (1, 8)]),
    "window, decode": Case([(1, 5), (1, 90)], window=6),
    "window, prefill": Case([(1, 30), (40, 70)], num_heads=2, num_kv_heads=1, window=9),
}


def _inputs(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[list[int]]]:
    cache_shape = (NUM_BLOCKS, case.block_size, case.num_kv_heads, case.head_dim)
    k_cache, v_cache = torch.randn(cache_shape).to(dtype), torch.randn(cache_shape).to(dtype)
    q = torch.randn(sum(n for n, _ in case.seqs), case.num_heads, case.head_dim).to(dtype)
    blocks = torch.randperm(NUM_BLOCKS).tolist()
    tables = []
    for _, context in case.seqs:
        used = -(-context // case.block_size)
        tables.append(blocks[:used])
        blocks = blocks[used:]
    return q, k_cache, v_cache, tables


def _meta(case: Case, tables: list[list[int]], device: str = "cpu") -> AttentionMetadata:
    query_lens, context_lens = [n for n, _ in case.seqs], [c for _, c in case.seqs]
    return AttentionMetadata.build(query_lens, context_lens, tables, case.block_size, device)


def _truth(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tables: list[list[int]], case: Case, scale: float
) -> torch.Tensor:
    """One query and head at a time, in fp64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    row = 0
    for (query_len, context), table in zip(case.seqs, tables, strict=True):
        k = k_cache[table].flatten(0, 1).double()
        v = v_cache[table].flatten(0, 1).double()
        for position in range(context - query_len, context):
            first = 0 if case.window is None else max(0, position - case.window + 1)
            for head in range(case.num_heads):
                kv_head = head * case.num_kv_heads // case.num_heads
                seen = slice(first, position + 1)
                weights = (scale * (k[seen, kv_head] @ q[row, head].double())).softmax(0)
                out[row, head] = weights @ v[seen, kv_head]
            row += 1
    return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_plain_path_attends_to_the_pages_of_each_sequence(case: Case) -> None:
    q, k_cache, v_cache, tables = _inputs(case, torch.float32)
    out = paged_attention_ref(q, k_cache, v_cache, _meta(case, tables), 0.3, case.window)
    truth = _truth(q, k_cache, v_cache, tables, case, 0.3)
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernel_is_as_exact_as_the_plain_path(case: Case, dtype: torch.dtype, device: str) -> None:
    from lora_kernels.triton_attention import paged_attention_triton

    q, k_cache, v_cache, tables = _inputs(case, dtype)
    meta = _meta(case, tables, device)
    out = paged_attention_triton(q.to(device), k_cache.to(device), v_cache.to(device), meta, 0.3, case.window)
    plain = paged_attention_ref(q, k_cache, v_cache, _meta(case, tables), 0.3, case.window)
    assert_as_exact(out, plain, _truth(q, k_cache, v_cache, tables, case, 0.3))


def test_one_sequence_far_longer_does_not_pad_the_others() -> None:
    case = Case([(1, 4), (1, 200), (1, 8), (1, 6)])
    meta = _meta(case, _inputs(case, torch.float32)[3])
    gathered = sum(group.blocks.numel() for group in meta.decode_groups)
    assert gathered <= 2 * sum(-(-context // case.block_size) for _, context in case.seqs)


def test_decodes_step_by_step_see_what_a_fresh_step_sees() -> None:
    case = Case([(1, 6), (1, 3), (1, 30)])
    _, k_cache, v_cache, _ = _inputs(case, torch.float32)
    # The second row's second block is block 0, which also pads the table.
    tables, other = [[5, 6, 7, 8, 9], [1, 0, 2, 3, 4], list(range(20, 31))], [15, 14, 13, 12, 11]
    previous, kept = None, []
    for step in range(12):
        lens = [context + step for _, context in case.seqs]
        if step >= 8:  # another sequence takes the first one's place, and grows as it did
            tables[0] = other
        slots = torch.tensor([table[(n - 1) // 4] * 4 + (n - 1) % 4 for table, n in zip(tables, lens, strict=True)])
        q = torch.randn(3, 4, 16)
        store_kv_ref(torch.randn(3, 2, 16), torch.randn(3, 2, 16), k_cache, v_cache, slots)
        previous = AttentionMetadata.build([1, 1, 1], lens, tables, 4, "cpu", previous)
        fresh = AttentionMetadata.build([1, 1, 1], lens, tables, 4, "cpu")
        kept.append(previous.kept)
        out, expected = (paged_attention_ref(q, k_cache, v_cache, meta, 0.3, None) for meta in (previous, fresh))
        assert torch.equal(out, expected)
    assert [step for step, same in enumerate(kept) if same] == [1, 4, 5, 9]  # no block was added, no row changed


def test_metadata_takes_block_tables_longer_than_the_context() -> None:
    case = Case([(1, 5), (3, 6)])
    q, k_cache, v_cache, tables = _inputs(case, torch.float32)
    longer = [[*table, 0, 1] for table in tables]
    exact, spare = (paged_attention_ref(q, k_cache, v_cache, _meta(case, t), 0.3, None) for t in (tables, longer))
    assert torch.equal(exact, spare)


def test_a_batch_padded_to_a_fixed_size_attends_as_it_is(device: str) -> None:
    from lora_kernels.triton_attention import paged_attention_triton

    case = Case([(1, 5), (1, 16)])
    q, k_cache, v_cache, tables = (
        value.to(device) if isinstance(value, torch.Tensor) else value for value in _inputs(case, torch.float32)
    )
    meta = _meta(case, tables, device)
    table = torch.full((4, 6), 63, dtype=torch.int32, device=device)
    table[:2, : meta.block_table.shape[1]] = meta.block_table
    lens = torch.tensor([5, 16, 0, 0], dtype=torch.int32, device=device)
    starts = torch.arange(5, dtype=torch.int32, device=device)
    fixed = AttentionMetadata.fixed(table, lens, starts, case.block_size)
    out = paged_attention_triton(torch.cat((q, q)), k_cache, v_cache, fixed, 0.3, None)
    assert torch.equal(out[:2], paged_attention_triton(q, k_cache, v_cache, meta, 0.3, None))
    assert torch.equal(out[2:], torch.zeros_like(q))


def test_store_writes_each_row_to_its_place_and_nothing_else(dtype: torch.dtype, device: str) -> None:
    from lora_kernels.triton_attention import store_kv_triton

    fused = torch.randn(5, 3 * 2 * 24).to(dtype)  # keys and values as strided parts of one tensor
    k, v = fused[:, 48:96].view(5, 2, 24), fused[:, 96:].view(5, 2, 24)
    slots = torch.tensor([7, 0, 19, 4, 12])
    expected = torch.zeros(2, 6 * 4, 2, 24, dtype=dtype)
    expected[0, slots], expected[1, slots] = k, v
    plain = torch.zeros(2, 6, 4, 2, 24, dtype=dtype)
    store_kv_ref(k, v, plain[0], plain[1], slots)
    assert torch.equal(plain.view(expected.shape), expected)
    cache = torch.zeros(2, 6, 4, 2, 24, dtype=dtype, device=device)
    there = fused.to(device)
    k, v = there[:, 48:96].view(5, 2, 24), there[:, 96:].view(5, 2, 24)
    store_kv_triton(k, v, cache[0], cache[1], slots.to(device))
    assert torch.equal(cache.cpu().view(expected.shape), expected)
