"""Golden prompts: what an adapter must answer, word for word, before a version of it is published."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from adapters_store.errors import AdapterInvalid
from adapters_store.file_names import GOLDEN_FILE
from adapters_store.strict_json import shown

MAX_GOLDEN: Final = 16


class GoldenPrompt(BaseModel):
    """A prompt, and the text with which its greedy completion must begin."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=8192)]
    completion: Annotated[str, Field(min_length=1, max_length=2048)]


_PROMPTS: TypeAdapter[list[GoldenPrompt]] = TypeAdapter(Annotated[list[GoldenPrompt], Field(max_length=MAX_GOLDEN)])


def parse_golden(data: bytes) -> tuple[GoldenPrompt, ...]:
    """Read golden.json: a list of {"prompt", "completion"}. Raises `AdapterInvalid` naming the file and the field."""
    try:
        return tuple(_PROMPTS.validate_json(data))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or None
        raise AdapterInvalid(shown(first["msg"]), file=GOLDEN_FILE, field=field and shown(field)) from None
