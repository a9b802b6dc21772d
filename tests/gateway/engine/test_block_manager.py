from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.engine.block_manager import BlockManager, block_hash, prefix_root
from gateway.engine.detokenizer import IncrementalDetokenizer, TokenTable
from gateway.engine.host_blocks import BlockCopy, HostBlocks
from gateway.engine.request import GenerateRequest
from gateway.engine.sampling_params import SamplingParams
from gateway.engine.sampling_row import SamplingRow
from gateway.engine.sequence import RunningRequest, Sequence
from tests.tiny import make_tokenizer

ROOT = prefix_root("base", None, "tenant")


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> TokenTable:
    return TokenTable(make_tokenizer(tmp_path_factory.mktemp("tok")).backend_tokenizer)


def sequence(table: TokenTable, tokens: list[int], root: bytes = ROOT) -> Sequence:
    request = RunningRequest(GenerateRequest("r", SamplingParams(), prompt=tokens), len(tokens), 16)
    detokenizer = IncrementalDetokenizer(table, tokens, SamplingParams())
    made = Sequence(request, 0, list(tokens), root, SamplingRow(SamplingParams(), tokens, len(tokens)), detokenizer)
    request.sequences.append(made)
    return made


def compute(blocks: BlockManager, seq: Sequence) -> int:
    """Run the whole sequence through the cache; returns the tokens that its prefix saved."""
    saved = blocks.adopt_prefix(seq)
    assert blocks.grow(seq, seq.num_tokens)
    seq.num_computed = seq.num_tokens
    blocks.seal(seq, seq.num_tokens)
    return saved


def test_a_second_sequence_reuses_the_full_blocks_of_the_first(table: TokenTable) -> None:
    blocks = BlockManager(range(16), 4, enable_prefix_caching=True)
    tokens = list(range(10))
    first, second = sequence(table, tokens), sequence(table, tokens)
    assert compute(blocks, first) == 0
    assert compute(blocks, second) == 8
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]


def test_the_last_token_is_always_computed(table: TokenTable) -> None:
    blocks = BlockManager(range(16), 4, enable_prefix_caching=True)
    compute(blocks, sequence(table, list(range(8))))
    assert compute(blocks, sequence(table, list(range(8)))) == 4


@pytest.mark.parametrize(("length", "shared", "is_copied"), [(8, 1, True), (9, 2, False), (10, 2, True), (1, 0, False)])
@pytest.mark.parametrize("caching", [True, False])
def test_a_fork_leaves_the_last_token_and_the_block_it_is_written_into(
    table: TokenTable, caching: bool, length: int, shared: int, is_copied: bool
) -> None:
    blocks = BlockManager(range(16), 4, enable_prefix_caching=caching)
    parent, child = (sequence(table, list(range(length))) for _ in range(2))
    compute(blocks, parent)
    assert blocks.fork(parent, child) == (parent.block_table[shared] if is_copied else None)
    assert child.num_computed == length - 1
    assert blocks.grow(child, length)
    assert child.block_table[:shared] == parent.block_table[:shared]
    assert set(child.block_table[shared:]).isdisjoint(parent.block_table)
    blocks.release(parent)
    blocks.check_integrity()
    assert blocks.num_free == 16 - len(child.block_table)
    blocks.release(child)
    assert blocks.num_free == 16


def test_a_fork_offers_only_what_its_parent_has_not(table: TokenTable) -> None:
    blocks = BlockManager(range(16), 4, enable_prefix_caching=True)
    parent, child, third = (sequence(table, list(range(10))) for _ in range(3))
    blocks.adopt_prefix(parent)
    blocks.grow(parent, 10)  # computed, and not yet told
    blocks.fork(parent, child)
    blocks.grow(child, 10)
    blocks.release(parent)
    blocks.seal(child, 10)
    assert compute(blocks, third) == 8


def test_versions_and_tenants_never_share_pages(table: TokenTable) -> None:
    """Invariant 1: the chain is seeded with base, adapter content and tenant."""
    roots = [
        prefix_root(base, digest, salt)
        for base in ("b1", "b2")
        for digest in (None, "d1", "d2")
        for salt in ("", "t1", "t2")
    ]
    blocks = BlockManager(range(256), 4, enable_prefix_caching=True)
    for root in roots:
        assert compute(blocks, sequence(table, list(range(12)), root)) == 0
    for root in roots:
        assert compute(blocks, sequence(table, list(range(12)), root)) == 8


field = st.text(max_size=6)


@given(
    st.tuples(field, st.none() | field.filter(bool), field),
    st.tuples(field, st.none() | field.filter(bool), field),
)
def test_roots_are_equal_only_when_every_field_is(
    a: tuple[str, str | None, str], b: tuple[str, str | None, str]
) -> None:
    assert (prefix_root(*a) == prefix_root(*b)) == (a == b)


