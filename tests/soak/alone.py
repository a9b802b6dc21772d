"""What a request gives when nobody else is served: the oracle of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from gateway.engine import draws
from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import GenerateRequest
from tests.soak.ledger import Ledger, Story
from tests.soak.traffic import World, quiet_config

_SAME_NUMBER = 1e-5  # of two shares of a distribution, which rounding moves likewise
_NEAR = 1e-3  # of two log probabilities that rounding, which depends on who else is in the batch, may swap


class Alone:
    """A quiet engine, for one request at a time."""

    def __init__(self, world: World, device: str, adapter_dtype: Any) -> None:
        self.engine = LLMEngine(quiet_config(world, device, adapter_dtype=adapter_dtype), world.blobs, lambda: None)

    def check(self, story: Story) -> int:
        """Assert that a request got what it gets alone, as far as it came. Returns the number of tokens compared."""
        alone = self._serve(story.request)
        return sum(self._check(story, alone, index) for index in range(story.request.sampling.n))

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def _check(self, story: Story, alone: Story, index: int) -> int:
        got, wanted = story.tokens(index), alone.tokens(index)
        same = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), None)
        if same is not None:
            self._check_near(story.request, wanted[:same], {got[same], wanted[same]})
            return same
        if story.reason(index) in ("cancelled", "error"):
            assert len(got) <= len(wanted)
            assert alone.text(index).startswith(story.text(index))
            return len(got)
        assert (got, story.text(index), story.reason(index)) == (wanted, alone.text(index), alone.reason(index))
        return len(got)

    def _check_near(self, request: GenerateRequest, tokens: list[int], rivals: set[int]) -> None:
        """Assert that the model finds both tokens as likely, after these."""
        told = f"{request} goes another way alone after {tokens}: one of {rivals}, the other with others"
        if not request.sampling.greedy:
            assert self._are_neighbours(request, *sorted(rivals)), told
            return
        assert is_plain(request), told
        params = replace(request.sampling, n=1, max_tokens=1, logprobs=2, min_tokens=0)
        prompt = [*self.engine.encode(request), *tokens]
        again = self._serve(replace(request, sampling=params, prompt=prompt, messages=None))
        (first, _, best), (second, _, next_best) = again.deltas[0][0].logprobs[0].top
        assert {first, second} == rivals, told
        assert best - next_best < _NEAR, told

    def _are_neighbours(self, request: GenerateRequest, first: int, second: int) -> bool:
        """Whether a number is drawn where one token's share ends and the other's begins."""
        drawn: list[tuple[Tensor, Tensor]] = []

        def draw(probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
            drawn.append((probs.double(), uniforms))
            return invert(probs, uniforms)

        invert = draws.draw_tokens
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(draws, "draw_tokens", draw)
            self._serve(request)
        borders = [(probs.cumsum(-1)[:, [first, second - 1]] / probs.sum(-1, keepdim=True), u) for probs, u in drawn]
        return any(bool(((border - u).abs() < _SAME_NUMBER).all(-1).any()) for border, u in borders)

    def _serve(self, request: GenerateRequest) -> Story:
        ledger = Ledger()
        prompt = self.engine.encode(request)
        ledger.accept(request, len(prompt), may_fail=False)
        self.engine.add(request, prompt)
        while self.engine.has_work:
            ledger.take(self.engine.step())
        return ledger.ended[request.request_id]


def is_plain(request: GenerateRequest) -> bool:
    """Whether a request's tokens are the model's likeliest, without any of the parameters that change logits."""
    p = request.sampling
    penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
    return p.greedy and penalties == (1.0, 0.0, 0.0) and not p.logit_bias and not p.min_tokens


def is_reproducible(request: GenerateRequest) -> bool:
    """Whether a request gives the same tokens each time."""
    return request.sampling.greedy or request.sampling.seed is not None
