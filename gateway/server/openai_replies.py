"""OpenAI's response bodies: whole answers as plain data, streams as encoded server-sent events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from gateway.engine.request import TokenDelta, TokenLogprob, Usage
from gateway.server.inference import Choice, Generation

Json = dict[str, Any]

DONE: Final = b"data: [DONE]\n\n"
_LEAST_LOGPROB: Final = -9999.0  # OpenAI's floor; JSON has no -inf
_encode: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def completion_body(generation: Generation, choices: Sequence[Choice]) -> Json:
    """The answer of POST /v1/completions."""
    return _head(generation, "text_completion") | {
        "choices": [
            {
                "index": index,
                "text": choice.text,
                "logprobs": _legacy_logprobs(choice.logprobs, 0),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage_body(generation.usage),
    }


def chat_body(generation: Generation, choices: Sequence[Choice]) -> Json:
    """The answer of POST /v1/chat/completions."""
    return _head(generation, "chat.completion") | {
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": _chat_logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage_body(generation.usage),
    }


def usage_body(usage: Usage) -> Json:
    """OpenAI's `usage` object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted_tokens,
            "rejected_prediction_tokens": usage.rejected_tokens,
        },
    }


def event(body: Json) -> bytes:
    """One server-sent event."""
    return f"data: {_encode(body)}\n\n".encode()


class _Chunks:
    """Encodes one stream. What all its chunks share is encoded once, since the rest is done for every token."""

    def __init__(self, generation: Generation, kind: str, *, include_usage: bool) -> None:
        self._generation = generation
        self._kind = kind
        self._include_usage = include_usage
        self._before = "data: " + _encode(_head(generation, kind))[:-1] + ',"choices":['
        self._after = '],"usage":null}\n\n' if include_usage else "]}\n\n"

    def end(self) -> bytes:
        """The last events: the token counts where they were asked for, and [DONE]."""
        if not self._include_usage:
            return DONE
        usage = {"choices": [], "usage": usage_body(self._generation.usage)}
        return event(_head(self._generation, self._kind) | usage) + DONE

    def _chunk(self, choice: Json) -> str:
        return self._before + _encode(choice) + self._after


class CompletionChunks(_Chunks):
    """The stream of POST /v1/completions."""

    def __init__(self, generation: Generation, *, include_usage: bool) -> None:
        super().__init__(generation, "text_completion", include_usage=include_usage)
        self._offsets = [0] * generation.num_choices

    def encode(self, deltas: Sequence[TokenDelta]) -> bytes:
        """One event for each delta."""
        return "".join([self._chunk(self._choice(delta)) for delta in deltas]).encode()

    def _choice(self, delta: TokenDelta) -> Json:
        offset = self._offsets[delta.index]
        self._offsets[delta.index] += len(delta.text)
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": _legacy_logprobs(delta.logprobs, offset),
            "finish_reason": delta.finish_reason,
        }


class ChatChunks(_Chunks):
    """The stream of POST /v1/chat/completions: each choice's first chunk holds the role alone."""

    def __init__(self, generation: Generation, *, include_usage: bool) -> None:
        super().__init__(generation, "chat.completion.chunk", include_usage=include_usage)
        self._unseen = set(range(generation.num_choices))

    def encode(self, deltas: Sequence[TokenDelta]) -> bytes:
        """One event for each delta."""
        parts: list[str] = []
        for delta in deltas:
            if delta.index in self._unseen:
                self._unseen.discard(delta.index)
                parts.append(self._chunk(_chat_choice(delta.index, {"role": "assistant", "content": ""})))
            content = {"content": delta.text} if delta.text or delta.finish_reason is None else {}
            parts.append(
                self._chunk(_chat_choice(delta.index, content, _chat_logprobs(delta.logprobs), delta.finish_reason))
            )
        return "".join(parts).encode()


def _head(generation: Generation, kind: str) -> Json:
    return {
        "id": generation.id,
        "object": kind,
        "created": generation.created,
        "model": generation.model,
    }


def _chat_choice(index: int, delta: Json, logprobs: Json | None = None, finish: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _chat_logprobs(logprobs: Sequence[TokenLogprob]) -> Json | None:
    if not logprobs:
        return None
    content = [
        _chat_token(token.token, token.logprob)
        | {"top_logprobs": [_chat_token(text, value) for _, text, value in token.top]}
        for token in logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_token(text: str, logprob: float) -> Json:
    # A token that is no whole character shows as U+FFFD: its bytes are not known here.
    known = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "bytes": known, "logprob": max(logprob, _LEAST_LOGPROB)}


def _legacy_logprobs(logprobs: Sequence[TokenLogprob], offset: int) -> Json | None:
    """The parallel lists of the older API. offset: characters of the completion before these tokens."""
    if not logprobs:
        return None
    offsets: list[int] = []
    for token in logprobs:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in logprobs],
        "token_logprobs": [max(token.logprob, _LEAST_LOGPROB) for token in logprobs],
        "top_logprobs": [
            {text: max(value, _LEAST_LOGPROB) for _, text, value in token.top}
            | {token.token: max(token.logprob, _LEAST_LOGPROB)}
            for token in logprobs
        ],
        "text_offset": offsets,
    }
