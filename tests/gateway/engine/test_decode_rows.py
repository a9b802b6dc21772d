from __future__ import annotations

from collections import Counter
from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engine.decode_rows import DecodeRows
from gateway.engine.detokenizer import IncrementalDetokenizer, TokenTable
from gateway.engine.request import GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.sampling_row import SamplingRow
from gateway.engine.sequence import Clock, RunningRequest, Sequence
from gateway.engine.tenant import Tenant
from tests.tiny import make_tokenizer

SIZE = 4  # of a block


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> TokenTable:
    return TokenTable(make_tokenizer(tmp_path_factory.mktemp("tok")).backend_tokenizer)


class World:
    """Sequences that decode, each with a token more than it has computed."""

    def __init__(self, table: TokenTable) -> None:
        self.table = table
        self.clock = Clock()
        self.tenants = [Tenant(), Tenant()]
        self.blocks = count(100)

    def sequence(self, length: int, slot: int = -1, most: int = 1000) -> Sequence:
        """One of which `length` tokens are computed, and that may become `most` more with the one that is not."""
        tokens, params = list(range(length + 1)), SamplingParams()
        request = RunningRequest(GenerateRequest("r", params, prompt=tokens), length, 1 + most)
        detokenizer = IncrementalDetokenizer(self.table, tokens, params)
        made = Sequence(request, 0, tokens, b"", SamplingRow(params, tokens, length), detokenizer, slot=slot)
        made.tenant = self.tenants[length % 2]
        made.num_computed, made.max_tokens = length, length + 1 + most
        made.block_table = [next(self.blocks) for _ in range(-(-length // SIZE))]
        made.follow(self.clock)
        return made

    def step(self, rows: DecodeRows) -> tuple[DecodeRows, DecodeRows]:
        """(the step's rows, those of the next)."""
        for sequence in rows.entering(SIZE):
            if len(sequence.block_table) * SIZE == sequence.num_computed:
                sequence.block_table.append(next(self.blocks))
        now = rows.in_blocks(SIZE)
        self.clock.now += 1
        return now, now.advanced()


# Some join, each by what `World.sequence` takes; two leave, the first being this; or there is a step.
Action = list[tuple[int, int, int]] | int | None
joins = st.tuples(st.integers(1, 9), st.integers(-1, 3), st.integers(1, 6))
actions = st.one_of(st.lists(joins, min_size=1, max_size=3), st.integers(0, 20), st.none())


@given(st.lists(actions, max_size=30))
def test_each_row_is_its_sequence_s_next_token(table: TokenTable, script: list[Action]) -> None:
    world, rows, live = World(table), DecodeRows(), list[Sequence]()
    for action in script:
        if isinstance(action, list):
            joining = [world.sequence(*one) for one in action]
            rows, live = rows.joined_by(joining), live + joining
        elif isinstance(action, int):
            leaving = live[action : action + 2]
            rows, live = rows.without(leaving), live[:action] + live[action + 2 :]
        else:
            ended = [s for s in live if s.num_tokens == s.max_tokens]
            assert set(rows.ending()) == set(ended)
            rows, live = rows.without(ended), [s for s in live if s not in ended]
            at = {s: s.num_computed for s in live}
            now, rows = world.step(rows)
            # By slot, and in each by who came first.
            assert now.sequences == sorted(live, key=lambda s: s.slot)
            assert now.starts.tolist() == [at[s] for s in now.sequences]
            assert now.blocks.tolist() == [s.block_table[at[s] // SIZE] for s in now.sequences]
            assert now.slots.tolist() == [s.slot for s in now.sequences]
            assert now.samplings == [s.sampling for s in now.sequences]
            assert all(a is s.block_table for a, s in zip(now.block_tables, now.sequences, strict=True))
            assert now.tenants == Counter(s.tenant for s in live)
            assert now.filling(SIZE) == [(s, at[s] + 1) for s in now.sequences if (at[s] + 1) % SIZE == 0]
            assert all((s.num_computed, s.num_tokens) == (n + 1, n + 2) for s, n in at.items())


def test_a_step_keeps_its_rows_whatever_comes_after(table: TokenTable) -> None:
    world = World(table)
    first, second = world.sequence(3), world.sequence(4, slot=2)
    kept, rows = world.step(DecodeRows().joined_by([first, second]))
    numbers, sequences = kept.numbers.copy(), kept.sequences.copy()
    rows = rows.joined_by([world.sequence(6, slot=0)]).without([first])
    for _ in range(3):
        _, rows = world.step(rows)
    assert np.array_equal(kept.numbers, numbers)
    assert kept.sequences == sequences


def test_other_blocks_are_taken_up_in_the_middle_of_a_block(table: TokenTable) -> None:
    world = World(table)
    sequence = world.sequence(5)
    _, rows = world.step(DecodeRows().joined_by([sequence]))
    sequence.block_table = [7, 8]
    now, _ = world.step(rows.moved())
    assert now.blocks.tolist() == [8]
    assert now.block_tables[0] is sequence.block_table


def test_who_leaves_keeps_its_numbers(table: TokenTable) -> None:
    world = World(table)
    stays, leaves = world.sequence(3), world.sequence(3)
    _, rows = world.step(DecodeRows().joined_by([stays, leaves]))
    leaves.follow(None)
    assert stays.is_row
    assert not leaves.is_row
    world.step(rows.without([leaves]))
    assert (stays.num_computed, stays.num_tokens) == (5, 6)
    assert (leaves.num_computed, leaves.num_tokens) == (4, 5)
    leaves.num_tokens += 1
    leaves.num_computed += 1
    leaves.follow(world.clock)
    world.clock.now += 1
    assert (leaves.num_computed, leaves.num_tokens) == (6, 7)
