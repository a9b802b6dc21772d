"""A training file's conversations as token ids, with the tokens to learn marked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray

from gateway.errors import InvalidRequest
from gateway.trainer.chat_example import AssistantMessage, ChatExample, ExampleInvalid, parse_example

MIN_EXAMPLES = 10
MAX_LINE_BYTES = 8 << 20
MAX_REPORTED = 20


class TrainingFileInvalid(InvalidRequest):
    """A training or validation file was refused. `lines` are the line numbers at fault, from 1."""

    def __init__(self, message: str, *, param: str, lines: Sequence[int] = ()) -> None:
        super().__init__(message, param=param)
        self.lines = tuple(lines)


@dataclass(frozen=True, eq=False)
class TokenizedExample:
    """input_ids: int32 [n]. loss_mask: bool [n], true where the token is the assistant's to learn."""

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.input_ids)


class ChatTokenizer:
    """Renders conversations with the base's own chat template and marks the assistant's tokens.

    Each assistant turn is tokenized as serving does it: the prompt is `messages` before the turn with the generation
    prompt, and the completion is what the template adds for the turn, up to and including its end-of-turn token. Turns
    are joined into one example while each prompt continues the tokens before it; a template that rewrites earlier
    turns (one that drops old reasoning, say) gives an example for each turn instead.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.all_special_ids) | {
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def tokenize(self, example: ChatExample) -> list[TokenizedExample]:
        """One or more tokenized examples. Raises `ExampleInvalid` where the template cannot take the conversation."""
        if example.uses_tools and "tool" not in str(self._tokenizer.chat_template):
            raise ExampleInvalid("the base's chat template has no tools; remove tools, tool_calls and tool messages")
        messages = [message.rendered() for message in example.messages]
        done: list[TokenizedExample] = []
        ids: list[int] = []
        mask: list[bool] = []
        for k, message in enumerate(example.messages):
            if not isinstance(message, AssistantMessage):
                continue
            prompt, completion = self._turn(messages, k, example.tools)
            if prompt[: len(ids)] != ids:
                done.append(_example(ids, mask))
                ids, mask = [], []
            mask += [False] * (len(prompt) - len(ids)) + [bool(message.weight)] * len(completion)
            ids = prompt + completion
        done.append(_example(ids, mask))
        learnable = [each for each in done if each.loss_mask.any()]
        if not learnable:
            raise ExampleInvalid("no token to learn is left: nothing comes before the assistant's only turn")
        return learnable

    def _turn(
        self, messages: Sequence[dict[str, Any]], k: int, tools: list[dict[str, Any]] | None
    ) -> tuple[list[int], list[int]]:
        prompt_text = self._render(messages[:k], tools, add_generation_prompt=True)
        full_text = self._render(messages[: k + 1], tools, add_generation_prompt=False)
        if not full_text.startswith(prompt_text):
            raise ExampleInvalid(
                f"messages[{k}]: the base's chat template does not render this conversation as a continuation of "
                "its prompt, so the assistant's tokens cannot be told apart"
            )
        prompt, full = self._encode(prompt_text), self._encode(full_text)
        if full[: len(prompt)] == prompt:
            completion = full[len(prompt) :]
        else:  # a token spans the border; serving would see the prompt's own tokens, so split there
            completion = self._encode(full_text[len(prompt_text) :])
        return prompt, self._through_end_of_turn(completion, k)

    def _through_end_of_turn(self, completion: list[int], k: int) -> list[int]:
        ends = [i for i, token in enumerate(completion) if token in self._special_ids]
        if not ends:
            raise ExampleInvalid(
                f"messages[{k}]: the base's chat template does not end the assistant's turn with a special token, "
                "so the model would never learn to stop"
            )
        return completion[: ends[-1] + 1]

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None, *, add_generation_prompt: bool
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            raise ExampleInvalid(f"the base's chat template refuses the conversation: {error}") from None
        return str(text)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def load_chat_dataset(
    source: BinaryIO,
    tokenizer: Any,
    *,
    max_seq_len: int,
    param: str = "training_file",
    min_examples: int = MIN_EXAMPLES,
    check: Callable[[], None] = lambda: None,
) -> list[TokenizedExample]:
    """Read a JSONL file of chat examples. `check` is called before each line; what it raises ends the reading.

    Raises `TrainingFileInvalid` (with `param`, and the number of each bad line) for lines that are no chat example,
    that the chat template refuses, or that pass `max_seq_len` tokens; and for fewer than `min_examples` lines.
    """
    chat = ChatTokenizer(tokenizer)
    examples: list[TokenizedExample] = []
    errors: dict[int, str] = {}
    num_lines = 0
    for number, line in _lines(source):
        check()
        num_lines += 1
        try:
            examples += _fitting(chat.tokenize(parse_example(_bounded(line))), max_seq_len)
        except ExampleInvalid as error:
            errors[number] = str(error)
    if errors:
        raise TrainingFileInvalid(_report(errors), param=param, lines=list(errors))
    if num_lines < min_examples:
        raise TrainingFileInvalid(
            f"the file has {num_lines} examples; at least {min_examples} are needed.", param=param
        )
    return examples


def _lines(source: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with its number; of a line past the limit just enough to tell."""
    number = 0
    while line := source.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            _skip_line(source, line)
        if line.strip():
            yield number, line


def _skip_line(source: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = source.readline(MAX_LINE_BYTES)


def _bounded(line: bytes) -> bytes:
    if len(line) > MAX_LINE_BYTES:
        raise ExampleInvalid(f"the line is longer than {MAX_LINE_BYTES:,} bytes")
    return line


def _fitting(examples: list[TokenizedExample], max_seq_len: int) -> list[TokenizedExample]:
    for example in examples:
        if len(example) > max_seq_len:
            raise ExampleInvalid(f"the conversation has {len(example):,} tokens; the limit is {max_seq_len:,}")
    return examples


def _report(errors: dict[int, str]) -> str:
    shown = [f"line {number}: {reason}" for number, reason in list(errors.items())[:MAX_REPORTED]]
    more = len(errors) - len(shown)
    return "; ".join(shown) + (f"; and {more} more lines" if more > 0 else "")


def _example(ids: list[int], mask: list[bool]) -> TokenizedExample:
    mask = [False, *mask[1:]]  # nothing comes before the first token, so nothing can predict it
    return TokenizedExample(np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=np.bool_))
