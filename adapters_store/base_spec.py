"""What the store must know of the served base: its fingerprint and the shapes of its adaptable linears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION: Final = frozenset(LINEARS[:4])


@dataclass(frozen=True)
class BaseSpec:
    """The served base as the adapter validator sees it.

    fingerprint: hash of the packed base bytes and its quantization config.
    linears: (out_features, in_features) of each of the seven linears; every layer has the same shapes.
    """

    fingerprint: str
    num_layers: int
    linears: Mapping[str, tuple[int, int]]


def module_path(layer: int, linear: str) -> str:
    """The linear's module path inside a Hugging Face decoder, such as `model.layers.0.self_attn.q_proj`."""
    block = "self_attn" if linear in _ATTENTION else "mlp"
    return f"model.layers.{layer}.{block}.{linear}"


def lora_tensor_name(layer: int, linear: str, side: str) -> str:
    """The name `peft` gives the LoRA matrix `side` ("A": [rank, in], "B": [out, rank]) of one linear."""
    return f"base_model.model.{module_path(layer, linear)}.lora_{side}.weight"
