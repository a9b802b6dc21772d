"""The closed schemas of peft's PROMPT_TUNING, P_TUNING and PREFIX_TUNING, as peft up to 0.21 writes them.

All three save one tensor, a row for each virtual token: peft encodes or projects before it saves, so that what says how
is inert. The file is never handed to peft, and no tokenizer or text that it names is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import AdapterInvalid
from adapters_store.file_names import CONFIG_FILE
from adapters_store.manifest import AdapterSpec, VirtualTokens
from adapters_store.strict_json import shown

PromptKind = Literal["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"]

_INERT: Final = frozenset(
    {
        # how it was made, or where its base lay
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "inference_mode",
        # follows from the base: into how many heads token_dim is cut
        "num_attention_heads",
    }
)
_INERT_OF_KIND: Final[Mapping[PromptKind, frozenset[str]]] = {
    "PROMPT_TUNING": frozenset(
        {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
    ),
    "P_TUNING": frozenset(
        {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}
    ),
    "PREFIX_TUNING": frozenset({"prefix_projection", "encoder_hidden_size", "init_weights"}),
}
_Count = Annotated[StrictInt, Field(ge=1, le=1 << 31)]


class PromptConfig(BaseModel):
    """The fields that are served; those that may be absent follow from the base, which they must fit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    peft_type: PromptKind
    num_virtual_tokens: _Count
    token_dim: _Count | None = None
    num_layers: _Count | None = None

    def spec(self, base: BaseSpec, most: int) -> AdapterSpec:
        """The arithmetic on this base. Raises `AdapterInvalid` for another's sizes or more than `most` tokens."""
        is_prefix = self.peft_type == "PREFIX_TUNING"
        hidden, kv_width = base.linears["q_proj"][1], base.linears["k_proj"][0]
        self._check("num_layers", self.num_layers, base.num_layers)
        self._check("token_dim", self.token_dim, kv_width if is_prefix else hidden)
        if self.num_virtual_tokens > most:
            reason = f"{self.num_virtual_tokens} virtual tokens are above the limit of {most}; train with fewer"
            raise AdapterInvalid(reason, file=CONFIG_FILE, field="num_virtual_tokens")
        virtual = VirtualTokens(num_tokens=self.num_virtual_tokens, num_layers=base.num_layers if is_prefix else None)
        return AdapterSpec(kind=self.peft_type, base_fingerprint=base.fingerprint, virtual_tokens=virtual)

    def tensor_shape(self, base: BaseSpec) -> tuple[int, int]:
        """Of `prompt_embeddings`: input embeddings, or keys and values of all layers, each side by side."""
        if self.peft_type == "PREFIX_TUNING":
            return self.num_virtual_tokens, 2 * base.num_layers * base.linears["k_proj"][0]
        return self.num_virtual_tokens, base.linears["q_proj"][1]

    @staticmethod
    def _check(field: str, value: int | None, needed: int) -> None:
        if value not in (None, needed):
            raise AdapterInvalid(f"is {value}; the served base needs {needed}", file=CONFIG_FILE, field=field)


def is_prompt_config(raw: Mapping[str, Any]) -> bool:
    """Whether an adapter's config is of one of these kinds."""
    return raw.get("peft_type") in tuple(_INERT_OF_KIND)


def parse_prompt_config(raw: Mapping[str, Any]) -> PromptConfig:
    """Read a config of these kinds. Raises `AdapterInvalid` naming the field at fault."""
    inert = _INERT | _INERT_OF_KIND[raw["peft_type"]]
    served = {field: value for field, value in raw.items() if field not in inert and value is not None}
    task_type = served.pop("task_type", "CAUSAL_LM")
    if task_type != "CAUSAL_LM":
        reason = f"the base is a causal language model (CAUSAL_LM), not {shown(str(task_type))}"
        raise AdapterInvalid(reason, file=CONFIG_FILE, field="task_type")
    if served.pop("num_transformer_submodules", 1) != 1:
        reason = "must be 1: the base has a decoder alone"
        raise AdapterInvalid(reason, file=CONFIG_FILE, field="num_transformer_submodules")
    if served.pop("modules_to_save", []) != []:
        reason = "fully trained modules are not served beside virtual tokens; set modules_to_save=null"
        raise AdapterInvalid(reason, file=CONFIG_FILE, field="modules_to_save")
    try:
        return PromptConfig.model_validate(served)
    except ValidationError as error:
        raise _refusal(error, raw["peft_type"]) from None


def _refusal(error: ValidationError, kind: PromptKind) -> AdapterInvalid:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = shown(str(first["loc"][0]))
    if first["type"] == "extra_forbidden":
        reason = f"unknown field; only the fields that peft writes for {kind} are read"
    else:
        reason = "is required" if first["type"] == "missing" else first["msg"]
    return AdapterInvalid(reason, file=CONFIG_FILE, field=field)
