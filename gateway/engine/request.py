"""What goes into an engine and what comes out: plain data that crosses process boundaries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from adapters_store.manifest import AdapterManifest
from gateway.engine.sampling_params import SamplingParams
from gateway.errors import InvalidRequest

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One immutable adapter version: what the engine needs to find, load and key it.

    name: "tenant/name:3", for logs and metrics. digest: sha256 hex of the content, the key of the blob and of caches.
    num_virtual_tokens: of its own, before every prompt (prompt, P- and prefix tuning).
    """

    name: str
    digest: str
    rank: int
    num_virtual_tokens: int = 0

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.name.partition("/")[0]

    @classmethod
    def of(cls, name: str, manifest: AdapterManifest) -> Self:
        """The adapter of a manifest."""
        return cls(name, manifest.digest, manifest.rank, manifest.num_virtual_tokens)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One call. Exactly one of `prompt` (text or token ids) and `messages` (chat) is set.

    cache_salt separates prefix caches: requests share pages only under the same salt (the tenant's id). priority: lower
    runs earlier, and may take the place of what runs. tenant_weight: the tenant's share of the engine beside others of
    the same priority. Raises `InvalidRequest` when that is not a positive number.
    """

    request_id: str
    sampling: SamplingParams
    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    adapter: AdapterRef | None = None
    tenant: str = ""
    cache_salt: str = ""
    priority: int = 0
    tenant_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.tenant_weight < math.inf:
            raise InvalidRequest(
                f"tenant_weight must be a positive number, not {self.tenant_weight}", param="tenant_weight"
            )

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens that the adapter puts before the prompt."""
        return self.adapter.num_virtual_tokens if self.adapter is not None else 0

    @property
    def num_chars(self) -> int:
        """Characters that are to be made tokens; 0 where `prompt` is token ids."""
        if self.messages is not None:
            return sum(len(str(message.get("content", ""))) for message in self.messages)
        return len(self.prompt) if isinstance(self.prompt, str) else 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log probability of one token, and of the top alternatives at its position."""

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one finished request (all of its `n` sequences together), without an adapter's virtual tokens.

    accepted_tokens, rejected_tokens: of those that were guessed ahead; the rejected are in no other count.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    accepted_tokens: int = 0
    rejected_tokens: int = 0


@dataclass(slots=True)
class TokenDelta:
    """What one engine step added to one sequence of one request.

    index: which of the request's `n` sequences. text: new text, never half a character. finish_reason: set on the
    sequence's last delta. usage: set on the last delta of the whole request. error: the exception that ended the
    request, with finish_reason "error".
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: BaseException | None = None
