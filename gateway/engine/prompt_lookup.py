"""Guesses at a sequence's next tokens that need no second model."""

from __future__ import annotations

from typing import Final

_SIZES: Final = (4, 3, 2)  # tokens that must have occurred before; more of them are better evidence
_GROWTH: Final = 2
_ENTERED_AT_ONCE: Final = 2048  # all other sequences wait for it


class NgramIndex:
    """Where each n-gram of 2 to 4 tokens occurred last, before a token of `token_ids` from `start` on.

    token_ids: only grows.
    """

    def __init__(self, token_ids: list[int], start: int = 0) -> None:
        self._token_ids = token_ids
        self._num_entered = start
        self._after: dict[tuple[int, ...], int] = {}

    def __len__(self) -> int:
        return len(self._token_ids)

    def enter(self) -> None:
        """Enter the n-grams that end before one of the tokens that there are, of a long list a part each time."""
        end = min(len(self), self._num_entered + _ENTERED_AT_ONCE)
        for size in _SIZES:
            for place in range(max(self._num_entered, size), end):
                self._after[tuple(self._token_ids[place - size : place])] = place
        self._num_entered = end

    def find(self, ngram: tuple[int, ...]) -> int | None:
        """The place behind its last occurrence."""
        return self._after.get(ngram)


class PromptLookup:
    """Guesses that a sequence goes on as it did when its newest tokens last occurred, in its prompt or its output.

    Prompt lookup decoding (Saxena 2023), vLLM's method "ngram". A guess is judged by what comes, whether it was tried
    or not: the next is longer by two where all of it came (transformers' schedule), else as long as what came of it.
    Where nothing did, nothing is proposed until a guess of one token has come true.

    token_ids: the sequence's own list, which only grows. most: tokens of a guess. given: of what it begins with, as
    its siblings' lists do, which share this index. The work is by the tokens that are new since the last guess.
    """

    def __init__(self, token_ids: list[int], most: int, given: NgramIndex | None = None) -> None:
        self._token_ids = token_ids
        self._most = self._length = most
        self._num_seen = 0
        self._given = given if given is not None else NgramIndex([])
        self._own = NgramIndex(token_ids, start=len(self._given))
        self._guess: list[int] = []

    def guess(self) -> list[int]:
        """What may follow the tokens that are known now; empty where nothing is worth a try."""
        known = len(self._token_ids)
        if self._num_seen < known:
            self._judge(self._token_ids[self._num_seen :])
            self._num_seen = known
            self._given.enter()
            self._own.enter()
            self._guess = self._look_up(max(self._length, 1))
        return self._guess[: self._length]

    def _judge(self, came: list[int]) -> None:
        both = min(len(self._guess), len(came))
        hits = next((i for i in range(both) if self._guess[i] != came[i]), both)
        if hits < both:
            self._length = hits
        elif self._guess and both == len(self._guess):
            self._length = min(self._length + _GROWTH, self._most)

    def _look_up(self, count: int) -> list[int]:
        end = len(self._token_ids)
        for size in _SIZES:
            ngram = tuple(self._token_ids[-size:])
            start = self._own.find(ngram) or self._given.find(ngram)  # behind a token, so never at 0
            if start is not None:
                # A guess that reaches the end goes on with itself: what repeats is guessed to go on repeating.
                return [self._token_ids[start + i % (end - start)] for i in range(count)]
        return []
