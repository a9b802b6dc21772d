"""What the store must know of the served base: its fingerprint, and what of it adapters change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS: Final = ("input_layernorm", "post_attention_layernorm", "norm")
EMBEDDINGS: Final[tuple[Literal["embed_tokens"], Literal["lm_head"]]] = ("embed_tokens", "lm_head")
VERA_A: Final = "base_model.vera_A"
VERA_B: Final = "base_model.vera_B"
VERA_LAMBDA_B: Final = "vera_lambda_b"
VERA_LAMBDA_D: Final = "vera_lambda_d"
LOHA_A: Final = ("hada_w1_b", "hada_w2_b")
LOHA_B: Final = ("hada_w1_a", "hada_w2_a")
LOKR_FACTORS: Final = ("lokr_w1", "lokr_w2")
MISS_BLOCK: Final = "miss_block"
BOTTLENECK_TENSORS: Final = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
_ATTENTION: Final = frozenset(LINEARS[:4])
_ONCE: Final = {"norm": "model.norm", "embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}


@dataclass(frozen=True)
class BaseSpec:
    """The served base as the adapter validator sees it.

    fingerprint: hash of the packed base bytes and its quantization config.
    linears: (out_features, in_features) of each of the seven linears; every layer has the same shapes.
    biased: the linears that have a bias. vocab_size: rows of embed_tokens and of lm_head, which are one where `tied`.
    model_type: of the base's config.json.
    """

    fingerprint: str
    num_layers: int
    linears: Mapping[str, tuple[int, int]]
    biased: tuple[str, ...] = ()
    vocab_size: int = 0
    tied: bool = False
    model_type: str = "llama"

    @property
    def hidden_size(self) -> int:
        """Width of the norms."""
        return self.linears["q_proj"][1]

    def paths(self, modules: Iterable[str]) -> dict[str, tuple[int, str]]:
        """Module path -> (layer, module) of every layer; what there is one of, as the last norm, is of layer 0."""
        return {module_path(i, m): (i, m) for i in range(self.num_layers) for m in modules if m not in _ONCE or i == 0}


def module_path(layer: int, module: str) -> str:
    """The path of a module inside a Hugging Face decoder, such as `model.layers.0.self_attn.q_proj`."""
    if module in _ONCE:
        return _ONCE[module]
    if module in NORMS:
        return f"model.layers.{layer}.{module}"
    block = "self_attn" if module in _ATTENTION else "mlp"
    return f"model.layers.{layer}.{block}.{module}"


def tensor_name(layer: int, module: str, tensor: str) -> str:
    """The name that `peft` gives a module's tensor, such as "lora_A.weight" or "ia3_l"."""
    return f"base_model.model.{module_path(layer, module)}.{tensor}"


def lora_tensor_name(layer: int, linear: str, side: str) -> str:
    """The name `peft` gives the LoRA matrix `side` ("A": [rank, in], "B": [out, rank]) of one linear."""
    return tensor_name(layer, linear, f"lora_{side}.weight")


def factors_name(layer: int, linear: str, matrix: str) -> str:
    """The name that `loretta` gives the factors of a matrix ("lora_A", "adapter_up"), but for their numbers."""
    return tensor_name(layer, linear, f"{matrix}.layer.tensor.factors")


def bottleneck_tensor_name(layer: int, site: str, name: str, tensor: str) -> str:
    """The name that the package `adapters` gives a tensor of the adapter `name` at a block's output."""
    return f"model.layers.{layer}.{site}_adapters.adapters.{name}.{tensor}"
