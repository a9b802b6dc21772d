"""Greedy answers of a transformers model and their exact-match accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

Chat = list[dict[str, str]]


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Chat],
    max_new_tokens: int = 96,
    batch_size: int = 128,
) -> list[str]:
    """The greedy answer to each prompt (messages that end with the user's), in batches padded on the left."""
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer.apply_chat_template(
            list(prompts[start : start + batch_size]),
            add_generation_prompt=True,
            padding=True,
            tokenizer_kwargs={"padding_side": "left"},
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        made = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)
        answers += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat]) -> float:
    """The share of chats whose last answer the model gives exactly, from the messages before it."""
    given = answer(model, tokenizer, [chat[:-1] for chat in chats])
    return sum(text == chat[-1]["content"] for text, chat in zip(given, chats, strict=True)) / len(chats)
