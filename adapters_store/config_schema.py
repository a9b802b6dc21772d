"""`adapter_config.json`, as peft up to 0.21, loretta and adapters write it: the closed schema of each kind served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from adapters_store.adalora_config import AdaLoRAConfig
from adapters_store.adapter_config import AdapterConfig
from adapters_store.beft_config import BEFTConfig
from adapters_store.bottleneck_config import BottleneckConfig
from adapters_store.delora_config import DeLoRAConfig
from adapters_store.file_names import CONFIG_FILE
from adapters_store.ia3_config import IA3Config
from adapters_store.ln_tuning_config import LNTuningConfig
from adapters_store.loha_config import LoHaConfig
from adapters_store.lokr_config import LoKrConfig
from adapters_store.lora_config import LoRAConfig
from adapters_store.loretta_config import LorettaAdpConfig, LorettaRepConfig
from adapters_store.miss_config import MiSSConfig
from adapters_store.module_matching import refuse
from adapters_store.prompt_config import PrefixTuningConfig, PromptTuningConfig, PTuningConfig
from adapters_store.strict_json import parse_object, shown
from adapters_store.trainable_tokens_config import TrainableTokensConfig
from adapters_store.vera_config import VeRAConfig

# By `peft_type`, of which one is loretta's own.
KINDS: Final[Mapping[str, type[AdapterConfig]]] = {"BOTTLENECK": LorettaAdpConfig} | {
    config.kind: config
    for config in (
        LoRAConfig,
        AdaLoRAConfig,
        LoHaConfig,
        LoKrConfig,
        DeLoRAConfig,
        MiSSConfig,
        VeRAConfig,
        IA3Config,
        BEFTConfig,
        LNTuningConfig,
        PromptTuningConfig,
        PTuningConfig,
        PrefixTuningConfig,
        TrainableTokensConfig,
    )
}


def parse_config(data: bytes) -> AdapterConfig:
    """Parse the bytes of an `adapter_config.json`. Raises `AdapterInvalid` naming the field at fault."""
    raw = parse_object(data, CONFIG_FILE)
    if "config" in raw and "peft_type" not in raw:
        return BottleneckConfig.parse(raw)  # of the package `adapters`, whose files name no kind
    kind = str(raw.pop("peft_type", None))
    if kind not in KINDS:
        raise refuse("peft_type", f"adapters of the kind {shown(kind)} are not served; these are: {', '.join(KINDS)}")
    task_type = raw.pop("task_type", None)
    if task_type not in (None, "CAUSAL_LM"):
        raise refuse("task_type", f"the base is a causal language model (CAUSAL_LM), not {shown(str(task_type))}")
    is_loretta = kind == "LORA" and "tensor_rank" in raw  # which gives its own kind peft's name
    return (LorettaRepConfig if is_loretta else KINDS[kind]).parse(raw)