def test_a_block_hash_depends_on_all_before_it() -> None:
    assert block_hash(b"a", [1, 2]) != block_hash(b"b", [1, 2])
    assert block_hash(b"a", [1, 2]) != block_hash(b"a", [2, 1])
    assert len(block_hash(b"a", [1])) == hashlib.blake2b(digest_size=20).digest_size


def test_growing_past_what_is_free_takes_nothing(table: TokenTable) -> None:
    blocks = BlockManager(range(2), 4, enable_prefix_caching=True)
    seq = sequence(table, list(range(12)))
    assert not blocks.grow(seq, 12)
    assert blocks.num_free == 2
    assert not blocks.grow(seq, 8, leave=1)
    assert blocks.grow(seq, 8)


def test_an_overwritten_block_is_no_longer_found(table: TokenTable) -> None:
    blocks = BlockManager(range(3), 4, enable_prefix_caching=True)
    first = sequence(table, list(range(12)))
    compute(blocks, first)
    blocks.release(first)
    other = sequence(table, list(range(100, 112)))
    compute(blocks, other)
    blocks.release(other)
    again = sequence(table, list(range(12)))
    assert compute(blocks, again) == 0
    blocks.check_integrity()


def test_without_prefix_caching_nothing_is_shared(table: TokenTable) -> None:
    blocks = BlockManager(range(16), 4, enable_prefix_caching=False)
    compute(blocks, sequence(table, list(range(12))))
    assert compute(blocks, sequence(table, list(range(12)))) == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_use_keeps_the_books(table: TokenTable, data: st.DataObject) -> None:
    blocks = BlockManager(range(12), 2, enable_prefix_caching=True)
    live: list[Sequence] = []
    for _ in range(data.draw(st.integers(1, 30))):
        if live and data.draw(st.booleans()):
            blocks.release(live.pop(data.draw(st.integers(0, len(live) - 1))))
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=9))
            seq = sequence(table, tokens)
            blocks.adopt_prefix(seq)
            if blocks.grow(seq, seq.num_tokens):
                seq.num_computed = seq.num_tokens
                blocks.seal(seq, seq.num_tokens)
                live.append(seq)
            else:
                blocks.release(seq)
        blocks.check_integrity()
    for seq in live:
        blocks.release(seq)
    assert blocks.num_free == blocks.num_blocks


def lending(num_own: int, num_lent: int, host: HostBlocks | None = None) -> BlockManager:
    """With blocks of 2 tokens, of which the first are lent."""
    own = range(num_lent, num_lent + num_own)
    blocks = BlockManager(own, 2, enable_prefix_caching=True, host=host)
    for block in range(num_lent):
        blocks.add(block)
    return blocks


def test_what_is_withdrawn_is_used_no_more_when_nobody_holds_it(table: TokenTable) -> None:
    blocks = lending(num_own=2, num_lent=2)
    seq = sequence(table, list(range(8)))
    assert blocks.grow(seq, 8)
    first, second, *_ = seq.block_table
    assert {first, second} == {0, 1}
    blocks.withdraw(second)
    assert (blocks.num_blocks, blocks.holds_any([second])) == (4, True)
    blocks.seal(seq, 8)
    blocks.release(seq)
    assert (blocks.num_blocks, blocks.num_free, blocks.holds_any([second])) == (3, 3, False)
    again = sequence(table, list(range(8)))
    assert blocks.adopt_prefix(again) == 2  # the first block's
    blocks.release(again)
    blocks.withdraw(first)
    assert (blocks.num_blocks, blocks.num_free) == (2, 2)
    assert not blocks.grow(sequence(table, list(range(5))), 5)
    blocks.check_integrity()


def test_a_block_that_was_withdrawn_may_be_added_again_while_it_is_held(table: TokenTable) -> None:
    blocks = lending(num_own=1, num_lent=1)
    seq = sequence(table, [1, 2, 3])
    assert blocks.grow(seq, 3)
    blocks.withdraw(0)
    blocks.add(0)
    blocks.release(seq)
    assert (blocks.num_blocks, blocks.num_free) == (2, 2)
    blocks.check_integrity()


