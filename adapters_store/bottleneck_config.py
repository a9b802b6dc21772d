"""Bottleneck adapters (arXiv 1902.00751, 2005.00247, 2110.04366) as AdapterHub's package `adapters` 1.3.0 writes them.

In a Llama or Mistral layer, h is what a block (attention, or feed-forward) gives and r the residual stream that it
is added to: the stream becomes r + h + scaling * up(f(down(x))), with biases in up and down, and x as `BottleneckReads`
says. No norm stands between a block and the stream, so that `original_ln_before` makes x the sum of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Field, StrictBool, StrictInt, StrictStr

from adapters_store.adapter_config import AdapterConfig, Alpha
from adapters_store.adapter_contents import AdapterContents, TensorRule
from adapters_store.base_spec import BOTTLENECK_TENSORS, BaseSpec, bottleneck_tensor_name
from adapters_store.manifest import Bottleneck, BottleneckActivation, BottleneckReads, BottleneckSite, BottleneckSize
from adapters_store.module_matching import refuse
from adapters_store.strict_json import shown

Factor = Annotated[float, Field(strict=True, ge=1e-3, le=1e6, allow_inf_nan=False)]

ACTIVATIONS: Final[Mapping[str, BottleneckActivation]] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "linear": "none",
}
"""transformers' names of the activations that are served."""

# Of Qwen2 the package has no model: there it hooks modules, and adds the residual stream elsewhere.
FAMILIES: Final = ("llama", "mistral")  # of which the package has models
_AROUND: Final = frozenset({"name", "hidden_size"})
_AROUND_INERT: Final = frozenset({"model_class", "model_name"})
_MAX_LAYERS: Final = 4096


