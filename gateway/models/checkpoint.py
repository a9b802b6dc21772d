"""A Hugging Face folder's tensors, one at a time; and its linears as NF4, quantized here or read as stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gateway.errors import BaseModelUnsupported
from gateway.models.config import DecoderConfig
from lora_kernels.nf4 import NF4Weight, quantize_nf4

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_STATE = "quant_state.bitsandbytes__nf4"


class Checkpoint:
    """Read access to the safetensors files of one folder, single or sharded.

    Raises `BaseModelUnsupported` for a folder without safetensors, a missing shard or tensor, or a quantization other
    than bitsandbytes' NF4 with double quantization and blocks of 64.
    """

    def __init__(self, folder: Path, config: DecoderConfig) -> None:
        self.folder = folder
        self._files = _tensor_files(folder)
        self._open: dict[Path, Any] = {}
        self.prequantized = config.quantization is not None
        if config.quantization is not None:
            _check_bitsandbytes(folder, config.quantization)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU, as stored."""
        try:
            path = self._files[name]
        except KeyError:
            raise BaseModelUnsupported(
                f"{self.folder}: the tensor {name} is missing; the checkpoint is incomplete or of another family."
            ) from None
        return self._reader(path).get_tensor(name)  # type: ignore[no-any-return]

    def checked(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor `name`, refused by name when its shape is not `shape`."""
        tensor = self.tensor(name)
        if tuple(tensor.shape) != shape:
            raise BaseModelUnsupported(
                f"{self.folder}: {name} has shape {list(tensor.shape)}, the config asks for {list(shape)}."
            )
        return tensor

    def nf4(self, module: str, shape: tuple[int, int], device: torch.device) -> NF4Weight:
        """The linear `module` in NF4 on `device`: the stored bytes of a 4-bit checkpoint, else quantized now."""
        if self.prequantized:
            return self._stored_nf4(module, shape, device)
        return quantize_nf4(self.checked(f"{module}.weight", shape).to(device))

    def _stored_nf4(self, module: str, shape: tuple[int, int], device: torch.device) -> NF4Weight:
        name = f"{module}.weight"
        state = json.loads(bytes(self.tensor(f"{name}.{_STATE}").tolist()))
        if tuple(state["shape"]) != shape or state["blocksize"] != 64 or state.get("nested_blocksize") != 256:
            raise BaseModelUnsupported(f"{self.folder}: {name} has the quantization state {state}.")
        return NF4Weight(
            packed=self.tensor(name).reshape(-1).to(device),
            absmax_u8=self.tensor(f"{name}.absmax").to(device),
            nested_absmax=self.tensor(f"{name}.nested_absmax").to(device),
            nested_offset=torch.tensor(state["nested_offset"], dtype=torch.float32, device=device),
            nested_code=self.tensor(f"{name}.nested_quant_map").to(device),
            shape=shape,
            dtype=getattr(torch, state["dtype"]),
        )

    def _reader(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise BaseModelUnsupported(f"{path} cannot be read: {error}") from error
        return self._open[path]


def _tensor_files(folder: Path) -> dict[str, Path]:
    index = folder / _INDEX
    if index.exists():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: folder / Path(file).name for name, file in weight_map.items()}
    single = folder / _SINGLE
    if not single.exists():
        raise BaseModelUnsupported(
            f"{folder} holds neither {_SINGLE} nor {_INDEX}; save the model with save_pretrained (safetensors)."
        )
    try:
        with safe_open(single, framework="pt") as reader:
            return dict.fromkeys(reader.keys(), single)
    except (OSError, SafetensorError) as error:
        raise BaseModelUnsupported(f"{single} cannot be read: {error}") from error


def _check_bitsandbytes(folder: Path, quantization: dict[str, Any]) -> None:
    served = (
        quantization.get("quant_method") == "bitsandbytes"
        and quantization.get("load_in_4bit")
        and quantization.get("bnb_4bit_quant_type") == "nf4"
        and quantization.get("bnb_4bit_use_double_quant")
    )
    if not served:
        method = quantization.get("quant_method")
        raise BaseModelUnsupported(
            f"{folder}/config.json: a checkpoint quantized by {method!r} is not served. Use bf16, fp16 or fp32 "
            "weights, or bitsandbytes 4-bit NF4 with double quantization."
        )
