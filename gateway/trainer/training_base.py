"""The base as `transformers` runs it, over the same packed weights as the server's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from adapters_store.base_spec import LINEARS, BaseSpec
from gateway.config import EngineConfig
from gateway.models.checkpoint import Checkpoint
from gateway.models.config import DecoderConfig
from gateway.models.loader import load_model, resolve_device, resolve_dtype
from gateway.trainer.nf4_linear import NF4Linear


@dataclass(frozen=True)
class TrainingBase:
    """A frozen base ready to take adapters.

    model: a transformers causal LM. name: the base's public name. spec: what adapters are checked against.
    max_positions: the longest sequence that the base knows, in tokens.
    """

    model: Any
    tokenizer: Any
    name: str
    spec: BaseSpec
    hidden_size: int
    max_positions: int

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device


def load_training_base(config: EngineConfig) -> TrainingBase:
    """Load the base that `config` names, for training.

    The engine's loader runs first and is dropped: it alone decides what can be served, and the fingerprint. Raises
    `BaseModelUnsupported`.
    """
    loaded = load_model(config)
    name, folder, tokenizer, spec = loaded.name, loaded.folder, loaded.tokenizer, loaded.spec
    del loaded
    decoder_config = DecoderConfig.from_folder(folder)
    device = resolve_device(config.device)
    hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    hf_config.name_or_path = name  # peft writes it into every adapter; the folder's path is nobody's business
    model = _build(
        hf_config,
        Checkpoint(folder, decoder_config),
        device,
        resolve_dtype(config.dtype, device),
        quantize=config.quantization == "nf4",
    )
    return TrainingBase(
        model, tokenizer, name, spec, decoder_config.hidden_size, decoder_config.max_position_embeddings
    )


def _build(hf_config: Any, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, quantize: bool) -> Any:
    """A transformers model filled tensor by tensor, so that the whole base is never dense in memory at once."""
    if hasattr(hf_config, "quantization_config"):
        del hf_config.quantization_config  # the packed linears are put in here, not by transformers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation="sdpa")
    for path, module in list(model.named_modules()):
        if quantize and isinstance(module, nn.Linear) and path.rpartition(".")[2] in LINEARS:
            packed = checkpoint.nf4(path, (module.out_features, module.in_features), device)
            bias = None if module.bias is None else _read(checkpoint, f"{path}.bias", module.bias, device)
            model.set_submodule(path, NF4Linear(packed, bias, dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            tensor = _read(checkpoint, name, parameter, device).to(dtype)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config).to(device)
    model.requires_grad_(False)
    return model.eval()


def _read(checkpoint: Checkpoint, name: str, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    return checkpoint.checked(name, tuple(like.shape)).to(device)
