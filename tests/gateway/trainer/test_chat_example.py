from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.trainer.chat_example import ExampleInvalid, parse_example

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def line(*messages: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"messages": list(messages), **fields}).encode()


def test_content_parts_are_joined_and_weights_are_not_rendered() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    example = parse_example(line(USER, {"role": "assistant", "content": parts, "weight": 1}))
    assert [m.rendered() for m in example.messages] == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{not json", "Invalid JSON"),
        (b"[]", "Input should be an object"),
        (b"{}", "messages: Field required"),
        (line(USER), "messages: List should have at least 2 items"),
        (line(USER, USER), "the last message must be the assistant's"),
        (line(USER, {**ASSISTANT, "weight": 0}), "every assistant message has weight 0"),
        (line(USER, {**ASSISTANT, "weight": 2}), "messages[1].weight: Input should be 0 or 1"),
        (line({**USER, "weight": 1}, ASSISTANT), "messages[0].weight: Extra inputs are not permitted"),
        (line({"role": "robot", "content": "x"}, ASSISTANT), "messages[0]: Input tag 'robot'"),
        (line(USER, {"role": "assistant", "content": ""}), "messages[1]: an assistant message needs content"),
        (line({"role": "user", "content": 3}, ASSISTANT), "messages[0].content: Input should be a valid string"),
        (line(USER, ASSISTANT, model="x"), "model: Extra inputs are not permitted"),
    ],
)
def test_refusals_name_the_field(bad: bytes, reason: str) -> None:
    with pytest.raises(ExampleInvalid) as caught:
        parse_example(bad)
    assert reason in str(caught.value)