def test_a_sequence_goes_on_in_other_blocks_and_its_prefix_is_found_there(table: TokenTable) -> None:
    blocks = lending(num_own=6, num_lent=2)
    first, second = (sequence(table, [*range(4), *end]) for end in ((7,), (8, 9)))
    compute(blocks, first)
    assert compute(blocks, second) == 4
    before = first.block_table
    for block in (0, 1):
        blocks.withdraw(block)
    copies = blocks.move([first, second], spared=())
    assert [source for source, _ in copies] == before[:2]
    assert min(first.block_table) >= 2
    assert first.block_table[:2] == second.block_table[:2] == [target for _, target in copies]
    assert first.block_table is not before  # by which others know that it is not the one that they have sent
    assert blocks.num_blocks == 6
    assert compute(blocks, sequence(table, [0, 1, 2, 3, 5])) == 4
    blocks.check_integrity()


def test_nothing_moves_without_free_blocks_nor_what_is_spared(table: TokenTable) -> None:
    blocks = lending(num_own=1, num_lent=2)
    seq = sequence(table, list(range(4)))
    compute(blocks, seq)
    for block in (0, 1):
        blocks.withdraw(block)
    spared, other = seq.block_table
    ((source, target),) = blocks.move([seq], spared={spared})
    assert (source, target) == (other, 2)
    assert seq.block_table == [spared, 2]
    before = seq.block_table
    assert blocks.move([seq], spared=()) == []
    assert seq.block_table is before  # nobody need look again
    blocks.release(seq)
    assert blocks.num_blocks == blocks.num_free == 1


@pytest.mark.parametrize("is_dropped_before", [False, True])
def test_the_prefix_in_a_withdrawn_block_is_saved_unless_an_adapter_overwrites_it(
    table: TokenTable, is_dropped_before: bool
) -> None:
    blocks = lending(num_own=1, num_lent=1, host=HostBlocks(4))
    seq = sequence(table, [1, 2])
    compute(blocks, seq)
    blocks.release(seq)
    if is_dropped_before:
        other = sequence(table, [3, 4, 5])
        assert blocks.grow(other, 3)
        blocks.release(other)
    assert blocks.is_to_save([0])
    blocks.withdraw(0)
    assert blocks.is_to_save([0])
    assert not blocks.is_to_save([1])
    assert [save.block for save in blocks.saves([])] == [0]
    assert not blocks.is_to_save([0])
    blocks.add(0)
    again = sequence(table, [1, 2, 3])
    blocks.adopt_prefix(again)
    assert blocks.grow(again, 3)
    blocks.seal(again, 2)
    blocks.release(again)
    assert not blocks.is_to_save([0, 1])  # the host has it
    third = sequence(table, [5, 6, 7])
    compute(blocks, third)
    blocks.release(third)
    blocks.withdraw(0)
    blocks.drop_saves([0, 1])
    assert blocks.saves([]) == []


class Tiers:
    """A block manager with a second tier, and what its blocks hold after each step: the links that were computed.

    The first blocks may be lent; nobody knows what they hold then, nor when they are taken back.
    """

    def __init__(self, num_blocks: int, num_host_blocks: int, num_lent: int = 0) -> None:
        self.manager = BlockManager(
            range(num_lent, num_lent + num_blocks),
            2,
            enable_prefix_caching=True,
            host=HostBlocks(num_host_blocks) if num_host_blocks else None,
        )
        self.device: list[bytes | None] = [None] * (num_lent + num_blocks)
        self.lent: dict[int, bool] = {}  # whether it is withdrawn
        self.host: list[bytes | None] = [None] * num_host_blocks
        self._last: list[Sequence] = []

    def lend(self, block: int) -> None:
        """Have the manager use a block, which may be one that was withdrawn."""
        self.manager.add(block)
        self.lent[block] = False

    def withdraw(self, block: int) -> None:
        self.manager.withdraw(block)
        self.lent[block] = True

    def _take_back(self, *, hastily: bool) -> None:
        """Overwrite what was withdrawn when nobody holds it, and what it holds is on the host, unless `hastily`."""
        for block in [block for block, is_withdrawn in self.lent.items() if is_withdrawn]:
            if not self.manager.holds_any([block]) and (hastily or not self.manager.is_to_save([block])):
                self.manager.withdraw(block)
                self.manager.drop_saves([block])
                del self.lent[block]
                self.device[block] = b"an adapter's"

    def step(
        self, admitted: list[Sequence], live: Seq[Sequence] = (), *, overlapping: bool, hastily: bool = False
    ) -> list[Sequence]:
        """Run sequences whole in one step; those that found room. The step before ends first, or just after.

        live: others that hold blocks. hastily: what was withdrawn is overwritten before a step can save it.
        """
        manager, loads, running = self.manager, list[BlockCopy](), list[Sequence]()
        self._take_back(hastily=hastily)
        if not overlapping:
            self._land()
        for seq in admitted:
            num_cached = manager.adopt_prefix(seq)
            if manager.grow(seq, seq.num_tokens):
                loads += manager.loads(seq, num_cached)
                running.append(seq)
            else:
                manager.release(seq)
        if running:
            copies = manager.move([*live, *running], spared=())
            assert not {source for source, _ in copies} & {target for _, target in copies}
            self._copy(manager.saves(loads), loads)
            for source, target in copies:
                self.device[target] = self.device[source]
        self._land()
        for seq in running:
            num_cached, num_full = seq.num_computed // 2, seq.num_tokens // 2
            links = chain(seq)
            assert [self.device[block] for block in seq.block_table[:num_cached]] == links[:num_cached]
            for block, link in zip(seq.block_table[num_cached:num_full], links[num_cached:], strict=True):
                self.device[block] = link
            for block in seq.block_table[num_full:]:
                self.device[block] = None
            seq.num_computed = seq.num_tokens
        self._last = running
        return running

    def _land(self) -> None:
        for seq in self._last:
            if seq.block_table:
                self.manager.seal(seq, seq.num_tokens)
        self._last = []

    def _copy(self, saves: list[BlockCopy], loads: list[BlockCopy]) -> None:
        saved = [self.device[save.block] for save in saves]
        assert not {save.host_block for save in saves} & {load.host_block for load in loads}
        assert len({save.host_block for save in saves}) == len(saves)
        assert len({load.block for load in loads}) == len(loads)
        for load in loads:
            self.device[load.block] = self.host[load.host_block]
        for save, link in zip(saves, saved, strict=True):
            self.host[save.host_block] = link


