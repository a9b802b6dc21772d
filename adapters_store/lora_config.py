"""LoRA (arXiv 2106.09685) as peft up to 0.21 writes it, with rsLoRA, DoRA and biases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Field, StrictBool

from adapters_store.adapter_config import Alpha, LayeredConfig, ManyPatterns, Pattern, Rank
from adapters_store.adapter_contents import AdapterContents, TensorRule
from adapters_store.base_spec import LINEARS, BaseSpec, lora_tensor_name
from adapters_store.module_matching import pattern_lookup, refuse
from adapters_store.strict_json import shown
from adapters_store.trainable_tokens_config import TokenIds, TokensByModule, add_trained_tokens

_PLAIN_INITS: Final = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class LoRATarget:
    """The rank and scale (alpha / r, or alpha / sqrt(r) for rsLoRA) of one linear's delta."""

    rank: int
    scale: float


class LoRAConfig(LayeredConfig):
    """Matrices on linears; a magnitude each with `use_dora`, biases with `lora_bias` and `bias`, and trained tokens."""

    kind = "LORA"
    inert: ClassVar = frozenset({"megatron_core", "lora_dropout", "velora_config", "eva_config", "qalora_group_size"})
    refused: ClassVar[Mapping[str, str]] = {
        "use_qalora": "QA-LoRA pools its inputs, which is not served in this release",
        "use_bdlora": "block-diagonal LoRA is not served in this release",
        "target_parameters": "LoRA on bare parameters is not served in this release; use target_modules",
        "layer_replication": "an adapter cannot change the base's number of layers",
        "alora_invocation_tokens": "activated LoRA is not served in this release",
        "arrow_config": "Arrow routing is not served in this release",
        "kasa_config": "KaSA is not served in this release",
        "monteclora_config": "MonteCLoRA is not served in this release",
        "megatron_config": "Megatron modules are not served",
        "loftq_config": "LoftQ changes the base's weights, which all tenants share",
        "corda_config": "CorDA changes the base's weights and names files",
        "lora_ga_config": "LoRA-GA changes the base's weights and names files",
    }

    r: Rank = 8
    lora_alpha: Alpha = 8.0
    use_rslora: StrictBool = False
    use_dora: StrictBool = False
    lora_bias: StrictBool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    exclude_modules: ManyPatterns | Pattern | None = None
    rank_pattern: Annotated[dict[Pattern, Rank], Field(max_length=4096, default_factory=dict)]
    alpha_pattern: Annotated[dict[Pattern, Alpha], Field(max_length=4096, default_factory=dict)]
    trainable_token_indices: TokenIds | TokensByModule | None = None
    ensure_weight_tying: StrictBool = False

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Self:
        _check_init(raw.pop("init_lora_weights", None))
        config = super().parse(raw)
        if config.use_dora and config.lora_bias:
            raise refuse("lora_bias", "peft has no biases on lora_B beside use_dora")
        return config

    def contents(self, base: BaseSpec) -> AdapterContents:
        contents, paths, targets = AdapterContents(), base.paths(LINEARS), self.targets(base)
        for path, target in targets.items():
            layer, linear = paths[path]
            rank, scale, (out_features, in_features) = target.rank, target.scale, base.linears[linear]
            contents.add_delta(layer, linear, rank, scale)
            contents.tensors[lora_tensor_name(layer, linear, "A")] = TensorRule((rank, in_features))
            # B is multiplied by the scale in its own dtype.
            contents.tensors[lora_tensor_name(layer, linear, "B")] = TensorRule((out_features, rank), abs(scale))
            if self.use_dora:
                contents.add_vector(layer, linear, "magnitude", "lora_magnitude_vector", (out_features,))
            if self.lora_bias:
                contents.add_vector(layer, linear, "bias", "lora_B.bias", (out_features,), scale)
        contents.add_own_biases(base, self.bias, targets)
        contents.add_saved_modules(base, self.modules_to_save, tie=self.ensure_weight_tying)
        if self.trainable_token_indices is not None:
            add_trained_tokens(contents, base, self.trainable_token_indices, tie=self.ensure_weight_tying)
        return contents

    def targets(self, base: BaseSpec) -> dict[str, LoRATarget]:
        """Rank and scale by module path. Raises `AdapterInvalid`."""
        rank_of = pattern_lookup(self.rank_pattern, "rank_pattern", self.r)
        alpha_of = pattern_lookup(self.alpha_pattern, "alpha_pattern", self.lora_alpha)
        return {path: self._target(rank_of(path), alpha_of(path)) for path in self.chosen(base, self.exclude_modules)}

    def rank_field(self, rank: int) -> str:
        return "r" if rank == self.r else "rank_pattern"

    def _target(self, rank: int, alpha: float) -> LoRATarget:
        return LoRATarget(rank, alpha / (math.sqrt(rank) if self.use_rslora else rank))


def _check_init(init: object) -> None:
    if init is not None and not isinstance(init, bool) and init not in _PLAIN_INITS:
        raise refuse(
            "init_lora_weights",
            f"the initialisation {shown(str(init))} changes the base's weights, which all tenants share; save "
            "with path_initial_model_for_weight_conversion, which turns the adapter into a plain LoRA",
        )