class BottleneckConfig(AdapterConfig):
    """The file's `config`, and of the fields around it the adapter's name and the base's width."""

    kind = "BOTTLENECK"
    inert: ClassVar = frozenset(
        {
            *("init_weights", "init_weights_seed", "dropout", "stochastic_depth", "inv_adapter_reduction_factor"),
            # Without norms and PHM layers, which are refused, these say nothing.
            *("adapter_residual_before_ln", "phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule"),
            *("factorized_phm_rule", "phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity"),
            *("phm_rank", "phm_bias"),
        }
    )
    refused: ClassVar[Mapping[str, str]] = {
        "architecture": "of the package `adapters` only bottleneck adapters are served; train others with peft",
        "ln_before": "norms inside an adapter are not served in this release",
        "ln_after": "norms inside an adapter are not served in this release",
        "use_gating": "gated adapters are not served in this release",
        "phm_layer": "PHM layers (Compacter) are not served in this release",
        "inv_adapter": "invertible adapters are not served in this release",
        "cross_adapter": "the base has no cross attention",
    }

    name: Annotated[StrictStr, Field(pattern=r"^[\w /:@+-]{1,128}$")]
    hidden_size: StrictInt
    mh_adapter: StrictBool
    output_adapter: StrictBool
    reduction_factor: Factor | Annotated[dict[StrictStr, Factor], Field(max_length=_MAX_LAYERS)]
    non_linearity: StrictStr
    original_ln_before: StrictBool = False
    original_ln_after: StrictBool = True
    residual_before_ln: StrictBool | Literal["post_add"] = True
    is_parallel: StrictBool = False
    scaling: Alpha | StrictStr = 1.0
    leave_out: Annotated[tuple[StrictInt, ...], Field(max_length=_MAX_LAYERS)] = ()

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Self:
        """From the whole file: `config` and the fields around it."""
        inner = raw.pop("config")
        if not isinstance(inner, dict):
            raise refuse("config", "is no object; save with save_adapter of the package `adapters`")
        around = _checked_around(raw)
        if unknown := inner.keys() & around.keys():
            raise refuse(min(unknown), "is not a field of config")
        config = super().parse(inner | around)
        config._check_values()
        return config

    def contents(self, base: BaseSpec) -> AdapterContents:
        if self.hidden_size != base.hidden_size:
            raise refuse("hidden_size", f"is {self.hidden_size}; the base's is {base.hidden_size}")
        sizes = {layer: self._size(layer) for layer in range(base.num_layers) if layer not in self.leave_out}
        if not sizes:
            raise refuse("leave_out", "leaves out every layer of the base")
        bottleneck = self._bottleneck(sizes)
        contents, scale, hidden = AdapterContents(bottleneck=bottleneck), abs(bottleneck.scale), self.hidden_size
        for layer, size in sizes.items():
            rules = TensorRule((size, hidden)), TensorRule((size,)), TensorRule((hidden, size), scale)
            for site in bottleneck.sites:
                names = (bottleneck_tensor_name(layer, site, self.name, tensor) for tensor in BOTTLENECK_TENSORS)
                contents.tensors |= zip(names, (*rules, TensorRule((hidden,), scale)), strict=True)
        return contents

    def rank_field(self, rank: int) -> str:
        return "reduction_factor"

    @property
    def _reads(self) -> BottleneckReads:
        if self.is_parallel:
            return "stream"
        return "sum" if self.original_ln_before else "block"

    def _check_values(self) -> None:
        if isinstance(self.scaling, str):
            raise refuse("scaling", "learned scalings are not served in this release; a number is")
        check_activation(self.non_linearity.lower())
        if not (self.mh_adapter or self.output_adapter):
            raise refuse("output_adapter", "and mh_adapter are both false: there is no adapter")
        # The package adds the residual stream to what a block gives behind the adapter, around it, both or neither.
        around = self.original_ln_before and not self.residual_before_ln and not self.is_parallel
        if not (self.original_ln_after or around):
            raise refuse("original_ln_after", "leaves the residual stream out of the layer's output; set it true")
        if self.original_ln_after and around:
            raise refuse(
                "residual_before_ln", "adds the residual stream twice beside original_ln_after; set one of them"
            )
        if self.residual_before_ln == "post_add" and not self.is_parallel:
            raise refuse("residual_before_ln", "post_add is for norms after a block, of which the base has none")

    def _size(self, layer: int) -> int:
        factor = self.reduction_factor
        if isinstance(factor, dict):
            if (own := factor.get(str(layer), factor.get("default"))) is None:
                raise refuse("reduction_factor", f"says nothing of layer {layer}, and has no default")
            factor = own
        return max(1, int(self.hidden_size // factor))

    def _bottleneck(self, sizes: Mapping[int, int]) -> Bottleneck:
        assert isinstance(self.scaling, float)
        sites: dict[BottleneckSite, bool] = {"attention": self.mh_adapter, "output": self.output_adapter}
        by_size = {size: tuple(layer for layer, own in sizes.items() if own == size) for size in sizes.values()}
        return Bottleneck(
            name=self.name,
            hidden_size=self.hidden_size,
            sites=tuple(site for site, has in sites.items() if has),
            sizes=tuple(BottleneckSize(size=size, layers=layers) for size, layers in sorted(by_size.items())),
            reads=self._reads,
            activation=ACTIVATIONS[self.non_linearity.lower()],
            scale=self.scaling,
        )


def check_activation(non_linearity: str) -> None:
    """Raises `AdapterInvalid` for one that is not served."""
    if non_linearity not in ACTIVATIONS:
        reason = f"{shown(non_linearity)} is not served; these are: {', '.join(ACTIVATIONS)}"
        raise refuse("non_linearity", reason)


def _checked_around(raw: dict[str, Any]) -> dict[str, Any]:
    """Of the fields around `config` those that are served."""
    version, model_type = raw.pop("version", None), raw.pop("model_type", None)
    if not isinstance(version, str) or not version.startswith("adapters."):
        raise refuse("version", "is not one of the package `adapters`, whose arithmetic is served")
    if model_type not in FAMILIES:
        reason = f"adapters of {shown(str(model_type))} are not served; of {' and '.join(FAMILIES)} they are"
        raise refuse("model_type", reason)
    unknown = raw.keys() - _AROUND - _AROUND_INERT
    if unknown:
        raise refuse(shown(min(unknown)), "unknown field; only the fields that the package `adapters` writes are read")
    return {field: value for field, value in raw.items() if field in _AROUND}
