from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch

from gateway.trainer.batches import collate, micro_batches, shuffled_batches
from gateway.trainer.chat_example import ExampleInvalid, parse_example
from gateway.trainer.dataset import ChatTokenizer, TokenizedExample, TrainingFileInvalid, load_chat_dataset
from tests.gateway.trainer.tiny import colour_lines, make_tokenizer

# Drops <think>...</think> from all turns but the last, as reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt ends in a space, which the tokenizer would join to the answer's first word.
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def chat(*turns: tuple[str, str] | tuple[str, str, int]) -> Any:
    names = ("role", "content", "weight")
    messages = [dict(zip(names, turn, strict=False)) for turn in turns]
    return parse_example(json.dumps({"messages": messages}).encode())


def learnt(tokenizer: Any, example: TokenizedExample) -> str:
    return str(tokenizer.decode(example.input_ids[example.loss_mask]))


def test_the_loss_is_on_the_assistants_tokens_of_every_turn() -> None:
    tokenizer = make_tokenizer()
    turns = [("system", "code"), ("user", "red?"), ("assistant", "code 0."), ("user", "red?"), ("assistant", "code 1.")]
    (example,) = ChatTokenizer(tokenizer).tokenize(chat(*turns))
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.input_ids) == rendered.removesuffix("\n")
    assert learnt(tokenizer, example) == "code 0.<|im_end|>code 1.<|im_end|>"
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert not example.loss_mask[example.input_ids == start].any()


def test_a_message_of_weight_0_is_shown_and_not_learnt() -> None:
    tokenizer = make_tokenizer()
    turns = [("user", "red?"), ("assistant", "code 0.", 0), ("user", "red?"), ("assistant", "code 1.")]
    (example,) = ChatTokenizer(tokenizer).tokenize(chat(*turns))
    assert "code 0." in tokenizer.decode(example.input_ids)
    assert learnt(tokenizer, example) == "code 1.<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_gives_an_example_a_turn() -> None:
    tokenizer = make_tokenizer(FORGETFUL)
    turns = [("user", "red?"), ("assistant", "hm</think>code 0."), ("user", "red?"), ("assistant", "code 1.")]
    first, second = ChatTokenizer(tokenizer).tokenize(chat(*turns))
    assert learnt(tokenizer, first) == "hm</think>code 0.<|im_end|>"
    assert "hm" not in tokenizer.decode(second.input_ids)
    assert learnt(tokenizer, second) == "code 1.<|im_end|>"


def test_the_prompts_tokens_are_those_that_serving_sees() -> None:
    tokenizer = make_tokenizer(PLAIN)
    (example,) = ChatTokenizer(tokenizer).tokenize(chat(("user", "red?"), ("assistant", "code 0.")))
    prompt = tokenizer("user: red?<|im_end|>\nassistant: ", add_special_tokens=False)["input_ids"]
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert learnt(tokenizer, example) == "code 0.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        ("{% if add_generation_prompt %}say:{% else %}done{% endif %}", "cannot be told apart"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "would never learn to stop"),
    ],
)
def test_unusable_templates_are_named(template: str, reason: str) -> None:
    with pytest.raises(ExampleInvalid, match=reason):
        ChatTokenizer(make_tokenizer(template)).tokenize(chat(("user", "red?"), ("assistant", "code 0.")))


def test_tools_need_a_template_that_knows_them() -> None:
    turns = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "tools": [{}]}
    with pytest.raises(ExampleInvalid, match="has no tools"):
        ChatTokenizer(make_tokenizer()).tokenize(parse_example(json.dumps(turns).encode()))


def test_every_bad_line_is_reported_with_its_number() -> None:
    lines = colour_lines(12).splitlines()
    lines[2] = b"{"
    lines.insert(5, b"")
    lines[9] = json.dumps({"messages": [{"role": "user", "content": "no answer"}] * 2}).encode()
    lines[11] = json.dumps(
        {"messages": [{"role": "user", "content": "red " * 200}, {"role": "assistant", "content": "y"}]}
    ).encode()
    with pytest.raises(TrainingFileInvalid) as caught:
        load_chat_dataset(io.BytesIO(b"\n".join(lines)), make_tokenizer(), max_seq_len=64)
    assert caught.value.lines == (3, 10, 12)
    assert caught.value.param == "training_file"
    for part in ("line 3: Invalid JSON", "line 10: the last message", "tokens; the limit is 64"):
        assert part in caught.value.message


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(TrainingFileInvalid, match="the file has 9 examples; at least 10 are needed"):
        load_chat_dataset(io.BytesIO(colour_lines(9)), make_tokenizer(), max_seq_len=64)


def test_a_line_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.trainer.dataset.MAX_LINE_BYTES", 200)
    body = b'{"messages": "' + b"x" * 1000 + b'"}\n' + colour_lines(12)
    with pytest.raises(TrainingFileInvalid) as caught:
        load_chat_dataset(io.BytesIO(body), make_tokenizer(), max_seq_len=64)
    assert caught.value.lines == (1,)


def make_example(length: int, num_learnt: int) -> TokenizedExample:
    ids = torch.arange(1, length + 1, dtype=torch.int32).numpy()
    return TokenizedExample(ids, (torch.arange(length) >= length - num_learnt).numpy())


def test_positions_point_at_the_token_before_each_target() -> None:
    batch = collate([make_example(3, 1), make_example(5, 2)])
    assert batch.input_ids.tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert batch.positions.tolist() == [1, 7, 8]
    assert batch.targets.tolist() == [3, 4, 5]
    assert batch.num_tokens == 8


def test_an_epoch_holds_every_example_once_in_batches_of_like_lengths() -> None:
    examples = [make_example(4 + i % 40, 2) for i in range(100)]
    batches = list(shuffled_batches(examples, 8, torch.Generator().manual_seed(3)))
    assert sorted(map(id, (e for b in batches for e in b))) == sorted(map(id, examples))
    padded = sum(len(b) * max(map(len, b)) for b in batches)
    assert padded < 1.15 * sum(map(len, examples))
    again = list(shuffled_batches(examples, 8, torch.Generator().manual_seed(3)))
    assert [[len(e) for e in b] for b in again] == [[len(e) for e in b] for b in batches]


def test_micro_batches_keep_to_the_token_budget() -> None:
    examples = [make_example(length, 1) for length in (40, 10, 30, 20, 90)]
    batches = list(micro_batches(examples, max_tokens=64))
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 20), (1, 30), (1, 40), (1, 90)]
    assert sum(batch.num_tokens for batch in batches) == 190
