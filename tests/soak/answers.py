"""What every content says to every prompt, by `peft` alone: greedy, so that an answer shows what made it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from tests.tiny import load_oracle, make_adapter

BLOCK = 16
HEAD, TAIL = 2 * BLOCK, BLOCK  # prompts share heads, and so blocks of the prefix cache
SHORTEST, LONGEST = 8, 48  # tokens of an answer
NUM_HEADS = 3
_CLEAR = 1e-3  # between the two likeliest logits: batches round alike to some 1e-5
_VOCABULARY = (3, 259)  # no special tokens


@dataclass(frozen=True)
class Content:
    """An adapter of which versions are made; `folder` None is the bare base. tokens: its answer to each prompt."""

    name: str
    folder: Path | None
    tokens: tuple[tuple[int, ...], ...] = ()


class Answers:
    """Prompts that any two contents answer differently within `SHORTEST` tokens, and all their answers.

    telltale: of all ways in which blocks of one content may come before another's, the share that changes those tokens.
    """

    def __init__(self, base: Path, folder: Path, num_contents: int, num_prompts: int) -> None:
        torch.set_num_threads(1)
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        folders = [
            make_adapter(base, folder / f"content-{i}", rank=(4, 8, 16)[i % 3], seed=i) for i in range(num_contents)
        ]
        models = [load_oracle(base), *(load_oracle(base, path) for path in folders)]
        prompts = _draw_prompts(3 * num_prompts)
        prompts[:, -1] = self._tokenizer.encode("e")[0]  # no half of a character, which answers would complete
        answers = [_answer(model, prompts) for model in models]
        clear = torch.stack([is_clear for _, is_clear in answers]).all(0)
        told = [[self.text(tokens[i][:SHORTEST]) for tokens, _ in answers] for i in range(len(prompts))]
        kept = [i for i, texts in enumerate(told) if clear[i] and len(set(texts)) == len(texts)][:num_prompts]
        assert len(kept) == num_prompts, f"only {len(kept)} prompts are clear"
        self.prompts: list[list[int]] = prompts[kept].tolist()
        named = zip(["base", *(path.name for path in folders)], [None, *folders], answers, strict=True)
        self.base, *self.contents = (
            Content(name, path, tuple(tokens[i] for i in kept)) for name, path, (tokens, _) in named
        )
        self.telltale = _telltale(models, prompts[kept], [self.base, *self.contents])

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as an answer shows them."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def _draw_prompts(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    heads = torch.randint(*_VOCABULARY, (NUM_HEADS, HEAD), generator=generator)
    tails = torch.randint(*_VOCABULARY, (count, TAIL), generator=generator)
    return torch.cat([heads[torch.arange(count) % NUM_HEADS], tails], dim=1)


def _answer(model: Any, prompts: torch.Tensor) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """Greedy tokens for each prompt, and whether they are the clear choice all the way."""
    tokens, margins = _continue(model, prompts, None, LONGEST)
    return [tuple(row) for row in tokens.tolist()], margins.amin(1) > _CLEAR


@torch.inference_mode()
def _continue(model: Any, ids: torch.Tensor, cache: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens after `ids`, which come after what the cache has, and the margin of each. [rows, count]"""
    tokens, margins = [], []
    for _ in range(count):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, (best, second) = out.past_key_values, out.logits[:, -1].topk(2).values.unbind(1)
        ids = out.logits[:, -1:].argmax(-1)
        tokens.append(ids)
        margins.append((best - second)[:, None])
    return torch.cat(tokens, 1), torch.cat(margins, 1)


@torch.inference_mode()
def _telltale(models: Sequence[Any], prompts: torch.Tensor, contents: Sequence[Content]) -> float:
    changed = []
    for length in (BLOCK, HEAD):
        caches = [model(input_ids=prompts[:, :length], use_cache=True).past_key_values for model in models]
        for (own, model), (stale, cache) in product(enumerate(models), enumerate(caches)):
            if own == stale:
                continue
            tokens, _ = _continue(model, prompts[:, length:], copy.deepcopy(cache), SHORTEST)
            wanted = torch.tensor([answer[:SHORTEST] for answer in contents[own].tokens])
            changed.append((tokens != wanted).any(1))
    return float(torch.cat(changed).float().mean())
