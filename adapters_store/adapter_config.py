"""What the closed schemas of all kinds of `adapter_config.json` share.

The file is never handed to peft, which imports modules and opens files that it names. A field is served, or
inert and dropped, or refused by name with the reason; any other field is unknown and refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from adapters_store.adapter_contents import AdapterContents
from adapters_store.base_spec import LINEARS, BaseSpec
from adapters_store.errors import AdapterInvalid
from adapters_store.file_names import CONFIG_FILE
from adapters_store.manifest import Kind
from adapters_store.module_matching import choose, refuse
from adapters_store.strict_json import shown

Pattern = Annotated[StrictStr, Field(min_length=1, max_length=1024)]
ManyPatterns = Annotated[tuple[Pattern, ...], Field(max_length=4096)]
Rank = Annotated[StrictInt, Field(ge=1, le=1 << 16)]
Alpha = Annotated[float, Field(strict=True, ge=-1e6, le=1e6, allow_inf_nan=False)]

# How it was made, or where its base lay: never opened, never imported.
_INERT: Final = frozenset({"auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"})
_FAN_IN_FAN_OUT: Final = "transposed weights do not occur in the served base; set fan_in_fan_out=false"


class AdapterConfig(BaseModel, ABC):
    """What the schemas of all kinds have in common.

    inert: further fields that say nothing to who serves. refused: those that may only be empty or false, with reasons.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[Kind]
    inert: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Self:
        """From the file's fields. Raises `AdapterInvalid` naming the one at fault."""
        for field, reason in {"fan_in_fan_out": _FAN_IN_FAN_OUT, **cls.refused}.items():
            if raw.pop(field, None) not in (None, False, "", [], {}):
                raise refuse(field, reason)
        left = {field: value for field, value in raw.items() if field not in _INERT | cls.inert}
        try:
            return cls.model_validate({field: value for field, value in left.items() if value is not None})
        except ValidationError as error:
            raise _refusal(error, cls.kind) from None

    @abstractmethod
    def contents(self, base: BaseSpec) -> AdapterContents:
        """What an upload with this config must hold. Raises `AdapterInvalid` naming the field at fault."""

    def rank_field(self, rank: int) -> str:
        """The field that a rank comes from."""
        return "r"


class TargetedConfig(AdapterConfig):
    """Of kinds that change modules. Patterns are a tenant's regular expressions: match only when confined."""

    target_modules: ManyPatterns | Pattern
    modules_to_save: ManyPatterns = ()


class LayeredConfig(TargetedConfig):
    """Of kinds that change linears, of which two fields may choose the layers."""

    layers_to_transform: tuple[StrictInt, ...] | StrictInt | None = None
    layers_pattern: ManyPatterns | Pattern | None = None

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Self:
        config = super().parse(raw)
        if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
            raise refuse("layers_to_transform", "cannot be combined with target_modules given as one text")
        if config.layers_pattern and config.layers_to_transform is None:
            raise refuse("layers_pattern", "needs layers_to_transform beside it")
        return config

    def chosen(self, base: BaseSpec, exclude: ManyPatterns | Pattern | None = None) -> list[str]:
        """The paths of the linears that the fields choose. Raises `AdapterInvalid`."""
        layers, layers_pattern = self.layers_to_transform, self.layers_pattern
        paths = base.paths(LINEARS)
        return choose(paths, self.target_modules, exclude=exclude, layers=layers, layers_pattern=layers_pattern)


def _refusal(error: ValidationError, kind: str) -> AdapterInvalid:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = shown(str(first["loc"][0]))
    if first["type"] == "extra_forbidden":
        reason = f"unknown field; only the fields that peft writes for {kind} are read"
    elif first["type"] == "missing":
        reason = "is required"
    else:
        reason = first["msg"]
    return AdapterInvalid(reason, file=CONFIG_FILE, field=field)
