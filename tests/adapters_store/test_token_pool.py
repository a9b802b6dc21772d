"""Rows of tokens on the device: found by slot and id, in runs that are given back."""

from __future__ import annotations

import random

import pytest
import torch

from adapters_store.token_pool import TokenPool
from adapters_store.weights import TokenTable

VOCAB, HIDDEN = 50, 4
BOTH = ("embed_tokens", "lm_head")


def table(modules: tuple[str, ...], ids: list[int], seed: int) -> TokenTable:
    generator = torch.Generator().manual_seed(seed)
    return TokenTable(modules, torch.tensor(sorted(ids)), torch.randn(len(ids), HIDDEN, generator=generator))


def load(pool: TokenPool, slot: int, *tables: TokenTable, start: int | None = None) -> None:
    start = pool.take(slot, tables, start)
    for one in tables:
        pool.rows[start : start + len(one.ids)] = one.rows
        start += len(one.ids)


def pool_of(num_rows: int) -> TokenPool:
    return TokenPool(num_rows, HIDDEN, VOCAB, torch.float32, "cpu")


def test_each_token_has_its_own_slot_s_row_or_is_left_alone() -> None:
    """Against a dictionary, while adapters come and go at random."""
    pool, random_ = pool_of(40), random.Random(0)
    held: dict[int, TokenTable] = {}
    for round_ in range(200):
        slot = random_.randrange(6)
        if slot in held:
            pool.free(slot)
            del held[slot]
        else:
            ids = random_.sample(range(VOCAB), random_.randint(1, 12))
            own = table(random_.choice([BOTH, ("embed_tokens",), ("lm_head",)]), ids, round_)
            if pool.longest_run() < len(ids):
                continue
            load(pool, slot, own)
            held[slot] = own
        pool.check_integrity()
        slots, ids_ = torch.randint(-1, 6, (64,)), torch.randint(0, VOCAB, (64,))
        base = torch.randn(64, HIDDEN)
        wanted = base.clone()
        for row, (slot_, id_) in enumerate(zip(slots.tolist(), ids_.tolist(), strict=True)):
            if slot_ in held and "embed_tokens" in held[slot_].modules and id_ in held[slot_].ids:
                wanted[row] = held[slot_].rows[held[slot_].ids == id_][0]
        pool.embed(base, ids_, slots)
        assert torch.equal(base, wanted)
        for slot_ in range(6):
            head = pool.head(slot_)
            if slot_ in held and "lm_head" in held[slot_].modules:
                assert head is not None
                assert torch.equal(head.ids, held[slot_].ids)
                assert torch.equal(head.rows, held[slot_].rows)
            else:
                assert head is None


def test_two_modules_with_rows_of_their_own_share_a_run() -> None:
    pool = pool_of(5)
    tables = table(("embed_tokens",), [3, 7], 0), table(("lm_head",), [1, 2, 3], 1)
    load(pool, 2, *tables)
    x = torch.zeros(2, HIDDEN)
    pool.embed(x, torch.tensor([7, 1]), torch.tensor([2, 2]))
    assert torch.equal(x, torch.stack([tables[0].rows[1], torch.zeros(HIDDEN)]))
    head = pool.head(2)
    assert head is not None
    assert torch.equal(head.rows, tables[1].rows)
    assert pool.longest_run() == 0


@pytest.mark.parametrize(("given_back", "largest"), [((), 3), ((1,), 7), ((0,), 4), ((0, 1), 10)])
def test_room_is_one_run_also_among_what_would_be_given_back(given_back: tuple[int, ...], largest: int) -> None:
    """Held: [0, 3) by slot 0 and [4, 7) by slot 1; free: [3, 4) and [7, 10)."""
    pool = pool_of(10)
    load(pool, 0, table(("lm_head",), [0, 1, 2], 0))
    load(pool, 9, table(("lm_head",), [0], 0))
    load(pool, 1, table(("lm_head",), [0, 1, 2], 0))
    pool.free(9)
    assert pool.longest_run(given_back) == largest


def test_a_run_is_the_one_that_is_asked_for() -> None:
    pool, own = pool_of(10), table(BOTH, [3, 5], 0)
    load(pool, 1, own, start=6)
    assert (pool.row(1), pool.row(0)) == (6, -1)
    x = torch.zeros(1, HIDDEN)
    pool.embed(x, torch.tensor([5]), torch.tensor([1]))
    assert torch.equal(x, own.rows[1:])
    assert pool.longest_run() == 6
    for taken in (5, 7, 9, -1):
        with pytest.raises(AssertionError, match="some are taken"):
            pool.take(0, (own,), taken)
    pool.check_integrity()
