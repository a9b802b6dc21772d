"""What the store must know of the served base: its fingerprint, and what of it adapters change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS: Final = ("input_layernorm", "post_attention_layernorm", "norm")
VERA_A: Final = "base_model.vera_A"
VERA_B: Final = "base_model.vera_B"
VERA_LAMBDA_B: Final = "vera_lambda_b"
VERA_LAMBDA_D: Final = "vera_lambda_d"
LOHA_A: Final = ("hada_w1_b", "hada_w2_b")
LOHA_B: Final = ("hada_w1_a", "hada_w2_a")
LOKR_FACTORS: Final = ("lokr_w1", "lokr_w2")
MISS_BLOCK: Final = "miss_block"
_ATTENTION: Final = frozenset(LINEARS[:4])


@dataclass(frozen=True)
class BaseSpec:
    """The served base as the adapter validator sees it.

    fingerprint: hash of the packed base bytes and its quantization config.
    linears: (out_features, in_features) of each of the seven linears; every layer has the same shapes.
    biased: the linears that have a bias.
    """

    fingerprint: str
    num_layers: int
    linears: Mapping[str, tuple[int, int]]
    biased: tuple[str, ...] = ()

    @property
    def hidden_size(self) -> int:
        """Width of the norms."""
        return self.linears["q_proj"][1]

    def paths(self, modules: Iterable[str]) -> dict[str, tuple[int, str]]:
        """Module path -> (layer, module) of every layer; the last norm, of which there is one, is of layer 0."""
        return {module_path(i, m): (i, m) for i in range(self.num_layers) for m in modules if m != "norm" or i == 0}


def module_path(layer: int, module: str) -> str:
    """The path of a linear or norm inside a Hugging Face decoder, such as `model.layers.0.self_attn.q_proj`."""
    if module == "norm":
        return "model.norm"
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
