"""Chats and documents packed into rows of one length: token ids and which of them are trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from random import Random

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gateway.embedded.instructions import Sources, chats
from gateway.embedded.tokenizer import BOS, END, PAD, render_turns

Example = tuple[list[int], list[bool]]  # token ids, beginning with <|bos|>; trained on or not
_CHUNK = 2000


@dataclass(frozen=True)
class Rows:
    """ids int16 [num_rows, length]; trained bool, the same shape: whether the token counts in the loss."""

    ids: NDArray[np.int16]
    trained: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)


def encode_chat(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> Example:
    """Token ids of one chat; only the assistant's answers (with their <|im_end|>) are trained on."""
    ids: list[int] = []
    trained: list[bool] = []
    for text, is_answer in render_turns(messages):
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        trained += [is_answer] * len(piece)
    return ids, trained


def pack(examples: Iterable[Example], length: int, pad: int) -> Rows:
    """Fill rows with whole examples, in order; what is left of a row is padding. Longer examples are dropped."""
    rows: list[Example] = []
    for ids, trained in examples:
        if len(ids) > length:
            continue
        if not rows or len(rows[-1][0]) + len(ids) > length:
            rows.append(([], []))
        rows[-1][0].extend(ids)
        rows[-1][1].extend(trained)
    ids_out = np.full((len(rows), length), pad, dtype=np.int16)
    trained_out = np.zeros((len(rows), length), dtype=np.bool_)
    for index, (ids, trained) in enumerate(rows):
        ids_out[index, : len(ids)] = ids
        trained_out[index, : len(ids)] = trained
    return Rows(ids_out, trained_out)


def text_rows(tokenizer: Tokenizer, documents: list[str], length: int, passes: int, seed: int) -> Rows:
    """`passes` times the corpus, each time cut at other places into pieces of up to `length` tokens."""
    random, pad = Random(seed), _id(tokenizer, PAD)
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(documents, add_special_tokens=False)]
    bos, end = _id(tokenizer, BOS), _id(tokenizer, END)
    return pack(_pieces(encoded, length, passes, random, bos, end), length, pad)


def _pieces(
    encoded: list[list[int]], length: int, passes: int, random: Random, bos: int, end: int
) -> Iterator[Example]:
    for _ in range(passes):
        random.shuffle(encoded)
        for ids in encoded:
            tokens, at = [*ids, end], 0
            while at < len(tokens):
                size = random.randint(length // 4, length - 1)
                piece = [bos, *tokens[at : at + size]]
                yield piece, [False] + [True] * (len(piece) - 1)
                at += size


def chat_rows(
    tokenizer: Tokenizer,
    sources: Sources,
    length: int,
    num_chats: int,
    seed: int,
    workers: int,
    finishing: bool = False,
) -> Rows:
    """`num_chats` generated chats, made by `workers` processes; the same for any number of workers."""
    serialized, shards = tokenizer.to_str(), range(-(-num_chats // _CHUNK))
    jobs = [(serialized, sources, length, seed * 1_000_003 + shard, finishing) for shard in shards]
    with get_context("spawn").Pool(workers) as pool:
        parts = pool.map(_chat_shard, jobs, chunksize=8)
    return Rows(np.concatenate([part.ids for part in parts]), np.concatenate([part.trained for part in parts]))


def _chat_shard(job: tuple[str, Sources, int, int, bool]) -> Rows:
    serialized, sources, length, seed, finishing = job
    tokenizer = Tokenizer.from_str(serialized)
    examples = (encode_chat(tokenizer, chat) for chat in islice(chats(seed, sources, finishing), _CHUNK))
    return pack(examples, length, _id(tokenizer, PAD))


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found
