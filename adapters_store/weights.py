"""A stored adapter's tensors, as they were uploaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from adapters_store.base_spec import lora_tensor_name
from adapters_store.errors import AdapterLoadFailed
from adapters_store.manifest import ADAPTER_METADATA_KEY, PROMPT_TENSOR, AdapterSpec, LoRADelta, VirtualTokens


@dataclass(frozen=True)
class AdapterWeights:
    """LoRA matrices by (layer, linear): A [r, in] and B [out, r] with the LoRA scale already in B.

    rank: the largest r; 0 without any. Tensors are on the CPU: A as uploaded (fp32, bf16 or fp16), B too or in fp32
    (`fold_scale`). virtual_tokens: what comes before every prompt, as uploaded: input embeddings [num_tokens, hidden],
    or keys and values [num_tokens, 2 * num_layers, kv_width], a layer's keys before its values.
    """

    rank: int
    tensors: Mapping[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
    virtual_tokens: torch.Tensor | None = None


def load_weights(path: Path) -> AdapterWeights:
    """Read a stored blob, whose own header says ranks and scales. Raises `AdapterLoadFailed`."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            spec = AdapterSpec.model_validate_json((file.metadata() or {})[ADAPTER_METADATA_KEY])
            tensors = {
                (layer, delta.linear): _read_pair(file, layer, delta) for delta in spec.deltas for layer in delta.layers
            }
            virtual = _read_virtual(file, spec.virtual_tokens) if spec.virtual_tokens is not None else None
    except (OSError, SafetensorError, KeyError, ValidationError) as error:
        raise AdapterLoadFailed(path.name, f"its stored file cannot be read ({error})") from error
    return AdapterWeights(rank=spec.rank, tensors=tensors, virtual_tokens=virtual)


def _read_pair(file: Any, layer: int, delta: LoRADelta) -> tuple[torch.Tensor, torch.Tensor]:
    a: torch.Tensor = file.get_tensor(lora_tensor_name(layer, delta.linear, "A"))
    b: torch.Tensor = file.get_tensor(lora_tensor_name(layer, delta.linear, "B"))
    return a, fold_scale(b, delta.scale)


def _read_virtual(file: Any, virtual: VirtualTokens) -> torch.Tensor:
    rows: torch.Tensor = file.get_tensor(PROMPT_TENSOR)
    return rows if virtual.num_layers is None else rows.view(len(rows), 2 * virtual.num_layers, -1)


def fold_scale(b: torch.Tensor, scale: float) -> torch.Tensor:
    """B [out, r] times `scale`, exactly: in B's dtype when the scale is a power of two, else in fp32."""
    if scale == 1.0:
        return b
    is_power_of_two = math.frexp(scale)[0] == 0.5
    return b * scale if is_power_of_two else b.float() * scale
