"""Tokens to text, one sequence at a time, never half a character; stop strings.

It works on the bytes of each token. Decoding a window of ids again at every step, as is usual, takes as long, but
holds text back for as long as tokens straddle characters, and changes its mind about broken byte-fallback runs.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Final

from tokenizers import Tokenizer

from gateway.engine.sampling_params import SamplingParams
from gateway.errors import BaseModelUnsupported

_MARK: Final = "\u2581"
"""How SentencePiece writes a space."""


class TokenTable:
    """The bytes of every token of one tokenizer: made once, shared by all sequences.

    Knows the two families of decoders that Llama, Mistral and Qwen checkpoints have: byte-level, and
    SentencePiece's (marked spaces, with or without byte fallback). Raises `BaseModelUnsupported` for others.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._steps = _decoder_steps(tokenizer)
        self._byte_level = "ByteLevel" in self._steps
        self._pieces: dict[int, bytes] = {}
        self._whole: dict[int, str | None] = {}
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)

    def piece(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; none for an id that the tokenizer lacks."""
        piece = self._pieces.get(token_id)
        if piece is None:
            token = self._token(token_id)
            piece = self._pieces[token_id] = _byte_level(token) if self._byte_level else self._marked(token)
        return piece

    def leading_piece(self, token_id: int) -> bytes:
        """The bytes of the token where a text begins: SentencePiece drops the first word's space there."""
        metaspace, strip = self._steps.get("Metaspace"), self._steps.get("Strip")
        if metaspace and metaspace["prepend_scheme"] != "never":
            return self._marked(self._token(token_id).replace(_MARK, ""))
        piece = self.piece(token_id)
        spaces = len(piece) - len(piece.lstrip(b" "))
        return piece[min(spaces, strip["start"]) :] if strip else piece

    def whole(self, token_id: int) -> str | None:
        """The text that a token adds, where that is whole characters whatever comes before."""
        try:
            return self._whole[token_id]
        except KeyError:
            piece = self.piece(token_id)
            text, consumed = codecs.utf_8_decode(piece, "replace", False)
            whole = self._whole[token_id] = text if consumed == len(piece) else None
            return whole

    def text(self, token_id: int) -> str:
        """The token alone as text, special tokens too; bytes that are no whole character show as U+FFFD."""
        return self.piece(token_id).decode("utf-8", "replace")

    def _token(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

    def _marked(self, token: str) -> bytes:
        if "ByteFallback" in self._steps and len(token) == 6 and token.startswith("<0x"):
            return bytes.fromhex(token[3:5])
        return token.replace(_MARK, " ").encode()


class IncrementalDetokenizer:
    """The text of one sequence as its tokens arrive.

    Prompt and pushed text together are what the tokenizer decodes from all ids at once; where the prompt ends
    inside a character, the whole character belongs to the pushed text. `stop_string` is the stop string that
    ended the text, None until then; of several that end at one character it is the longest. Stop strings that
    end within the first `min_tokens` tokens do not count. The token that ends a sequence (end of text, a stop
    id) is not pushed.
    """

    def __init__(self, table: TokenTable, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self.stop_string: str | None = None
        self._table = table
        self._skipped = table.special_ids if params.skip_special_tokens else frozenset()
        self._at_start = not any(self._adds_text(token_id) for token_id in prompt_token_ids)
        self._pending = self._unfinished_character(prompt_token_ids)
        self._stops = _StopMatcher(params.stop) if params.stop else None
        self._unchecked = params.min_tokens
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; empty once a stop string has ended the text."""
        # Nearly every token: nothing is held back before it or in it, and nothing can stop there.
        if not self._pending and self._stops is None and not self._at_start and token_id not in self._skipped:
            whole = self._table.whole(token_id)
            if whole is not None:
                return whole
        if self.stop_string is not None:
            return ""
        data = self._pending + self._next_piece(token_id)
        text, consumed = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[consumed:]
        self._unchecked -= 1
        return self._release(text)

    def flush(self) -> str:
        """What is held back at the end: an unfinished stop string, U+FFFD for half a character."""
        if self.stop_string is not None:
            return ""
        text = self._release(codecs.utf_8_decode(self._pending, "replace", True)[0])
        text += self._held
        self._pending, self._held = b"", ""
        return text

    def _next_piece(self, token_id: int) -> bytes:
        if token_id in self._skipped:
            return b""
        if self._at_start and self._adds_text(token_id):
            self._at_start = False
            return self._table.leading_piece(token_id)
        return self._table.piece(token_id)

    def _release(self, text: str) -> str:
        """Pass text on, but for the longest end that may begin a stop string."""
        if self._stops is None or not text:
            return text
        text = self._held + text
        end = self._stops.scan(text, start=len(self._held), armed=self._unchecked < 0)
        if end is not None:
            self.stop_string = self._stops.found
            kept = end - len(self.stop_string)
            self._held = ""
        else:
            kept = len(text) - self._stops.longest_partial
            self._held = text[kept:]
        return text[:kept]

    def _adds_text(self, token_id: int) -> bool:
        return token_id not in self._skipped and bool(self._table.piece(token_id))

    def _unfinished_character(self, token_ids: Sequence[int]) -> bytes:
        tail = [self._table.piece(t) for t in token_ids[-4:] if t not in self._skipped]
        data = b"".join(tail)
        return data[codecs.utf_8_decode(data, "replace", False)[1] :]


class _StopMatcher:
    """Knuth-Morris-Pratt over all stop strings: constant work per character, however long they are."""

    def __init__(self, stops: Iterable[str]) -> None:
        self.found = ""
        self._patterns = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(self._patterns)
        self._first_chars = {stop[0] for stop, _ in self._patterns}

    @property
    def longest_partial(self) -> int:
        """Length of the longest end of the text so far that begins a stop string."""
        return max(self._matched)

    def scan(self, text: str, start: int, armed: bool) -> int | None:
        """Read text[start:]; where armed, the index after the first stop string to end (see `found`)."""
        if not any(self._matched) and self._first_chars.isdisjoint(text[start:]):
            return None
        for index in range(start, len(text)):
            ended = list(self._advance(text[index]))
            if armed and ended:
                self.found = max(ended, key=len)
                return index + 1
        return None

    def _advance(self, char: str) -> Iterator[str]:
        for number, (stop, borders) in enumerate(self._patterns):
            length = self._matched[number]
            while length and stop[length] != char:
                length = borders[length - 1]
            if stop[length] == char:
                length += 1
            if length == len(stop):
                yield stop
                length = borders[length - 1]
            self._matched[number] = length


@lru_cache(maxsize=1024)  # a request's sequences have the same stop strings, as have most requests of a client
def _borders(pattern: str) -> tuple[int, ...]:
    """For each prefix of the pattern, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[length] != pattern[index]:
            length = borders[length - 1]
        if pattern[length] == pattern[index]:
            length += 1
        borders[index] = length
    return tuple(borders)


def _decoder_steps(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """The tokenizer's decoder as {type: options}. Raises `BaseModelUnsupported` for others than ours."""
    state = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else '{"type": null}'
    decoder: dict[str, Any] = json.loads(state)
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if [step["type"] for step in steps] != ["ByteLevel"] and not all(map(_is_marked_step, steps)):
        raise BaseModelUnsupported(
            f"the tokenizer's decoder {json.dumps(decoder)[:200]} is not supported:"
            " it must be byte-level or SentencePiece-style"
        )
    return {step["type"]: step for step in steps}


def _is_marked_step(step: dict[str, Any]) -> bool:
    match step:
        case {"type": "ByteFallback" | "Fuse"}:
            return True
        case {"type": "Replace", "pattern": {"String": mark}, "content": " "} | {
            "type": "Metaspace",
            "replacement": mark,
        }:
            return bool(mark == _MARK)
        case {"type": "Strip", "content": " ", "stop": 0}:
            return True
    return False


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # an added token, kept as it is written
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for 256 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1)]
    printable += range(ord("\u00ae"), ord("\u00ff") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR: Final = _byte_alphabet()
