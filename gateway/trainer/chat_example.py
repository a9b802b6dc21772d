"""One line of a training file: OpenAI's chat format, parsed by a closed schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MAX_MESSAGES = 1024


class ExampleInvalid(ValueError):
    """One line of a training file cannot be trained on; the text says why."""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TextPart(_Closed):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class _Message(_Closed):
    name: str | None = None

    def rendered(self) -> dict[str, Any]:
        """The message as a chat template takes it: content as one string, absent fields left out."""
        fields = self.model_dump(exclude_none=True, exclude={"weight"})
        content = fields.get("content", "")
        if not isinstance(content, str):
            fields["content"] = "".join(part["text"] for part in content)
        return fields


class PromptMessage(_Message):
    """What the assistant answers to."""

    role: Literal["system", "user"]
    content: str | list[TextPart]


class ToolMessage(_Message):
    """The result of a tool that the assistant called."""

    role: Literal["tool"]
    content: str | list[TextPart]
    tool_call_id: str


class AssistantMessage(_Message):
    """What the model learns to say; `weight` 0 shows the message and learns nothing from it."""

    role: Literal["assistant"]
    content: str | list[TextPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    weight: Literal[0, 1] = 1

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if not self.content and not self.tool_calls:
            raise ValueError("an assistant message needs content or tool_calls")
        return self


Message = Annotated[PromptMessage | ToolMessage | AssistantMessage, Field(discriminator="role")]


class ChatExample(_Closed):
    """One conversation. It ends with the assistant, and at least one assistant message has weight 1."""

    messages: list[Message] = Field(min_length=2, max_length=MAX_MESSAGES)
    tools: list[dict[str, Any]] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _teaches_something(self) -> ChatExample:
        if self.messages[-1].role != "assistant":
            raise ValueError("the last message must be the assistant's")
        if not any(isinstance(m, AssistantMessage) and m.weight for m in self.messages):
            raise ValueError("every assistant message has weight 0, so nothing would be learnt")
        return self

    @property
    def uses_tools(self) -> bool:
        """Whether rendering the conversation needs a chat template that knows tools."""
        return bool(self.tools) or any(
            isinstance(m, ToolMessage) or (isinstance(m, AssistantMessage) and m.tool_calls) for m in self.messages
        )


def parse_example(line: bytes) -> ChatExample:
    """Parse one JSONL line. Raises `ExampleInvalid` naming the field at fault."""
    try:
        return ChatExample.model_validate_json(line)
    except ValidationError as error:
        raise ExampleInvalid(_reason(error)) from None


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    message = str(first["msg"]).removeprefix("Value error, ")
    where = _path(first["loc"])
    return f"{where}: {message}" if where else message


def _path(loc: Sequence[int | str]) -> str:
    # pydantic adds the chosen role and the union's member to the path; the person wants the JSON path.
    roles = {"system", "user", "tool", "assistant"}
    path = ""
    for i, part in enumerate(loc):
        if isinstance(part, int):
            path += f"[{part}]"
        elif not (i and isinstance(loc[i - 1], int) and part in roles) and "[" not in part and part != "str":
            path += f".{part}" if path else part
    return path
