"""Host bookkeeping of the paged KV cache: who holds which block, and which blocks hold a reusable prefix."""

from __future__ import annotations

import hashlib
import math
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Seq

from gateway.engine.host_blocks import BlockCopy, HostBlocks
from gateway.engine.sequence import Sequence


def prefix_root(fingerprint: str, adapter_digest: str | None, salt: str) -> bytes:
    """The start of a prefix hash chain.

    Each field is hashed with its tag and length, so that no two different triples share a chain: neither two adapter
    versions, nor two tenants, nor a salt that looks like a digest.
    """
    chain = hashlib.blake2b(digest_size=20)
    for tag, value in (("base", fingerprint), ("adapter", adapter_digest or ""), ("salt", salt)):
        data = value.encode()
        chain.update(f"{tag}:{len(data)}:".encode() + data)
    return chain.digest()


def block_hash(parent: bytes, token_ids: Seq[int]) -> bytes:
    """The chain's next link: `parent` and the block's tokens."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=20).digest()


class BlockManager:
    """Blocks of `block_size` tokens, shared by reference count, free ones kept in least-recently-used order.

    A free block keeps its content until it is handed out again, so a prefix survives its sequences; with a second tier
    (`host`), also after that: the next step saves it to the host before it writes to the block.
    own: the numbers of its blocks. Before it drops a prefix, and where too few blocks are free, it asks `borrow` to
    `add` others, saying when the prefix was used last (on the monotonic clock), or infinity. Those may be withdrawn:
    what sequences have there then `move`s to others in the next step.
    Invariant: blocks with a holder + free blocks = num_blocks (`check_integrity`).
    """

    def __init__(
        self, own: range, block_size: int, *, enable_prefix_caching: bool, host: HostBlocks | None = None
    ) -> None:
        self.num_blocks = len(own)
        self.block_size = block_size
        self.borrow: Callable[[float], bool] = _borrow_nothing
        self.enable_prefix_caching = enable_prefix_caching
        self.host = host or HostBlocks(0)
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._num_holders = [0] * own.stop
        self._hash_of: list[bytes | None] = [None] * own.stop
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(own)
        self._freed_at = [0.0] * own.stop
        self._leaving: set[int] = set()  # withdrawn while they are held
        self._left: dict[bytes, int] = {}  # links dropped since the last step; their blocks hold them until the next

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """The share of blocks that sequences hold, 0 to 1."""
        return 1 - self.num_free / self.num_blocks

    def adopt_prefix(self, sequence: Sequence) -> int:
        """Give a sequence without blocks the cached blocks of its prefix. Returns the number of tokens they hold.

        Those that the host is to give count as computed; `grow` takes blocks for them, and `loads` says how they are
        filled. At least its last token is left to compute, so that there are logits to sample from.
        """
        assert not sequence.block_table
        if not self.enable_prefix_caching:
            return 0
        shareable = (sequence.num_tokens - 1) // self.block_size
        self._extend_hashes(sequence, shareable)
        for link in sequence.block_hashes[:shareable]:
            block = self._block_of.get(link)
            if block is None:
                break
            self._hold(block)
            sequence.block_table.append(block)
        sequence.num_sealed = len(sequence.block_table)
        on_host = self.host.count(sequence.block_hashes[sequence.num_sealed : shareable])
        sequence.num_computed = (sequence.num_sealed + on_host) * self.block_size
        return sequence.num_computed

    def count_reuse(self, sequence: Sequence, num_reused: int) -> None:
        """Note for `prefix_queries` and `prefix_hits` that a sequence begins to run, so many tokens computed before."""
        if self.enable_prefix_caching:
            self.prefix_queries += sequence.num_tokens
            self.prefix_hits += num_reused

    def fork(self, parent: Sequence, child: Sequence) -> int | None:
        """Give a sequence without blocks those of its request's prompt, which `parent` has computed.

        Its last token is left to compute. The block that this token is written into is not shared where it holds others
        too: it is returned, and must be copied into the block that the child takes next.
        """
        assert not child.block_table
        first = child.num_tokens - 1
        shared = first // self.block_size
        for block in parent.block_table[:shared]:
            self._hold(block)
            child.block_table.append(block)
        child.block_hashes = parent.block_hashes[:shared]
        child.num_sealed = min(parent.num_sealed, shared)
        child.num_computed = first
        return parent.block_table[shared] if first % self.block_size else None

    def grow(self, sequence: Sequence, num_tokens: int, *, leave: int = 0, may_borrow: bool = True) -> bool:
        """Make the sequence hold blocks for `num_tokens`. False, taking nothing, if fewer than `leave` would stay."""
        if num_tokens <= len(sequence.block_table) * self.block_size:
            return True
        missing = -(-num_tokens // self.block_size) - len(sequence.block_table)
        while missing + leave > self.num_free:
            if not may_borrow or not self.borrow(math.inf):
                return False
        sequence.block_table.extend(self._take() for _ in range(missing))
        return True

    def num_lacking(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that are missing for `num_tokens` of the sequence beside what is free."""
        return -(-num_tokens // self.block_size) - len(sequence.block_table) - self.num_free

    def holds_any(self, blocks: Iterable[int]) -> bool:
        """Whether a sequence has one of these."""
        return any(map(self._num_holders.__getitem__, blocks))

    def used_at(self, block: int) -> float:
        """When the prefix that a free block holds was used last, on the monotonic clock; 0 where it holds none."""
        return self._freed_at[block] if self._hash_of[block] is not None else 0.0

    def add(self, block: int) -> None:
        """Use a block that is not its own; what it holds is nobody's."""
        if block in self._leaving:
            self._leaving.remove(block)
        elif block not in self._free and not self._num_holders[block]:
            self._free[block] = None
            self._free.move_to_end(block, last=False)
            self.num_blocks += 1

    def withdraw(self, block: int) -> None:
        """Use a block that is not its own no more, from when nobody holds it; what it holds is nobody's then.

        With a second tier the next step saves what a free one holds.
        """
        if self._num_holders[block]:
            self._unlink(block)
            self._leaving.add(block)
        elif block in self._free:
            del self._free[block]
            self._leave(block)
            self.num_blocks -= 1

    def is_to_save(self, blocks: Seq[int]) -> bool:
        """Whether any of these holds what would go to the second tier, or is to go there in the next step."""
        if not self.host.num_blocks:
            return False
        links = [link for block in blocks if (link := self._hash_of[block]) is not None]
        return not self.host.has(links) or not set(self._left.values()).isdisjoint(blocks)

    def drop_saves(self, blocks: Collection[int] | None = None) -> None:
        """Let go what the next step was to save, of these blocks or of all: they are overwritten, or no step comes."""
        self._left = {link: block for link, block in self._left.items() if blocks is not None and block not in blocks}

    def move(self, sequences: Iterable[Sequence], spared: Collection[int]) -> list[tuple[int, int]]:
        """Give sequences other blocks for those that were withdrawn, as far as any are free, but for some `spared`.

        Returns the copies, (source, target), with which the step begins that is scheduled: to be called last.
        """
        targets: dict[int, int] = {}
        for sequence in sequences if self._leaving else ():
            if self._leaving.isdisjoint(sequence.block_table):
                continue
            table = list(sequence.block_table)  # a table of its own only grows: who has sent it would not look again
            for place, block in enumerate(table):
                if block not in self._leaving or block in spared:
                    continue
                if block in targets:
                    self._num_holders[targets[block]] += 1
                elif self._free:
                    targets[block] = self._take()
                else:
                    continue
                table[place] = targets[block]
                if place < sequence.num_sealed:
                    self._offer(targets[block], sequence.block_hashes[place])
                self._release(block)
            if table != sequence.block_table:  # else nothing was free for it, and nobody need look at it again
                sequence.block_table = table
        return list(targets.items())

    def loads(self, sequence: Sequence, num_cached: int) -> list[BlockCopy]:
        """What the next step brings from the host to the blocks of a sequence just admitted.

        num_cached: what `adopt_prefix` returned.
        """
        fetched = slice(sequence.num_sealed, num_cached // self.block_size)
        places = self.host.fetch(sequence.block_hashes[fetched])
        return [BlockCopy(*copy) for copy in zip(sequence.block_table[fetched], places, strict=True)]

    def saves(self, loads: Seq[BlockCopy]) -> list[BlockCopy]:
        """What the next step, which has these `loads`, brings to the host before it writes to any block."""
        left, self._left = self._left, {}
        return self.host.save(left, loads)

    def forget_host(self) -> None:
        """Forget what the host holds, after steps whose copies may not have been made."""
        self.drop_saves()
        self.host.clear()

    def seal(self, sequence: Sequence, num_tokens: int) -> None:
        """Offer the sequence's full blocks among its first `num_tokens` tokens, which are computed and known."""
        num_full = num_tokens // self.block_size
        if num_full <= sequence.num_sealed or not self.enable_prefix_caching:
            return
        self._extend_hashes(sequence, num_full)
        for i in range(sequence.num_sealed, num_full):
            self._offer(sequence.block_table[i], sequence.block_hashes[i])
        sequence.num_sealed = num_full

    def retract(self, sequence: Sequence) -> None:
        """Have nothing that the sequence has offered or adopted found again, on the device or the host."""
        for link in sequence.block_hashes:
            if (block := self._block_of.get(link)) is not None:
                self._unlink(block)
            self._left.pop(link, None)
        self.host.forget(sequence.block_hashes)

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back from a sequence; its last blocks are reused first."""
        for block in reversed(sequence.block_table):
            self._release(block)
        sequence.block_table = []
        sequence.num_computed = sequence.num_sealed = 0

    def check_integrity(self) -> None:
        """Assert that held and free blocks add up, and that each offered link leads to its block."""
        held = [block for block, holders in enumerate(self._num_holders) if holders]
        assert len(held) + self.num_free == self.num_blocks, (len(held), self.num_free, self.num_blocks)
        assert all(self._num_holders[block] == 0 for block in self._free)
        assert self._leaving <= set(held)
        assert all(self._hash_of[block] == link for link, block in self._block_of.items())
        self.host.check_integrity()

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        hashes, size = sequence.block_hashes, self.block_size
        for i in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else sequence.prefix_root
            hashes.append(block_hash(parent, sequence.token_ids[i * size : (i + 1) * size]))

    def _offer(self, block: int, link: bytes) -> None:
        # Two sequences may compute the same block side by side; the first stays the one that is found.
        if link not in self._block_of and block not in self._leaving:
            self._hash_of[block] = link
            self._block_of[link] = block

    def _hold(self, block: int) -> None:
        if self._num_holders[block] == 0:
            del self._free[block]
        self._num_holders[block] += 1

    def _release(self, block: int) -> None:
        self._num_holders[block] -= 1
        if self._num_holders[block]:
            return
        if block in self._leaving:
            self._leaving.remove(block)
            self.num_blocks -= 1
        else:
            self._free[block] = None
            self._freed_at[block] = time.monotonic()

    def _take(self) -> int:
        if used_at := self.used_at(next(iter(self._free))):
            self.borrow(used_at)
        block, _ = self._free.popitem(last=False)
        self._leave(block)
        self._num_holders[block] = 1
        return block

    def _leave(self, block: int) -> None:
        """Have a block's content found no more on the device; the next step saves it, where there is a second tier."""
        link = self._unlink(block)
        if link is not None and self.host.num_blocks:
            self._left[link] = block

    def _unlink(self, block: int) -> bytes | None:
        """Have a block found no more by the link whose content it holds."""
        link, self._hash_of[block] = self._hash_of[block], None
        if link is not None:
            del self._block_of[link]
        return link


def _borrow_nothing(since: float) -> bool:
    return False
