"""AdaLoRA (arXiv 2303.10512) as peft up to 0.21 writes it: of each linear's singular triplets those that were kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, StrictBool

from adapters_store.adapter_config import LayeredConfig, ManyPatterns, Pattern, Rank
from adapters_store.adapter_contents import SQRT_LARGEST, AdapterContents, TensorRule
from adapters_store.base_spec import LINEARS, BaseSpec, tensor_name
from adapters_store.lora_config import LoRAConfig
from adapters_store.module_matching import refuse
from adapters_store.trainable_tokens_config import TokenIds, TokensByModule, add_trained_tokens

ADALORA_EPSILON: Final = 1e-5
"""What peft adds to the rank that it divides by."""

_SCHEDULE: Final = {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
_OF_LORA: Final = {"r", "init_lora_weights", "use_rslora", "lora_bias", "alpha_pattern"}  # which peft does not read
_Mask = Annotated[tuple[StrictBool, ...], Field(max_length=1 << 16)]


class AdaLoRAConfig(LayeredConfig):
    """y += lora_alpha / (init_r + 1e-5) B (E * A x), with as many ranks as a linear's mask has true."""

    kind = "ADALORA"
    inert: ClassVar = LoRAConfig.inert | _SCHEDULE | _OF_LORA
    refused: ClassVar[Mapping[str, str]] = {**LoRAConfig.refused, "use_dora": "peft has no AdaLoRA with magnitudes"}

    init_r: Rank = 12
    lora_alpha: Annotated[float, Field(strict=True, gt=0, le=1e6)] = 8.0
    bias: Literal["none", "all", "lora_only"] = "none"
    exclude_modules: ManyPatterns | Pattern | None = None
    rank_pattern: Annotated[dict[Pattern, _Mask], Field(max_length=1 << 16, default_factory=dict)]
    trainable_token_indices: TokenIds | TokensByModule | None = None
    ensure_weight_tying: StrictBool = False

    def contents(self, base: BaseSpec) -> AdapterContents:
        contents, paths = AdapterContents(), base.paths(LINEARS)
        chosen = self.chosen(base, self.exclude_modules)
        ranks, scale = self._ranks(chosen), self.lora_alpha / (self.init_r + ADALORA_EPSILON)
        for path, rank in ranks.items():
            layer, linear = paths[path]
            out_features, in_features = base.linears[linear]
            contents.add_delta(layer, linear, rank, scale, peft_rank=self.init_r)
            contents.tensors |= {
                tensor_name(layer, linear, "lora_A"): TensorRule((rank, in_features), most=SQRT_LARGEST),
                tensor_name(layer, linear, "lora_E"): TensorRule((rank, 1), most=SQRT_LARGEST),
                tensor_name(layer, linear, "lora_B"): TensorRule((out_features, rank), abs(scale)),
            }
        contents.add_own_biases(base, self.bias, ranks)
        contents.add_saved_modules(base, self.modules_to_save, tie=self.ensure_weight_tying)
        if self.trainable_token_indices is not None:
            add_trained_tokens(contents, base, self.trainable_token_indices, tie=self.ensure_weight_tying)
        return contents

    def rank_field(self, rank: int) -> str:
        return "init_r" if rank == self.init_r else "rank_pattern"

    def _ranks(self, chosen: Collection[str]) -> dict[str, int]:
        """By module path: what is left of `init_r`, which may be nothing."""
        ranks = dict.fromkeys(chosen, self.init_r)
        for name, mask in self.rank_pattern.items():
            path, _, tensor = name.rpartition(".")
            if path not in ranks or tensor != "lora_E":
                raise refuse("rank_pattern", f"{name[:80]!r} is not the lora_E of a linear that is adapted")
            if len(mask) != self.init_r:
                raise refuse("rank_pattern", f"{name[:80]!r} masks {len(mask)} ranks, and init_r is {self.init_r}")
            ranks[path] = sum(mask)
        return ranks
