"""How one request picks its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Final

from gateway.errors import InvalidRequest

_WHOLE_NUMBERS: Final = ("top_k", "seed", "n", "max_tokens", "min_tokens", "logprobs", "num_speculative_tokens")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters with OpenAI's and vLLM's names and meanings.

    temperature 0 is greedy. top_k 0 or -1 keeps all tokens. `stop` are strings at which the text ends (not included),
    `stop_token_ids` ids; a single string and lists are taken as tuples. `logprobs` is the number of top alternatives
    reported beside the sampled token (None: none at all; 0: the sampled token alone). `seed` makes a sequence
    reproducible: its random numbers depend on (seed, index, position) only. `num_speculative_tokens` is the most tokens
    that a step guesses ahead and verifies (0: none); it changes how soon tokens come, never which. Raises
    `InvalidRequest` naming the field that is out of range or no whole number.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    skip_special_tokens: bool = True
    num_speculative_tokens: int = 0

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", self.logit_bias or {})
        for name in _WHOLE_NUMBERS:
            _whole(name, getattr(self, name))
        for name, token_ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token_id in token_ids:
                _whole(name, token_id)
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("top_k", self.top_k, -1, 1 << 31)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 10.0)  # no finite logit may become infinite
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _within("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        _within("n", self.n, 1, 1 << 16)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, 1 << 31)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens if self.max_tokens is not None else 1 << 31)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, 1 << 16)
        _within("num_speculative_tokens", self.num_speculative_tokens, 0, 1 << 16)
        if any(not s for s in self.stop):
            raise InvalidRequest("stop strings must not be empty", param="stop")
        for bias in self.logit_bias.values():
            _within("logit_bias", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < 1e-5


def _whole(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
        raise InvalidRequest(f"{name} must be a whole number, not {value!r}", param=name)


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    # NaN is neither above nor below anything.
    if value > high:
        bound = f"at most {high}"
    elif open_low and not value > low:
        bound = f"above {low}"
    elif not value >= low:
        bound = f"at least {low}"
    else:
        return
    raise InvalidRequest(f"{name} must be {bound}, not {value}", param=name)
