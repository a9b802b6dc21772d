"""From what a caller sent to token ids: chat template, tokenizer, and the checks on the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from gateway.engine.request import GenerateRequest
from gateway.errors import ContextLengthExceeded, InvalidRequest


class PromptEncoder:
    """Encodes prompts for one tokenizer. Thread-safe: a fast tokenizer's encode and the template renderer are pure.

    The chat template is the base's own, never a tenant's, rendered in transformers' sandbox.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, max_model_len: int, default_max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.default_max_tokens = default_max_tokens

    def encode(self, request: GenerateRequest) -> list[int]:
        """The prompt's token ids.

        Raises `InvalidRequest` for an empty prompt, ids outside the vocabulary (also in logit_bias and stop ids) or
        messages that the template refuses, and `ContextLengthExceeded` when there is no room for one token.
        """
        if request.messages is not None:
            token_ids = self._chat(request.messages)
        elif isinstance(request.prompt, str):
            token_ids = self.tokenizer.encode(request.prompt)
        else:
            token_ids = list(request.prompt or ())
        self._check(request, token_ids, "messages" if request.messages is not None else "prompt")
        self._check_ids(request.sampling.logit_bias, "logit_bias")
        self._check_ids(request.sampling.stop_token_ids, "stop_token_ids")
        return token_ids

    def max_tokens(self, request: GenerateRequest, num_prompt: int) -> int:
        """How many tokens each sequence may generate: what was asked, which must fit, or the default cut to fit."""
        room = self._room(request) - num_prompt
        asked = request.sampling.max_tokens
        if asked is not None and asked > room:
            raise ContextLengthExceeded(
                f"{self._context(request)}; the prompt has {num_prompt} and max_tokens asks for {asked}. Shorten the "
                f"prompt or ask for at most {room}.",
                param="max_tokens",
            )
        return asked or min(room, max(self.default_max_tokens, request.sampling.min_tokens))

    def _chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise InvalidRequest("This base has no chat template; use the completions endpoint.", param="messages")
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(f"The chat template refused the messages: {error}", param="messages") from error
        # The template writes the special tokens itself.
        token_ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return token_ids

    def _room(self, request: GenerateRequest) -> int:
        """For the prompt and what is generated."""
        return self.max_model_len - request.num_virtual_tokens

    def _context(self, request: GenerateRequest) -> str:
        text = f"This model's context is {self.max_model_len} tokens"
        virtual = request.num_virtual_tokens
        return f"{text}, of which the adapter's virtual tokens take {virtual}" if virtual else text

    def _check(self, request: GenerateRequest, token_ids: list[int], param: str) -> None:
        if not token_ids:
            raise InvalidRequest(f"{param} is empty; send at least one token.", param=param)
        self._check_ids(token_ids, param)
        if len(token_ids) >= self._room(request):
            raise ContextLengthExceeded(f"{self._context(request)}; the prompt has {len(token_ids)}.", param=param)

    def _check_ids(self, token_ids: Iterable[int], param: str) -> None:
        if any(not 0 <= token_id < self.vocab_size for token_id in token_ids):
            raise InvalidRequest(f"{param}: token ids must be in [0, {self.vocab_size}).", param=param)
