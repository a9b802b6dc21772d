"""Guesses at a sequence's next tokens that need no second model."""

from __future__ import annotations

from typing import Final

_SIZES: Final = (4, 3, 2)  # tokens that must have occurred before; more of them are better evidence
_GROWTH: Final = 2
_INDEXED_AT_ONCE: Final = 2048  # a long prompt is entered in pieces: all other sequences wait for it


class PromptLookup:
    """Guesses that a sequence goes on as it did when its newest tokens last occurred, in its prompt or its output.

    Prompt lookup decoding (Saxena 2023), vLLM's method "ngram". A guess is judged by what comes, whether it was tried
    or not: the next is longer by two where all of it came (transformers' schedule), else as long as what came of it.
    Where nothing did, nothing is proposed until a guess of one token has come true.

    token_ids: the sequence's own list, which only grows. most: tokens of a guess. Keeps one entry for each n-gram of 2
    to 4 tokens; the work is by the tokens that are new since the last guess, of a long prompt a part each time.
    """

    def __init__(self, token_ids: list[int], most: int) -> None:
        self._token_ids = token_ids
        self._most = self._length = most
        self._num_seen = self._num_indexed = 0
        self._after: dict[tuple[int, ...], int] = {}  # the place behind each n-gram's last occurrence
        self._guess: list[int] = []

    def guess(self) -> list[int]:
        """What may follow the tokens that are known now; empty where nothing is worth a try."""
        known = len(self._token_ids)
        if self._num_seen < known:
            self._judge(self._token_ids[self._num_seen :])
            self._num_seen = known
            self._index(min(known, self._num_indexed + _INDEXED_AT_ONCE))
            self._guess = self._look_up(max(self._length, 1))
        return self._guess[: self._length]

    def _judge(self, came: list[int]) -> None:
        both = min(len(self._guess), len(came))
        hits = next((i for i in range(both) if self._guess[i] != came[i]), both)
        if hits < both:
            self._length = hits
        elif self._guess and both == len(self._guess):
            self._length = min(self._length + _GROWTH, self._most)

    def _index(self, end: int) -> None:
        """Enter the n-grams that end before one of the tokens up to `end`; of equal ones the last counts."""
        for size in _SIZES:
            for place in range(max(self._num_indexed, size), end):
                self._after[tuple(self._token_ids[place - size : place])] = place
        self._num_indexed = end

    def _look_up(self, count: int) -> list[int]:
        end = len(self._token_ids)
        for size in _SIZES:
            start = self._after.get(tuple(self._token_ids[-size:]))
            if start is not None:
                # A guess that reaches the end goes on with itself: what repeats is guessed to go on repeating.
                return [self._token_ids[start + i % (end - start)] for i in range(count)]
        return []
