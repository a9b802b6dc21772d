import itertools
from dataclasses import dataclass

import pytest
import torch

from lora_kernels.attention import AttentionMetadata, paged_attention_ref
from lora_kernels.layer_cache import FP8, LayerCache
from tests.kernels.error_rule import assert_as_exact

NUM_BLOCKS = 128


@dataclass(frozen=True)
class Case:
    """Sequences as (query_len, context_len), the model's heads, and how much of each context is prefix."""

    seqs: list[tuple[int, int]]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 4
    window: int | None = None
    prefix_lens: list[int] | None = None


CASES = {
    "decode": Case([(1, 5), (1, 16), (1, 1), (1, 40)]),
    "decode, contexts far apart": Case([(1, 3), (1, 100), (1, 4)]),
    "decode, seven heads a group": Case([(1, 9), (1, 2)], num_heads=7, num_kv_heads=1, head_dim=24),
    "prefill": Case([(5, 5), (33, 33)], num_heads=2),
    "prefill behind a cached prefix": Case([(3, 20), (2, 9)], head_dim=40),
    "mixed, a chunk of one at the end": Case([(1, 12), (1, 7), (6, 18), (4, 4), (1, 8)]),
    "window, decode": Case([(1, 5), (1, 90)], window=6),
    "window, prefill": Case([(1, 30), (40, 70)], num_heads=2, num_kv_heads=1, window=9),
    "decode, contexts in pieces": Case([(1, 700), (1, 300), (1, 3)], num_kv_heads=1, block_size=16),
    "decode, pieces of 32 heads a group": Case([(1, 400)], num_heads=32, num_kv_heads=1, block_size=32),
    "window, decode in pieces": Case([(1, 600), (1, 350)], num_kv_heads=1, block_size=16, window=310),
    "prefix": Case([(1, 13), (1, 40), (6, 23), (5, 9)], prefix_lens=[8, 0, 6, 4]),
    "prefix and window, decode": Case([(1, 60), (1, 12), (1, 20)], window=5, prefix_lens=[7, 9, 0]),
    "prefix and window, decode in pieces": Case([(1, 900)], block_size=16, window=300, prefix_lens=[100]),
    "prefix and window, prefill": Case([(1, 9), (40, 200), (7, 17)], window=9, prefix_lens=[4, 70, 10]),
}


