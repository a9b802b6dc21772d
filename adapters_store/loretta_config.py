"""LoRETTA_rep (arXiv 2402.11417) as the package loretta 0.1.0 writes it: LoRA whose matrices are tensor trains.

It says `peft_type` LORA as peft does; `tensor_rank` tells it apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import Field, StrictInt

from adapters_store.adapter_config import Alpha, Rank, TargetedConfig
from adapters_store.adapter_contents import AdapterContents
from adapters_store.base_spec import LINEARS, BaseSpec, lora_factors_name
from adapters_store.module_matching import choose
from adapters_store.tensor_train import TensorTrain

_MAX_TENSOR_RANK: Final = 64  # what is made on the way to a matrix is at most so many times as large as the matrix


class LorettaRepConfig(TargetedConfig):
    """y += lora_alpha / r * B(A x), with A [in, r] and B [r, out] contracted, exactly, when the adapter is loaded."""

    kind = "LORETTA_REP"
    inert: ClassVar = frozenset({"lora_dropout", "merge_weights"})
    refused: ClassVar[Mapping[str, str]] = {
        "enable_lora": "loretta writes it for linears that are several in one, which the served base does not have; "
        "train with more than one of target_modules",
        "bias": "trained biases beside tensor trains are not served in this release",
        "modules_to_save": "fully trained modules beside tensor trains are not served in this release",
    }

    r: Rank
    lora_alpha: Alpha
    tensor_rank: Annotated[StrictInt, Field(ge=1, le=_MAX_TENSOR_RANK)]

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Self:
        if raw.get("bias") == "none":
            del raw["bias"]
        return super().parse(raw)

    def contents(self, base: BaseSpec) -> AdapterContents:
        contents, paths = AdapterContents(tensor_rank=self.tensor_rank), base.paths(LINEARS)
        scale = self.lora_alpha / self.r
        for path in choose(paths, self.target_modules):
            layer, linear = paths[path]
            out_features, in_features = base.linears[linear]
            contents.add_delta(layer, linear, self.r, scale)
            contents.trains += [
                TensorTrain(lora_factors_name(layer, linear, "A"), in_features * self.r, self.tensor_rank),
                TensorTrain(lora_factors_name(layer, linear, "B"), self.r * out_features, self.tensor_rank, scale),
            ]
        return contents
