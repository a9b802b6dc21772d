"""What is guessed, and how far ahead."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engine.prompt_lookup import NgramIndex, PromptLookup


def by_search(tokens: list[int], count: int) -> list[int]:
    """The guess by its definition: what followed the last earlier occurrence of the longest ending of 4 to 2 tokens."""
    end = len(tokens)
    for size in (4, 3, 2):
        for start in range(end - 1, size - 1, -1):
            if size < end and tokens[start - size : start] == tokens[end - size :]:
                grown = list(tokens)
                for i in range(count):
                    grown.append(grown[start + i])
                return grown[end:]
    return []


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    num_given=st.integers(0, 60),
)
def test_the_longest_ending_that_occurred_before_is_followed(
    tokens: list[int], steps: list[int], num_given: int
) -> None:
    known = tokens[:num_given]
    given = known.copy()
    ngrams = NgramIndex(given)
    lookup, sibling = (PromptLookup(ids, 5, ngrams) for ids in (known, given))
    for step in steps:
        known += tokens[len(known) : len(known) + step]
        guess = lookup.guess()
        assert guess == by_search(known, len(guess))
        assert len(guess) <= 5
    guess = sibling.guess()
    assert guess == by_search(given, len(guess))


def test_a_guess_is_longest_at_first() -> None:
    assert PromptLookup([1, 2, 3, 4, 5, 6, 1, 2], 4).guess() == [3, 4, 5, 6]


def test_what_repeats_is_guessed_to_go_on_repeating() -> None:
    assert PromptLookup([7, 8, 9, 8, 9], 6).guess() == [8, 9, 8, 9, 8, 9]


def test_asking_again_changes_nothing() -> None:
    lookup = PromptLookup([1, 2, 3, 1, 2], 4)
    assert lookup.guess() == lookup.guess() == [3, 1, 2, 3]


def test_a_long_prompt_is_entered_in_pieces() -> None:
    tokens = [*range(5000), 4500, 4501]
    lookup = PromptLookup(tokens, 2, NgramIndex(tokens.copy()))
    assert lookup.guess() == []
    for new in ([6000], [6001], [4400, 4401]):
        tokens += new
        guess = lookup.guess()
    assert guess == [4402, 4403]


@pytest.mark.parametrize(
    ("came", "length"),
    [
        ([[3, 4, 9]], 2),  # as long as what came
        ([[3, 4, 9], [1, 2], [3, 4, 9]], 4),  # all of it came: two longer
        ([[3, 4, 5, 6]], 5),  # but not longer than asked for
        ([[3, 4]], 5),  # as much as was tried
        ([[9]], 0),  # nothing
    ],
)
def test_the_next_guess_is_as_long_as_the_last_was_good(came: list[list[int]], length: int) -> None:
    tokens = [1, 2, 3, 4, 5, 6, 1, 2]
    lookup = PromptLookup(tokens, 5)
    lookup.guess()
    for new in came:
        tokens += new
        lookup.guess()
    assert lookup._length == length


def test_after_a_failure_a_guess_must_come_true_untried() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 1, 2]
    lookup = PromptLookup(tokens, 4)
    assert lookup.guess() == [3, 4, 5, 6]
    tokens.append(0)
    assert lookup.guess() == []
    tokens += [3, 4]
    assert lookup.guess() == []  # 5 would be it
    tokens.append(5)
    assert lookup.guess() == [6, 1]
