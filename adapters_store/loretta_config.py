"""LoRETTA (arXiv 2402.11417) as the package `loretta` 0.1.0 writes it: matrices of LoRA, or of bottlenecks, as trains.

They are contracted, exactly, when an adapter is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Field, StrictInt, StrictStr

from adapters_store.adapter_config import Alpha, Rank, TargetedConfig
from adapters_store.adapter_contents import AdapterContents, TensorRule
from adapters_store.base_spec import LINEARS, BaseSpec, factors_name, tensor_name
from adapters_store.bottleneck_config import ACTIVATIONS, check_activation
from adapters_store.manifest import LORETTA_LINEARS, Bottleneck, BottleneckSite, BottleneckSize
from adapters_store.module_matching import choose, refuse
from adapters_store.tensor_train import TensorTrain

# What is made on the way to a matrix is at most 64 times as large as the matrix.
TensorRank = Annotated[StrictInt, Field(ge=1, le=64)]
Sites = tuple[BottleneckSite, ...]
_NO_BIAS: Final = "trained biases beside tensor trains are not served in this release"
_NO_SAVED: Final = "fully trained modules beside tensor trains are not served in this release"


class LorettaRepConfig(TargetedConfig):
    """y += lora_alpha / r * B(A x). It says `peft_type` LORA as peft does; `tensor_rank` tells it apart."""

    kind = "LORETTA_REP"
    inert: ClassVar = frozenset({"lora_dropout", "merge_weights"})
    refused: ClassVar[Mapping[str, str]] = {
        "enable_lora": "loretta writes it for linears that are several in one, which the served base does not have; "
        "train with more than one of target_modules",
        "bias": _NO_BIAS,
        "modules_to_save": _NO_SAVED,
    }

    r: Rank
    lora_alpha: Alpha
    tensor_rank: TensorRank

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Self:
        return super().parse(_without_no_bias(raw))

    def contents(self, base: BaseSpec) -> AdapterContents:
        contents, paths = AdapterContents(tensor_rank=self.tensor_rank), base.paths(LINEARS)
        scale = self.lora_alpha / self.r
        for path in choose(paths, self.target_modules):
            layer, linear = paths[path]
            out_features, in_features = base.linears[linear]
            contents.add_delta(layer, linear, self.r, scale)
            contents.trains += [
                TensorTrain(factors_name(layer, linear, "lora_A"), in_features * self.r, self.tensor_rank),
                TensorTrain(factors_name(layer, linear, "lora_B"), self.r * out_features, self.tensor_rank, scale),
            ]
        return contents


class LorettaAdpConfig(TargetedConfig):
    """y += scaling * up(f(down(y))) on the outputs of down_proj, and so on the inputs of gate_proj and up_proj, each.

    The outputs of down_proj are those of the feed-forward block; what gate or up reads is changed for that alone.
    """

    kind = "LORETTA_ADP"
    inert: ClassVar = frozenset({"adapter_dropout", "init_weights", "use_adapterp"})
    refused: ClassVar[Mapping[str, str]] = {
        "use_parallel_adapter": "parallel adapters on linears are not served in this release, and loretta makes none",
        "bias": _NO_BIAS,
        "modules_to_save": _NO_SAVED,
    }

    bottleneck_size: Rank
    non_linearity: StrictStr
    scaling: Alpha | StrictStr = 1.0
    tensorized: Literal[True]
    tensor_rank: TensorRank

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Self:
        config = super().parse(_without_no_bias(raw))
        check_activation(config.non_linearity)
        if isinstance(config.scaling, str):
            raise refuse("scaling", "learned scalings are not served in this release; a number is")
        return config

    def contents(self, base: BaseSpec) -> AdapterContents:
        sites, sizes = self._sites(base)
        assert isinstance(self.scaling, float)
        bottleneck = Bottleneck(
            hidden_size=base.hidden_size,
            sites=sites,
            sizes=sizes,
            reads="block",
            activation=ACTIVATIONS[self.non_linearity],
            scale=self.scaling,
        )
        contents = AdapterContents(bottleneck=bottleneck, tensor_rank=self.tensor_rank)
        for layer, site, units in bottleneck.places:
            for matrix, width, scale in (("adapter_down", units, 1.0), ("adapter_up", base.hidden_size, self.scaling)):
                factors = factors_name(layer, LORETTA_LINEARS[site], matrix)
                contents.trains.append(TensorTrain(factors, units * base.hidden_size, self.tensor_rank, scale))
                bias = tensor_name(layer, LORETTA_LINEARS[site], f"{matrix}.layer.bias")
                contents.tensors[bias] = TensorRule((width,), abs(scale))
        return contents

    def rank_field(self, rank: int) -> str:
        return "bottleneck_size"

    def _sites(self, base: BaseSpec) -> tuple[Sites, tuple[BottleneckSize, ...]]:
        """The sites in any layer, and the layers, those of the same sites together."""
        paths = base.paths(LINEARS)
        targets = {paths[path] for path in choose(paths, self.target_modules)}
        if others := sorted({linear for _, linear in targets} - set(LORETTA_LINEARS.values())):
            reason = f"loretta has no such adapters on {others[0]}; these may have some: "
            raise refuse("target_modules", reason + ", ".join(LORETTA_LINEARS.values()))
        by_sites: dict[Sites, list[int]] = {}
        for layer in range(base.num_layers):
            own = tuple(site for site, linear in LORETTA_LINEARS.items() if (layer, linear) in targets)
            if own:
                by_sites.setdefault(own, []).append(layer)
        sites = tuple(site for site in LORETTA_LINEARS if any(site in own for own in by_sites))
        sizes = (
            BottleneckSize(size=self.bottleneck_size, layers=tuple(layers), sites=own if own != sites else None)
            for own, layers in by_sites.items()
        )
        return sites, tuple(sizes)


def _without_no_bias(raw: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in raw.items() if (field, value) != ("bias", "none")}
