"""The shape of a decoder, read from a Hugging Face config."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gateway.errors import BaseModelUnsupported, ConfigInvalid

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, eq=False)
class DecoderConfig:
    """One decoder for the Llama, Mistral, Qwen2 and Qwen3 families; what differs between them is a value here.

    inv_freq: fp32 [head_dim / 2], rope scaling applied. sliding_windows: per layer, the window in tokens or None.
    quantization: the checkpoint's own `quantization_config`, or None.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    inv_freq: torch.Tensor
    rope_attention_scaling: float
    sliding_windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]
    quantization: dict[str, Any] | None

    @classmethod
    def from_folder(cls, folder: Path) -> DecoderConfig:
        """Read `config.json` (and `generation_config.json` for the end tokens).

        Raises `BaseModelUnsupported` naming the file and the field that Patchbay cannot serve.
        """
        model_type = _model_type(folder)
        if model_type not in MODEL_TYPES:
            raise BaseModelUnsupported(
                f"{folder}/config.json: model_type {model_type!r} is not served; "
                f"Patchbay serves {', '.join(MODEL_TYPES)}."
            )
        hf = AutoConfig.from_pretrained(folder, local_files_only=True)
        _refuse_unserved(folder, hf)
        head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        inv_freq, rope_attention_scaling = _rope(hf, head_dim)
        return cls(
            model_type=model_type,
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=head_dim,
            rms_norm_eps=hf.rms_norm_eps,
            tie_word_embeddings=hf.tie_word_embeddings,
            max_position_embeddings=hf.max_position_embeddings,
            inv_freq=inv_freq,
            rope_attention_scaling=rope_attention_scaling,
            sliding_windows=_sliding_windows(hf),
            eos_token_ids=_eos_token_ids(folder, hf),
            quantization=_quantization(hf),
        )

    def divided(self, size: int) -> DecoderConfig:
        """What each of `size` ranks has of the heads and of the feed-forward block; the rest is whole.

        Raises `ConfigInvalid` when they cannot be shared out evenly.
        """
        for name in ("num_heads", "num_kv_heads", "intermediate_size"):
            if getattr(self, name) % size:
                raise ConfigInvalid(
                    f"engine.tensor_parallel_size {size} does not divide the base's {name} {getattr(self, name)}.",
                    param="engine.tensor_parallel_size",
                )
        return replace(
            self,
            num_heads=self.num_heads // size,
            num_kv_heads=self.num_kv_heads // size,
            intermediate_size=self.intermediate_size // size,
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each of a layer's seven linears."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden_size),
            "k_proj": (kv, self.hidden_size),
            "v_proj": (kv, self.hidden_size),
            "o_proj": (self.hidden_size, q),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }


def _model_type(folder: Path) -> str:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise BaseModelUnsupported(
            f"{path} cannot be read ({error.strerror}); give a Hugging Face model folder."
        ) from error
    except ValueError as error:
        raise BaseModelUnsupported(f"{path} is not valid JSON: {error}") from error
    return str(config.get("model_type"))


def _rope(hf: Any, head_dim: int) -> tuple[torch.Tensor, float]:
    """The rotary embedding's inverse frequencies, fp32 [head_dim / 2], and what its sines and cosines are scaled by.

    Those of transformers, without its models, whose import takes as long as torch's.
    """
    rope_type = hf.rope_parameters.get("rope_type", "default")
    if rope_type == "default":
        powers = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return 1.0 / hf.rope_parameters["rope_theta"] ** powers, 1.0
    inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[rope_type](hf)
    return inv_freq.float(), float(attention_scaling)


def _refuse_unserved(folder: Path, hf: Any) -> None:
    rope_type = hf.rope_parameters.get("rope_type", "default")
    checks = {
        f"rope_type {rope_type!r}": rope_type in ROPE_TYPES,
        f"hidden_act {hf.hidden_act!r}": hf.hidden_act == "silu",
        "mlp_bias": not getattr(hf, "mlp_bias", False),
    }
    for what, served in checks.items():
        if not served:
            raise BaseModelUnsupported(f"{folder}/config.json: {what} is not served.")


def _sliding_windows(hf: Any) -> tuple[int | None, ...]:
    window: int | None = getattr(hf, "sliding_window", None)
    types: list[str] | None = getattr(hf, "layer_types", None)
    if window is None:
        return (None,) * int(hf.num_hidden_layers)
    if types is None:
        return (window,) * int(hf.num_hidden_layers)
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _eos_token_ids(folder: Path, hf: Any) -> tuple[int, ...]:
    ids = hf.eos_token_id
    generation = folder / "generation_config.json"
    if generation.exists():
        ids = json.loads(generation.read_text()).get("eos_token_id", ids)
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _quantization(hf: Any) -> dict[str, Any] | None:
    quantization = getattr(hf, "quantization_config", None)
    if quantization is None:
        return None
    return dict(quantization) if isinstance(quantization, dict) else dict(quantization.to_dict())
