"""From a Hugging Face folder to a decoder on its device, its tokenizer and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from adapters_store.base_spec import LINEARS, BaseSpec, module_path
from adapters_store.lora_layout import GROUPS
from adapters_store.shard import Shard
from gateway.config import EngineConfig
from gateway.embedded import embedded_path
from gateway.errors import BaseModelUnsupported, ConfigInvalid
from gateway.layers.attention import Attention
from gateway.layers.linear import AdaptedLinear, DenseLinear, RowParallelLinear, fuse_nf4
from gateway.layers.mlp import GatedMLP
from gateway.layers.norm import RMSNorm
from gateway.layers.tensor_parallel import TensorParallel
from gateway.models.checkpoint import Checkpoint
from gateway.models.config import DecoderConfig
from gateway.models.decoder import Decoder, DecoderLayer
from lora_kernels.nf4 import BLOCK, blocks_of


@dataclass(frozen=True)
class LoadedModel:
    """A base ready to serve. `name` is what clients call it; `spec` is what adapters are checked against."""

    name: str
    folder: Path
    decoder: Decoder
    tokenizer: Any
    spec: BaseSpec


def base_folder(base: str) -> Path:
    """The folder that `EngineConfig.base` names. Raises `BaseModelUnsupported` when there is none."""
    folder = embedded_path() if base == "embedded" else Path(base).expanduser()
    if not folder.is_dir():
        raise BaseModelUnsupported(f"--base {base}: no such folder; give a Hugging Face model folder.")
    return folder


def base_name(base: str) -> str:
    """What clients call the base: "patchbay-embedded", or the folder's name."""
    return "patchbay-embedded" if base == "embedded" else Path(base).expanduser().resolve().name


def load_model(config: EngineConfig, ranks: TensorParallel | None = None) -> LoadedModel:
    """Load, quantize and fingerprint the base that `config` names; with `ranks` this rank's share of it.

    Shares are cut from the base when it is packed, whose fingerprint is then the same however many ranks there are.
    Raises `BaseModelUnsupported` naming the file and field of anything that cannot be served, `ConfigInvalid` where the
    base cannot be shared out.
    """
    folder = base_folder(config.base)
    decoder_config = DecoderConfig.from_folder(folder)
    builder = _Builder(decoder_config, Checkpoint(folder, decoder_config), config, ranks)
    decoder = builder.build()
    return LoadedModel(
        name=base_name(config.base),
        folder=folder,
        decoder=decoder,
        tokenizer=AutoTokenizer.from_pretrained(folder, local_files_only=True),
        spec=BaseSpec(
            fingerprint=builder.fingerprint(),
            num_layers=decoder_config.num_layers,
            linears=decoder_config.linears,
            biased=builder.biased,
            vocab_size=decoder_config.vocab_size,
            tied=decoder_config.tie_word_embeddings,
            model_type=decoder_config.model_type,
        ),
    )


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on CUDA and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def resolve_adapter_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """What adapters are kept in beside a base in `dtype`."""
    return torch.int8 if config.adapter_dtype == "int8" else dtype


