"""What accepted requests were promised, and what came of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from gateway.engine.request import GenerateRequest, TokenDelta
from gateway.engine.stats import StepOutput


@dataclass
class Story:
    """One accepted request: its deltas by sequence, and the reasons for which it may end."""

    request: GenerateRequest
    may_end: set[str]
    num_prompt: int | None = None
    deltas: dict[int, list[TokenDelta]] = field(default_factory=dict)
    has_ended: bool = False

    def take(self, delta: TokenDelta) -> None:
        """Check one more delta against those before."""
        assert not self.has_ended, "a delta after the request's end"
        assert 0 <= delta.index < self.request.sampling.n
        deltas = self.deltas.setdefault(delta.index, [])
        assert not deltas or deltas[-1].finish_reason is None, "a delta after the sequence's end"
        deltas.append(delta)
        assert (delta.error is not None) == (delta.finish_reason == "error")
        if self.request.sampling.logprobs is not None:
            assert [logprob.token_id for logprob in delta.logprobs] == delta.token_ids
        if delta.finish_reason is not None:
            self._check_end(delta)
        if delta.usage is not None:
            self.has_ended = True
            self._check_usage(delta)

    def tokens(self, index: int) -> list[int]:
        """What one sequence was given."""
        return [token for delta in self.deltas.get(index, []) for token in delta.token_ids]

    def text(self, index: int) -> str:
        """The same as text."""
        return "".join(delta.text for delta in self.deltas.get(index, []))

    def reason(self, index: int) -> str | None:
        """Why the sequence ended."""
        return self.deltas[index][-1].finish_reason

    def _check_end(self, delta: TokenDelta) -> None:
        params, tokens = self.request.sampling, self.tokens(delta.index)
        assert delta.finish_reason in self.may_end, f"ended by {delta.finish_reason}: {delta.error!r}"
        if params.max_tokens is not None:
            assert len(tokens) <= params.max_tokens
            assert delta.finish_reason != "length" or len(tokens) == params.max_tokens
        if delta.finish_reason == "stop" and not params.stop:
            assert len(tokens) > params.min_tokens
        if not params.min_tokens:
            assert not any(stop in self.text(delta.index) for stop in params.stop)

    def _check_usage(self, delta: TokenDelta) -> None:
        assert delta.usage is not None
        indices = range(self.request.sampling.n)
        assert all(self.deltas[index][-1].finish_reason is not None for index in indices)
        assert delta.usage.completion_tokens == sum(len(self.tokens(index)) for index in indices)
        assert self.num_prompt in (None, delta.usage.prompt_tokens)
        assert delta.usage.cached_tokens < delta.usage.prompt_tokens


class Ledger:
    """All requests of a run: every one that was accepted ends exactly once, for a reason that it may have."""

    def __init__(self) -> None:
        self.open: dict[str, Story] = {}
        self.ended: dict[str, Story] = {}
        self._doom: set[str] = set()
        self.reasons: Counter[str] = Counter()

    def accept(self, request: GenerateRequest, num_prompt: int | None, may_fail: bool) -> None:
        """A request that an engine has taken, or, where its length is not known yet, is given next."""
        assert request.request_id not in self.open
        assert request.request_id not in self.ended
        ends = {"stop", "length", "error"} if may_fail else {"stop", "length"}
        self.open[request.request_id] = Story(request, ends | self._doom, num_prompt)

    def refuse(self, request: GenerateRequest) -> None:
        """The engine did not take it after all."""
        assert not self.open.pop(request.request_id).deltas

    def cancel(self, request_id: str) -> None:
        """The caller has gone away."""
        if request_id in self.open:
            self.open[request_id].may_end.add("cancelled")

    def doom(self, reason: str) -> None:
        """The engine is killed: whatever it has, or still takes, may end for this reason."""
        self._doom.add(reason)
        for story in self.open.values():
            story.may_end.add(reason)

    def revive(self) -> None:
        """The engine goes on."""
        self._doom.clear()

    def take(self, output: StepOutput) -> list[Story]:
        """Check what a step gave. Returns the requests that it ended."""
        ended = []
        for delta in output.deltas:
            story = self.open.get(delta.request_id)
            assert story is not None, f"a delta for {delta.request_id}, which is not open"
            story.take(delta)
            if story.has_ended:
                self.ended[delta.request_id] = self.open.pop(delta.request_id)
                ended.append(story)
                self.reasons[str(delta.finish_reason)] += 1
        assert len(output.finished) == len(ended)
        return ended
