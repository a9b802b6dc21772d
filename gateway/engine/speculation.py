"""Which running sequences guess their next tokens, and how far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gateway.engine.block_manager import BlockManager
from gateway.engine.sequence import Sequence


class Speculation:
    """Gives the sequences that speculate drafts from what a step has left of tokens, rows and blocks.

    When anything is short, drafts are what is dropped. A draft takes a row of its step, which samples what follows it.
    num_drafts, num_accepted: tokens guessed so far, and those of them that came.
    """

    def __init__(self, blocks: BlockManager, *, max_num_batched_tokens: int, max_rows: int) -> None:
        self.num_drafts = 0
        self.num_accepted = 0
        self._blocks = blocks
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_rows = max_rows
        self._room = max_rows  # what the last step had for drafts
        self._num_sequences = 0

    def __bool__(self) -> bool:
        """Whether any unfinished sequence speculates."""
        return self._num_sequences > 0

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Count the sequences of a new request."""
        self._num_sequences += sum(sequence.lookup is not None for sequence in sequences)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        self._num_sequences -= sequence.lookup is not None

    def had_better_wait(self, sequence: Sequence) -> bool:
        """Whether to run the sequence once its tokens in flight are known.

        To wait is worth it where a guess will find room; the step before tells.
        """
        return sequence.awaits_tokens(self._room > 0)

    def draft(self, step: Mapping[Sequence, int], num_rows: int, leave: int) -> None:
        """Have the step's speculating sequences guess, each as far as its share of what is left goes.

        num_rows: of the step beside these. leave: blocks that are not for drafts.
        """
        asking = [
            s for s in step if s.lookup is not None and s.num_uncomputed == 1 and s.num_tokens == len(s.token_ids)
        ]
        room = max(0, min(self._max_num_batched_tokens - sum(step.values()), self._max_rows - len(step)) - num_rows)
        self._room = room
        for place, sequence in enumerate(asking):
            share = room // (len(asking) - place)
            self._guess(sequence, min(share, sequence.max_tokens - sequence.num_tokens - 1), leave)
            room -= len(sequence.drafts)

    def verify(self, sequence: Sequence) -> bool:
        """Whether the sequence's next draft is what its last token turned out to be; if not, all its drafts go."""
        if not sequence.drafts or sequence.drafts.pop(0) != sequence.token_ids[-1]:
            sequence.drafts.clear()
            return False
        self.num_accepted += 1
        sequence.request.num_accepted += 1
        return True

    def _guess(self, sequence: Sequence, most: int, leave: int) -> None:
        assert sequence.lookup is not None
        drafts = sequence.lookup.guess()[:most]
        if not self._blocks.grow(sequence, sequence.num_tokens + len(drafts), leave=leave, may_borrow=False):
            del drafts[len(sequence.block_table) * self._blocks.block_size - sequence.num_tokens :]
        sequence.drafts[:] = drafts
        sequence.request.num_drafts += len(drafts)
        self.num_drafts += len(drafts)