def chain(seq: Sequence) -> list[bytes]:
    links, parent = [], seq.prefix_root
    for i in range(seq.num_tokens // 2):
        parent = block_hash(parent, seq.token_ids[2 * i : 2 * i + 2])
        links.append(parent)
    return links


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_block_adopted_from_either_tier_holds_what_its_link_says(table: TokenTable, data: st.DataObject) -> None:
    num_lent = data.draw(st.sampled_from([0, 4, 8]))
    tiers = Tiers(8, data.draw(st.sampled_from([0, 1, 3, 16])), num_lent)
    roots = [prefix_root("base", None, salt) for salt in ("t1", "t2")]
    tokens, live = st.lists(st.integers(0, 1), min_size=1, max_size=11), list[Sequence]()
    for _ in range(data.draw(st.integers(1, 12))):
        for _ in range(data.draw(st.integers(0, len(live)))):
            tiers.manager.release(live.pop(data.draw(st.integers(0, len(live) - 1))))
        if live and data.draw(st.booleans()):
            tiers.manager.grow(live[0], 2 * len(live[0].block_table) + 1)  # for a step that is not run after all
        new = [
            sequence(table, ids, data.draw(st.sampled_from(roots))) for ids in data.draw(st.lists(tokens, max_size=4))
        ]
        for block in data.draw(st.lists(st.integers(0, num_lent - 1), unique=True)) if num_lent else ():
            if tiers.lent.get(block, True):
                tiers.lend(block)
            else:
                tiers.withdraw(block)
        live += tiers.step(new, live, overlapping=data.draw(st.booleans()), hastily=data.draw(st.booleans()))
        tiers.manager.check_integrity()
        for seq in live:
            links = chain(seq)
            assert [tiers.device[block] for block in seq.block_table[: len(links)]] == links
    for seq in live:
        tiers.manager.release(seq)
    assert tiers.manager.num_free == tiers.manager.num_blocks


def test_what_left_the_device_is_fetched_from_the_host(table: TokenTable) -> None:
    tiers, tokens = Tiers(5, 8), list(range(10))
    (first,) = tiers.step([sequence(table, tokens)], overlapping=False)
    tiers.step([], overlapping=False)
    tiers.manager.release(first)
    (other,) = tiers.step([sequence(table, list(range(100, 106)))], overlapping=False)
    tiers.manager.release(other)
    again = sequence(table, tokens)
    assert tiers.manager.adopt_prefix(again) == 8
    assert again.num_sealed == 2  # on the device
    assert tiers.manager.grow(again, 10)
    assert len(tiers.manager.loads(again, 8)) == 2


def test_versions_and_tenants_never_share_host_blocks(table: TokenTable) -> None:
    """Invariant 1, in the second tier."""
    roots = [prefix_root("b", digest, salt) for digest in (None, "d1", "d2") for salt in ("", "t1")]
    tiers = Tiers(4, 64)
    for found in (0, 6):
        for root in roots:
            (seq,) = tiers.step([sequence(table, list(range(8)), root)], overlapping=False)
            assert seq.request.num_prompt == 8
            tiers.step([], overlapping=False)
            tiers.manager.release(seq)
        assert tiers.manager.host.num_loaded * 2 == found * len(roots)