class _Builder:
    """Builds the decoder tensor by tensor, hashing each packed tensor on the way."""

    def __init__(
        self, config: DecoderConfig, checkpoint: Checkpoint, engine: EngineConfig, ranks: TensorParallel | None
    ) -> None:
        if engine.quantization == "none" and checkpoint.prequantized:
            raise BaseModelUnsupported(
                f"{checkpoint.folder} is quantized to 4 bits already; serve it with --quantization nf4."
            )
        self.config = config
        self.checkpoint = checkpoint
        self.ranks = ranks
        self.shard = ranks.shard if ranks is not None else Shard()
        self.part = config.divided(self.shard.size)
        self.quantize = engine.quantization == "nf4"
        self.device = ranks.device if ranks is not None else resolve_device(engine.device)
        self.dtype = resolve_dtype(engine.dtype, self.device)
        self._hash = hashlib.sha256(
            json.dumps({"quantization": engine.quantization, "block": 64, "double": True}).encode()
        )

    def build(self) -> Decoder:
        c = self.config
        embed = self._tensor("model.embed_tokens.weight", (c.vocab_size, c.hidden_size))
        layers = tuple(self._layer(i) for i in range(c.num_layers))
        norm = self._norm("model.norm.weight", c.hidden_size)
        head = embed if c.tie_word_embeddings else self._read("lm_head.weight", (c.vocab_size, c.hidden_size))
        return Decoder(self.part, embed, layers, norm, DenseLinear(self._place(self._rows(head))), self.ranks)

    @property
    def biased(self) -> tuple[str, ...]:
        """The linears that have a bias; they are the same in every layer."""
        return tuple(name for name in LINEARS if f"{module_path(0, name)}.bias" in self.checkpoint)

    def fingerprint(self) -> str:
        """sha256 over the packed base, in the order of loading. Call it once, after `build`."""
        return self._hash.hexdigest()

    def _layer(self, i: int) -> DecoderLayer:
        c, prefix = self.config, f"model.layers.{i}"
        has_head_norms = f"{prefix}.self_attn.q_norm.weight" in self.checkpoint
        attention = Attention(
            self._linear(i, "qkv"),
            self._row_parallel(i, "o"),
            head_dim=c.head_dim,
            q_norm=self._norm(f"{prefix}.self_attn.q_norm.weight", c.head_dim) if has_head_norms else None,
            k_norm=self._norm(f"{prefix}.self_attn.k_norm.weight", c.head_dim) if has_head_norms else None,
            sliding_window=c.sliding_windows[i],
        )
        return DecoderLayer(
            self._norm(f"{prefix}.input_layernorm.weight", c.hidden_size),
            attention,
            self._norm(f"{prefix}.post_attention_layernorm.weight", c.hidden_size),
            GatedMLP(self._linear(i, "gate_up"), self._row_parallel(i, "down")),
        )

    def _row_parallel(self, layer: int, group: str) -> AdaptedLinear | RowParallelLinear:
        linear = self._linear(layer, group)
        return linear if self.ranks is None else RowParallelLinear(linear, self.ranks)

    def _linear(self, layer: int, group: str) -> AdaptedLinear:
        names = GROUPS[group]
        shapes = {name: self.config.linears[name] for name in names}
        paths = {name: module_path(layer, name) for name in names}
        whole = {
            name: self._tensor(f"{path}.bias", shapes[name][:1])
            for name, path in paths.items()
            if f"{path}.bias" in self.checkpoint
        }
        biases = [part for name, bias in whole.items() if (part := self.shard.bias(name, bias)) is not None]
        bias = torch.cat(biases) if biases else None
        if self.quantize:
            base = fuse_nf4([self._nf4(name, paths[name], shapes[name]) for name in names], bias, self.dtype)
        else:
            dense = [self.shard.weight(name, self._read(f"{paths[name]}.weight", shapes[name])) for name in names]
            base = DenseLinear(torch.cat([self._place(part) for part in dense]), bias)
        return AdaptedLinear(base, layer, group, tuple(self.part.linears[name][0] for name in names))

    def _nf4(self, name: str, path: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's blocks: the packed ones are the bytes of the whole, the scales are expanded."""
        if shape[1] % BLOCK:
            raise BaseModelUnsupported(
                f"{path} has {shape[1]} inputs, not a multiple of 64; serve it with --quantization none."
            )
        inputs = self.part.linears[name][1]
        if inputs % BLOCK:
            raise ConfigInvalid(
                f"{path} would have {inputs} inputs on each rank, which cuts NF4's blocks of 64; choose another "
                "engine.tensor_parallel_size, or quantization none.",
                param="engine.tensor_parallel_size",
            )
        weight = self.checkpoint.nf4(path, shape, self.device)
        # Not the scales: their offset is a mean, whose last bit depends on the device that took it.
        self._update(path, weight.packed)
        packed, absmax = blocks_of(weight)
        return self.shard.weight(name, packed), self.shard.weight(name, absmax)

    def _norm(self, name: str, dim: int) -> RMSNorm:
        return RMSNorm(self._tensor(name, (dim,)), self.config.rms_norm_eps)

    def _rows(self, head: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a matrix of the vocabulary, as many as every other's."""
        missing = -len(head) % self.shard.size
        return self.shard.part(F.pad(head, (0, 0, 0, missing)) if missing else head, 0)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._place(self._read(name, shape))

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self.checkpoint.checked(name, shape)
        self._update(name, tensor)
        return tensor

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype)

    def _update(self, name: str, tensor: torch.Tensor) -> None:
        self._hash.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        self._hash.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