def _inputs(
    case: Case, dtype: torch.dtype, pages: torch.dtype | None = None, value_size: float = 1
) -> tuple[torch.Tensor, LayerCache, list[list[int]]]:
    """pages: their dtype where it is not that of queries."""
    sizes = (NUM_BLOCKS, case.block_size, case.num_kv_heads, case.head_dim)
    cache = LayerCache.zeros(*sizes, dtype=pages or dtype, device="cpu")
    k, v = torch.randn(2, *sizes).flatten(1, 2)
    cache.store(torch.arange(len(k)), k.to(dtype), (v * value_size).to(dtype))
    q = torch.randn(sum(n for n, _ in case.seqs), case.num_heads, case.head_dim).to(dtype)
    blocks = torch.randperm(NUM_BLOCKS).tolist()
    tables = []
    for _, context in case.seqs:
        used = -(-context // case.block_size)
        tables.append(blocks[:used])
        blocks = blocks[used:]
    return q, cache, tables


def _on(device: str, cache: LayerCache) -> LayerCache:
    return LayerCache(*(tensor.to(device) for tensor in cache.tensors))


def _meta(case: Case, tables: list[list[int]], device: str = "cpu") -> AttentionMetadata:
    query_lens, context_lens = [n for n, _ in case.seqs], [c for _, c in case.seqs]
    prefixes = case.prefix_lens
    return AttentionMetadata.build(query_lens, context_lens, tables, case.block_size, device, prefix_lens=prefixes)


def _truth(q: torch.Tensor, cache: LayerCache, tables: list[list[int]], case: Case, scale: float) -> torch.Tensor:
    """One query and head at a time, in fp64; fp8 times its scale is exact in fp32."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    row = 0
    prefixes = case.prefix_lens or [0] * len(tables)
    for (query_len, context), table, prefix in zip(case.seqs, tables, prefixes, strict=True):
        k, v = (pages.double() for pages in cache.blocks(torch.tensor(table), torch.float32))
        for position in range(context - query_len, context):
            first = 0 if case.window is None else max(prefix, position - case.window + 1)
            seen = [*range(min(prefix, first)), *range(first, position + 1)]
            for head in range(case.num_heads):
                kv_head = head * case.num_kv_heads // case.num_heads
                weights = (scale * (k[seen, kv_head] @ q[row, head].double())).softmax(0)
                out[row, head] = weights @ v[seen, kv_head]
            row += 1
    return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_plain_path_attends_to_the_pages_of_each_sequence(case: Case) -> None:
    q, cache, tables = _inputs(case, torch.float32)
    out = paged_attention_ref(q, cache, _meta(case, tables), 0.3, case.window)
    truth = _truth(q, cache, tables, case, 0.3)
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pages", [None, FP8], ids=["same", "fp8"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernel_is_as_exact_as_the_plain_path(
    case: Case, pages: torch.dtype | None, dtype: torch.dtype, device: str
) -> None:
    from lora_kernels.triton_attention import paged_attention_triton

    q, cache, tables = _inputs(case, dtype, pages)
    out = paged_attention_triton(q.to(device), _on(device, cache), _meta(case, tables, device), 0.3, case.window)
    plain = paged_attention_ref(q, cache, _meta(case, tables), 0.3, case.window)
    assert_as_exact(out, plain, _truth(q, cache, tables, case, 0.3))


@pytest.mark.parametrize("value_size", [1e-4, 1e4], ids=["tiny", "huge"])
@pytest.mark.parametrize("seqs", [[(1, 90), (1, 40)], [(30, 90), (20, 20)]], ids=["decode", "prefill"])
def test_products_in_fp16_hold_queries_and_values_beyond_its_range(
    seqs: list[tuple[int, int]], value_size: float, dtype: torch.dtype, device: str
) -> None:
    from lora_kernels.triton_attention import paged_attention_triton

    case, reach = Case(seqs, head_dim=64), 1 if dtype == torch.float16 else 2
    q, cache, tables = _inputs(case, dtype, FP8, value_size**reach)
    q *= 1e3**reach
    scale = 1e-3**reach
    out = paged_attention_triton(q.to(device), _on(device, cache), _meta(case, tables, device), scale, None)
    plain = paged_attention_ref(q, cache, _meta(case, tables), scale, None)
    assert_as_exact(out, plain, _truth(q, cache, tables, case, scale))


@pytest.mark.parametrize("pages", [None, FP8], ids=["same", "fp8"])
@pytest.mark.parametrize("seqs", [[(5, 21)], [(1, 21)], [(1, 21), (30, 30)]], ids=str)
def test_what_a_block_held_before_is_not_seen_though_it_be_infinite(
    seqs: list[tuple[int, int]], pages: torch.dtype | None, device: str
) -> None:
    from lora_kernels.triton_attention import paged_attention_triton

    case = Case(seqs, block_size=16)
    q, cache, tables = _inputs(case, torch.float16, pages)
    for attend, where in ((paged_attention_triton, device), (paged_attention_ref, "cpu")):
        meta, dirty = _meta(case, tables, where), LayerCache(*(tensor.clone() for tensor in cache.tensors))
        for (_, context), table in zip(seqs, tables, strict=True):
            dirty.k[table[-1], context % 16 :] = dirty.v[table[-1], context % 16 :] = float("nan")
            if dirty.scales is not None:
                dirty.scales[table[-1], :, context % 16 :] = float("inf")
        clean = attend(q.to(where), _on(where, cache), meta, 0.3, None)
        assert torch.equal(attend(q.to(where), _on(where, dirty), meta, 0.3, None), clean)


@pytest.mark.parametrize("pages", [None, FP8], ids=["same", "fp8"])
@pytest.mark.parametrize("name", ["decode", "mixed, a chunk of one at the end", "prefix and window, prefill"])
def test_keys_and_values_block_by_block_are_those_of_tensors_of_their_own(
    name: str, pages: torch.dtype | None, device: str
) -> None:
    from lora_kernels.triton_attention import paged_attention_triton

    case = CASES[name]
    q, cache, tables = _inputs(case, torch.float16, pages)
    num_halves, shape = 2 * NUM_BLOCKS, cache.k.shape[1:]
    memory = torch.zeros(num_halves * cache.k[0].nbytes, dtype=torch.uint8)
    interleaved = LayerCache.interleaved(memory, *shape, cache.k.dtype)
    for ours, theirs in zip(interleaved.tensors, cache.tensors, strict=True):
        ours.view(torch.uint8)[:num_halves:2] = theirs.view(torch.uint8)
    there = LayerCache.interleaved(memory.to(device), *shape, cache.k.dtype)
    if there.scales is not None and interleaved.scales is not None:
        there.scales.copy_(interleaved.scales)
    even = [[2 * block for block in table] for table in tables]
    for attend, where, own in (
        (paged_attention_triton, device, there),
        (paged_attention_ref, "cpu", interleaved),
    ):
        out = attend(q.to(where), own, _meta(case, even, where), 0.3, case.window)
        assert torch.equal(out, attend(q.to(where), _on(where, cache), _meta(case, tables, where), 0.3, case.window))


def test_one_sequence_far_longer_does_not_pad_the_others() -> None:
    case = Case([(1, 4), (1, 200), (1, 8), (1, 6)])
    meta = _meta(case, _inputs(case, torch.float32)[2])
    gathered = sum(group.blocks.numel() for group in meta.decode_groups)
    assert gathered <= 2 * sum(-(-context // case.block_size) for _, context in case.seqs)


@pytest.mark.parametrize("pages", [None, FP8], ids=["same", "fp8"])
def test_decodes_step_by_step_see_what_a_fresh_step_sees(pages: torch.dtype | None) -> None:
    case = Case([(1, 6), (1, 3), (1, 30)])
    _, cache, _ = _inputs(case, torch.float32, pages)
    # The second row's second block is block 0, which also pads the table.
    tables, other = [[5, 6, 7, 8, 9], [1, 0, 2, 3, 4], list(range(20, 31))], [15, 14, 13, 12, 11]
    previous, kept = None, []
    for step in range(12):
        lens = [context + step for _, context in case.seqs]
        if step >= 8:  # another sequence takes the first one's place, and grows as it did
            tables[0] = other
        slots = torch.tensor([table[(n - 1) // 4] * 4 + (n - 1) % 4 for table, n in zip(tables, lens, strict=True)])
        q = torch.randn(3, 4, 16)
        cache.store(slots, *torch.randn(2, 3, 2, 16))
        previous = AttentionMetadata.build([1, 1, 1], lens, tables, 4, "cpu", previous)
        fresh = AttentionMetadata.build([1, 1, 1], lens, tables, 4, "cpu")
        kept.append(previous.kept)
        out, expected = (paged_attention_ref(q, cache, meta, 0.3, None) for meta in (previous, fresh))
        assert torch.equal(out, expected)
    assert [step for step, same in enumerate(kept) if same] == [1, 4, 5, 9]  # no block was added, no row changed


def test_rows_of_one_sequence_see_what_each_other_wrote() -> None:
    case = Case([(1, 5), (1, 6), (1, 7)])  # a token and two drafts of it, which fail
    _, cache, _ = _inputs(case, torch.float32)
    tables, previous = [[5, 6]] * 3, None
    for first in (5, 6):
        lens = [first, first + 1, first + 2]
        slots = torch.tensor([6 * 4 + (n - 1) % 4 for n in lens])
        cache.store(slots, *torch.randn(2, 3, 2, 16))
        previous = AttentionMetadata.build([1, 1, 1], lens, tables, 4, "cpu", previous)
        fresh = AttentionMetadata.build([1, 1, 1], lens, tables, 4, "cpu")
        q = torch.randn(3, 4, 16)
        out, expected = (paged_attention_ref(q, cache, meta, 0.3, None) for meta in (previous, fresh))
        assert torch.equal(out, expected)


def test_metadata_takes_block_tables_longer_than_the_context() -> None:
    case = Case([(1, 5), (3, 6)])
    q, cache, tables = _inputs(case, torch.float32)
    longer = [[*table, 0, 1] for table in tables]
    exact, spare = (paged_attention_ref(q, cache, _meta(case, t), 0.3, None) for t in (tables, longer))
    assert torch.equal(exact, spare)


@pytest.mark.parametrize("pages", [None, FP8], ids=["same", "fp8"])
def test_a_batch_padded_to_a_fixed_size_attends_as_it_is(pages: torch.dtype | None, device: str) -> None:
    from lora_kernels.triton_attention import paged_attention_triton

    case = Case([(1, 5), (1, 16)])
    q, cache, tables = _inputs(case, torch.float32, pages)
    q, cache = q.to(device), _on(device, cache)
    meta = _meta(case, tables, device)
    table = torch.full((4, 6), NUM_BLOCKS - 1, dtype=torch.int32, device=device)
    table[:2, : meta.block_table.shape[1]] = meta.block_table
    lens = torch.tensor([5, 16, 0, 0], dtype=torch.int32, device=device)
    starts = torch.arange(5, dtype=torch.int32, device=device)
    fixed = AttentionMetadata.fixed(table, lens, starts, case.block_size)
    out = paged_attention_triton(torch.cat((q, q)), cache, fixed, 0.3, None)
    assert torch.equal(out[:2], paged_attention_triton(q, cache, meta, 0.3, None))
    assert torch.equal(out[2:], torch.zeros_like(q))


def padded(meta: AttentionMetadata, num_rows: int) -> tuple[AttentionMetadata, torch.Tensor]:
    """The same sequences at fixed addresses, padded between those of one query and the longer ones; and their rows."""
    device, single, tokens = meta.context_len.device, meta.num_decodes, sum(meta.query_lens)
    padding = num_rows - tokens
    lens = [*meta.query_lens[:single], *[1] * padding, *meta.query_lens[single:]]
    starts = torch.full((num_rows + 1,), num_rows, dtype=torch.int32, device=device)
    starts[: len(lens) + 1] = torch.tensor([0, *itertools.accumulate(lens)])
    seqs, rows = (torch.arange(count, device=device) for count in (len(meta.query_lens), tokens))
    seqs[single:] += padding
    rows[single:] += padding
    contexts = torch.zeros(num_rows, dtype=torch.int32, device=device)
    contexts[seqs] = meta.context_len
    table = torch.full((num_rows, NUM_BLOCKS), NUM_BLOCKS - 1, dtype=torch.int32, device=device)
    table[seqs, : meta.block_table.shape[1]] = meta.block_table
    return AttentionMetadata.fixed(table, contexts, starts, meta.block_size, ragged=True), rows


RAGGED = {
    "decode rows beside prompts": Case([(1, 5), (1, 100), (7, 20), (40, 40)]),
    "one prompt": Case([(33, 90)]),
    "decode rows": Case([(1, 5), (1, 9)]),
    "prompts of two": Case([(2, 2)] * 9),
    "nothing": Case([]),
    "a window": Case([(1, 60), (20, 70)], window=9),
    "pieces": Case([(1, 560), (6, 30)], num_kv_heads=1, block_size=16),
}


@pytest.mark.parametrize(
    ("name", "padding", "pages"),
    [*((name, 13, None) for name in RAGGED), ("decode rows beside prompts", 0, None), ("pieces", 13, FP8)],
)
def test_a_ragged_step_padded_to_a_fixed_size_attends_as_it_is(
    name: str, padding: int, pages: torch.dtype | None, device: str
) -> None:
    from lora_kernels.triton_attention import paged_attention_triton

    case = RAGGED[name]
    q, cache, tables = _inputs(case, torch.float32, pages)
    q, cache = q.to(device), _on(device, cache)
    meta = _meta(case, tables, device)
    fixed, rows = padded(meta, len(q) + padding)
    wider = torch.full((len(q) + padding, *q.shape[1:]), float("nan"), device=device)
    wider[rows] = q
    out = paged_attention_triton(wider, cache, fixed, 0.3, case.window)
    assert torch.equal(out[rows], paged_attention_triton(q, cache, meta, 0.3, case.window))
    is_padding = torch.ones(len(out), dtype=torch.bool, device=device).index_fill(0, rows, False)
    assert not out[is_padding].any()


@pytest.mark.parametrize("padding", [None, 0, 5])
@pytest.mark.parametrize(
    "seqs", [[(1, 12), (40, 40), (17, 300), (1, 9)], [(9, 9)] * 4, [(64, 64)], [(1, 3)] * 3], ids=str
)
def test_tiles_cover_the_longer_sequences_once_those_with_the_most_keys_first(
    seqs: list[tuple[int, int]], padding: int | None, device: str
) -> None:
    from lora_kernels.triton_prefill import _prefill_tiles

    if padding is not None:  # a step at fixed addresses has those of one query first
        seqs = sorted(seqs, key=lambda seq: seq[0] > 1)
    case = Case(seqs)
    meta = _meta(case, _inputs(case, torch.float32)[2], device)
    step, shift = meta, 0
    if padding is not None:
        step, shift = padded(meta, sum(meta.query_lens) + padding)[0], padding
    tiles = _prefill_tiles(step, 8).tolist()
    longer = list(enumerate(seqs))[meta.num_decodes :]
    wanted = {(seq + shift, first): c - n + first for seq, (n, c) in longer for first in range(0, n, 8)}
    given = [(seq, first) for seq, first in tiles if seq >= 0]
    assert tiles[: len(given)] == [list(tile) for tile in given]
    assert sorted(given) == sorted(wanted)
    positions = [wanted[tile] for tile in given]
    assert positions == sorted(positions, reverse=True)


def test_a_prefix_at_a_fixed_address_is_seen_past_the_window(device: str) -> None:
    from lora_kernels.triton_attention import paged_attention_triton

    case = Case([(1, 30), (1, 50)], window=6, prefix_lens=[9, 0])
    q, cache, tables = _inputs(case, torch.float32)
    inputs = q.to(device), _on(device, cache)
    meta = _meta(case, tables, device)
    starts = torch.arange(3, dtype=torch.int32, device=device)
    fixed = AttentionMetadata.fixed(meta.block_table, meta.context_len, starts, case.block_size, meta.prefix_len)
    out, expected = (paged_attention_triton(*inputs, m, 0.3, case.window) for m in (fixed, meta))
    assert torch.equal(out, expected)


def test_a_step_of_many_layers_cuts_its_contexts_once_and_repeats_to_the_bit(dtype: torch.dtype, device: str) -> None:
    from lora_kernels.triton_attention import paged_attention_triton

    case = Case([(1, 700), (1, 450), (20, 90)], num_kv_heads=1, block_size=16)
    q, cache, tables = _inputs(case, dtype)
    inputs, meta = (q.to(device), _on(device, cache)), _meta(case, tables, device)
    first = paged_attention_triton(*inputs, meta, 0.3, None)
    launches = dict(meta.launches)
    for _ in range(3):
        assert torch.equal(paged_attention_triton(*inputs, meta, 0.3, None), first)
    assert {key: id(value) for key, value in meta.launches.items()} == {key: id(v) for key, v in launches.items()}


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("lens", [[2000], [700, 0, 64, 1, 1000], [5] * 40, [64] * 5 + [4000]], ids=str)
def test_pieces_cover_what_each_query_sees_once_and_in_order(lens: list[int], window: int | None, device: str) -> None:
    from lora_kernels import triton_decode

    tables = [list(range(length // 16 + 1)) for length in lens]
    meta = AttentionMetadata.build([1] * len(lens), lens, tables, 16, device)
    pieces, arrived = triton_decode._decode_plan(meta, 2, triton_decode._DECODE, window)
    given = [piece for piece in pieces.tolist() if piece[0] >= 0]
    assert pieces.tolist()[: len(given)] == given
    assert not arrived.any()
    for row, length in enumerate(lens):
        own = [piece for piece in given if piece[0] == row]
        edges = [0, *(end for _, _, end, _, _ in own)]
        assert [(begin, end) for _, begin, end, _, _ in own] == list(itertools.pairwise(edges))
        assert edges[-1] == min(length, window or length)
        assert all(piece[3:] == [given.index(own[0]), len(own)] for piece in own)


@pytest.mark.gpu
@pytest.mark.parametrize("pages", [None, FP8], ids=["same", "fp8"])
def test_a_recorded_ragged_step_follows_the_sequences_that_it_is_replayed_with(pages: torch.dtype | None) -> None:
    from lora_kernels.triton_attention import paged_attention_triton

    steps = [[(1, 900), (1, 3), (40, 100)], [(50, 50)], [(1, 7)] * 60, [(2, 30)] * 9 + [(30, 400)], []]
    q = torch.randn(64, 8, 64, device="cuda", dtype=torch.bfloat16)
    cache = _on("cuda", _inputs(Case([], num_heads=8, head_dim=64, block_size=16), torch.bfloat16, pages)[1])
    made = []
    for seqs in steps:
        tables = [torch.randint(NUM_BLOCKS, (-(-context // 16),)).tolist() for _, context in seqs]
        meta = AttentionMetadata.build([n for n, _ in seqs], [c for _, c in seqs], tables, 16, "cuda")
        made.append(padded(meta, 64)[0])
    there = [torch.zeros_like(part) for part in (made[0].block_table, made[0].context_len, made[0].query_start)]

    def step() -> torch.Tensor:
        fixed = AttentionMetadata.fixed(*there, 16, ragged=True)
        return paged_attention_triton(q, cache, fixed, 0.3, None)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for meta in made:
        for part, new in zip(there, (meta.block_table, meta.context_len, meta.query_start), strict=True):
            part.copy_(new)
        graph.replay()
        assert torch.equal(out, step())
        assert torch.equal(out, paged_attention_triton(q, cache, meta, 0.3, None))


@pytest.mark.gpu
def test_a_recorded_step_follows_the_contexts_that_it_is_replayed_with() -> None:
    from lora_kernels.triton_attention import paged_attention_triton

    case = Case([(1, 900), (1, 300), (1, 1)], num_kv_heads=1, block_size=16, head_dim=64)
    q, cache, tables = _inputs(case, torch.bfloat16)
    q, cache = q.to("cuda"), _on("cuda", cache)
    meta = _meta(case, tables, "cuda")
    starts = torch.arange(4, dtype=torch.int32, device="cuda")
    lens = torch.zeros_like(meta.context_len)

    def step() -> torch.Tensor:
        fixed = AttentionMetadata.fixed(meta.block_table, lens, starts, case.block_size)
        return paged_attention_triton(q, cache, fixed, 0.3, None)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for contexts in ([900, 300, 1], [17, 0, 1], [513, 299, 0]):
        lens.copy_(torch.tensor(contexts))
        graph.replay()
        assert torch.equal(out, step())
    lens.copy_(meta.context_len)
    graph.replay()
    assert torch.equal(out, paged_attention_triton(q, cache, meta, 0.3, None))
