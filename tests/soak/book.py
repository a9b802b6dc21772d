"""What may have been true of versions and aliases while an answer was made, and every answer.

Times are of `time.monotonic`. A name is "tenant/name", an alias "tenant/name@alias", a version or ref "tenant/name:3".
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from math import inf

from tests.soak.answers import Answers, Content

GRACE_S = 1.0  # by when a front door has noticed that a process is gone
HANG_S = 60.0
ALIASES: Mapping[str, tuple[str, ...]] = {
    "acme/support": ("default", "prod"),
    "globex/support": ("default", "prod"),
    "acme/brief": ("default",),  # which is given up and taken again
}


@dataclass
class Span:
    """That something may have been so from `since` to `until`. sure: from when on it was so for certain."""

    value: str | None
    since: float
    sure: float
    until: float = inf

    def touches(self, begin: float, end: float) -> bool:
        return self.since <= end and begin <= self.until

    def covers(self, begin: float, end: float) -> bool:
        return self.sure <= begin and end <= self.until


_NEVER: Set[str | None] = frozenset()
_NOT_NAMED: Set[str | None] = frozenset((None,))


@dataclass
class Kill:
    """back: when all was whole again."""

    what: str
    at: float
    back: float = inf


@dataclass
class Answer:
    """One request and how it ended: "done", "left" by the client, "cut" off, "truncated", "hung", or an error's code.

    decided: when its version was certainly chosen. cached: prompt tokens that the prefix cache had.
    """

    asked: str
    prompt: int
    max_tokens: int
    started: float = field(default_factory=time.monotonic)
    decided: float = inf
    ended: float = inf
    models: set[str] = field(default_factory=set)
    text: str = ""
    reason: str | None = None
    cached: int = 0
    end: str = "truncated"


class Book:
    """What is known of versions and aliases, and every answer. base: the base's name."""

    def __init__(self, answers: Answers, base: str) -> None:
        self.base = base
        self.contents: dict[str, Content] = {}
        self.kills: list[Kill] = []
        self.answers: list[Answer] = []
        self.num_swaps = 0
        self.num_done = 0
        self._expected = answers
        self._named: dict[str, list[Span]] = {
            f"{name}@{alias}": [Span(None, 0.0, 0.0)] for name, aliases in ALIASES.items() for alias in aliases
        }
        self._refused: dict[str, list[Span]] = {}

    def observe(self, ready: set[str], known: Iterable[str], named: Mapping[str, set[str]], since: float) -> None:
        """What holds now. Whatever is not as it was before has changed after `since`.

        ready: of the `known` versions those that are served. named: the versions behind each alias.
        """
        now = time.monotonic()
        for ref in known:
            _become(self._refused.setdefault(ref, []), _NEVER if ref in ready else _NOT_NAMED, since, now)
        for alias, refs in named.items():
            self.num_swaps += _become(self._named[alias], refs or _NOT_NAMED, since, now)

    def refs(self) -> list[str]:
        """All versions ever, also those that are refused."""
        return list(self._refused)

    def is_refused(self, ref: str) -> bool:
        return any(span.until == inf for span in self._refused[ref])

    def problems(self) -> list[str]:
        """What must not have happened."""
        judged = ((answer, self._problem(answer)) for answer in self.answers)
        return [f"{problem}: {answer}" for answer, problem in judged if problem is not None]

    def _problem(self, answer: Answer) -> str | None:
        if answer.ended - answer.started > HANG_S:
            return "it hung"
        if len(answer.models) > 1:
            return "more than one version in one answer"
        if answer.models and (wrong := self._wrong(answer, *answer.models)):
            return wrong
        match answer.end:
            case "done" | "left":
                return None
            case "cut":
                return None if self._excused(answer, "door") else "cut off without a kill"
            case "engine_unavailable":
                return None if self._excused(answer, "door", "replica") else "no replica, without a kill"
            case "model_not_found" | "version_not_ready":
                return None if self._may_be_refused(answer) else "refused, though it was there"
            case _:
                return "it ended as nothing may"

    def _wrong(self, answer: Answer, model: str) -> str | None:
        content = self.contents.get(model) if model != self.base else self._expected.base
        if content is None:
            return "a version that nobody made"
        if "@" in answer.asked:
            spans = [span for span in self._named[answer.asked] if span.value == model]
            if not any(span.touches(answer.started, answer.decided) for span in spans):
                return "a version that the alias did not name"
        elif answer.asked != model:
            return "another version than was asked for"
        if any(span.covers(answer.started, answer.decided) for span in self._refused.get(model, ())):
            return "a version that was deleted or quarantined"
        wanted = self._expected.text(content.tokens[answer.prompt][: answer.max_tokens])
        if answer.end == "done":
            return None if (answer.text, answer.reason) == (wanted, "length") else f"not {wanted!r}"
        return None if wanted.startswith(answer.text) else f"not a part of {wanted!r}"

    def _excused(self, answer: Answer, *kinds: str) -> bool:
        """Whether a kill explains it: of what it ran on, or of a door that came up again and was not ready yet."""
        for kill in self.kills:
            until = max(kill.at + GRACE_S, kill.back if kill.what.startswith("door") else 0.0)
            if kill.what.startswith(kinds) and kill.at <= answer.ended and answer.started <= until:
                return True
        return False

    def _may_be_refused(self, answer: Answer) -> bool:
        spans = self._named.get(answer.asked) or self._refused.get(answer.asked, [])
        return any(span.value is None and span.touches(answer.started, answer.decided) for span in spans)

    def tally(self) -> str:
        """The run in a line."""
        ends = Counter(answer.end for answer in self.answers)
        kills = Counter(kill.what.partition("-")[0] for kill in self.kills)
        cached = sum(answer.cached for answer in self.answers)
        return (
            f"{len(self.answers)} requests {dict(ends)}, {self.num_swaps} swaps, {len(self.contents)} versions, "
            f"kills {dict(kills)}, {cached} prompt tokens from the prefix cache"
        )


def _become(spans: list[Span], values: Set[str | None], since: float, now: float) -> bool:
    """Let exactly these values hold from now on; whether that is new."""
    live = {span.value: span for span in spans if span.until == inf}
    for value in live.keys() - values:
        live[value].until = now
    spans.extend(Span(value, since, now) for value in values - live.keys())
    return live.keys() != values
