"""The closed schema of a LoRA `adapter_config.json`, as peft up to 0.21 writes it.

The file is never handed to peft, which imports modules and opens files that it names. A field is served, or
inert and dropped, or refused by name with the reason; any other field is unknown and refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from adapters_store.errors import AdapterInvalid
from adapters_store.file_names import CONFIG_FILE
from adapters_store.strict_json import parse_object, shown

_MAX_RANK: Final = 1 << 16
_Pattern = Annotated[StrictStr, Field(min_length=1, max_length=1024)]
_Patterns = Annotated[tuple[_Pattern, ...], Field(max_length=4096)]
_Rank = Annotated[StrictInt, Field(ge=1, le=_MAX_RANK)]
_Alpha = Annotated[float, Field(strict=True, ge=-1e6, le=1e6, allow_inf_nan=False)]

_INERT: Final = frozenset(
    {
        # how it was made, or where its base lay: never opened, never imported
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "megatron_core",
        # training only
        "inference_mode",
        "lora_dropout",
        "velora_config",
        "eva_config",
        "qalora_group_size",
        "ensure_weight_tying",
    }
)

_NOT_SERVED: Final = {
    "use_dora": "DoRA adapters are not served in this release; train with use_dora=false",
    "use_qalora": "QA-LoRA pools its inputs, which is not served in this release",
    "use_bdlora": "block-diagonal LoRA is not served in this release",
    "lora_bias": "biases on lora_B are not served in this release; train with lora_bias=false",
    "modules_to_save": "fully trained modules are not served in this release; set modules_to_save=null",
    "trainable_token_indices": "trained token embeddings are not served in this release",
    "target_parameters": "LoRA on bare parameters is not served in this release; use target_modules",
    "layer_replication": "an adapter cannot change the base's number of layers",
    "fan_in_fan_out": "transposed weights do not occur in the served base; set fan_in_fan_out=false",
    "alora_invocation_tokens": "activated LoRA is not served in this release",
    "arrow_config": "Arrow routing is not served in this release",
    "kasa_config": "KaSA is not served in this release",
    "monteclora_config": "MonteCLoRA is not served in this release",
    "megatron_config": "Megatron modules are not served",
    "loftq_config": "LoftQ changes the base's weights, which all tenants share",
    "corda_config": "CorDA changes the base's weights and names files",
    "lora_ga_config": "LoRA-GA changes the base's weights and names files",
}

_PLAIN_INITS: Final = ("gaussian", "eva", "orthogonal", "mica")


class LoRAConfig(BaseModel):
    """The fields that are served. Patterns are a tenant's regular expressions: match them only when confined."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: _Rank = 8
    lora_alpha: _Alpha = 8.0
    use_rslora: StrictBool = False
    target_modules: _Patterns | _Pattern
    exclude_modules: _Patterns | _Pattern | None = None
    layers_to_transform: tuple[StrictInt, ...] | StrictInt | None = None
    layers_pattern: _Patterns | _Pattern | None = None
    rank_pattern: Annotated[dict[_Pattern, _Rank], Field(max_length=4096)] = {}
    alpha_pattern: Annotated[dict[_Pattern, _Alpha], Field(max_length=4096)] = {}


def parse_lora_config(data: bytes) -> LoRAConfig:
    """Parse the bytes of an `adapter_config.json`. Raises `AdapterInvalid` naming the field at fault."""
    raw = parse_object(data, CONFIG_FILE)
    _check_kind(raw)
    for field, reason in _NOT_SERVED.items():
        if raw.pop(field, None) not in (None, False, "", [], {}):
            raise AdapterInvalid(reason, file=CONFIG_FILE, field=field)
    served = {field: value for field, value in raw.items() if field not in _INERT}
    served = {field: value for field, value in served.items() if value is not None}
    try:
        config = LoRAConfig.model_validate(served)
    except ValidationError as error:
        raise _refusal(error) from None
    _check_layers(config)
    return config


def _check_kind(raw: dict[str, Any]) -> None:
    """Check and take out the fields that say what sort of adapter this is."""
    peft_type = raw.pop("peft_type", None)
    if peft_type != "LORA":
        kinds = "LORA, PROMPT_TUNING, P_TUNING and PREFIX_TUNING"
        reason = f"only {kinds} adapters are served in this release, not {shown(str(peft_type))}"
        raise AdapterInvalid(reason, file=CONFIG_FILE, field="peft_type")
    task_type = raw.pop("task_type", None)
    if task_type not in (None, "CAUSAL_LM"):
        reason = f"the base is a causal language model (CAUSAL_LM), not {shown(str(task_type))}"
        raise AdapterInvalid(reason, file=CONFIG_FILE, field="task_type")
    if raw.pop("bias", "none") != "none":
        reason = 'trained biases are not served in this release; train with bias="none"'
        raise AdapterInvalid(reason, file=CONFIG_FILE, field="bias")
    init = raw.pop("init_lora_weights", None)
    if init is not None and not isinstance(init, bool) and init not in _PLAIN_INITS:
        reason = (
            f"the initialisation {shown(str(init))} changes the base's weights, which all tenants share; save "
            "with path_initial_model_for_weight_conversion, which turns the adapter into a plain LoRA"
        )
        raise AdapterInvalid(reason, file=CONFIG_FILE, field="init_lora_weights")


def _check_layers(config: LoRAConfig) -> None:
    """peft's own rules for the two fields that choose layers."""
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        reason = "cannot be combined with target_modules given as one text"
        raise AdapterInvalid(reason, file=CONFIG_FILE, field="layers_to_transform")
    if config.layers_pattern and config.layers_to_transform is None:
        raise AdapterInvalid("needs layers_to_transform beside it", file=CONFIG_FILE, field="layers_pattern")


def _refusal(error: ValidationError) -> AdapterInvalid:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = shown(str(first["loc"][0]))
    if first["type"] == "extra_forbidden":
        reason = "unknown field; only the fields that peft's LoraConfig writes are read"
    elif first["type"] == "missing":
        reason = "is required"
    else:
        reason = first["msg"]
    return AdapterInvalid(reason, file=CONFIG_FILE, field=field)
