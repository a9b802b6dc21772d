"""Tiny models, tokenizers and adapters that the tests make themselves, in Hugging Face's and peft's own formats."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from adapters_store.base_spec import BaseSpec, module_path
from adapters_store.blobs import BlobStore
from adapters_store.upload import Staging
from gateway.engine.request import AdapterRef
from gateway.models.checkpoint import Checkpoint
from gateway.models.config import DecoderConfig

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 300 tokens with ChatML specials, saved into `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|end|>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    return fast


def make_base(folder: Path, family: str = "llama", *, seed: int = 0, shard: str = "1GB", **overrides: Any) -> Path:
    """A two-layer model of the family with random fp32 weights, saved as Hugging Face saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder)
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16 if family in ("llama", "qwen3") else None,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(seed)
    settings |= overrides
    config = _CONFIGS[family](**{key: value for key, value in settings.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # Larger than the default initialisation: logits far enough apart for greedy tokens to be stable.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def make_adapter(
    base: Path,
    folder: Path,
    *,
    rank: int = 4,
    alpha: int = 8,
    targets: Sequence[str] = ALL_LINEARS,
    seed: int = 0,
    **config: Any,
) -> Path:
    """A random LoRA on `base`, saved by peft."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    peft_model = get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM", **config),
    )
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.08)
    peft_model.save_pretrained(folder)
    return folder


def edited_adapter(source: Path, folder: Path, edit: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a peft adapter whose tensors are what `edit` makes of each, by its name."""
    shutil.copytree(source, folder)
    path = folder / "adapter_model.safetensors"
    save_file({name: edit(name, tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return folder


def overflowing(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """For `edited_adapter`: numbers that pass validation, and whose product with almost any input is infinite."""
    return 100 * tensor if "lora_A" in name else torch.full_like(tensor, 1.6e38)


def make_prompt_adapter(base: Path, folder: Path, config: PeftConfig, *, seed: int = 0) -> Path:
    """Random virtual tokens on `base`, saved by peft."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(config))  # which peft fills in
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder


def stored_adapter(base: Path, folder: Path, blobs: BlobStore, name: str, **settings: Any) -> AdapterRef:
    """A `make_adapter`, stored."""
    return store_adapter(base, make_adapter(base, folder, **settings), blobs, name)


def store_adapter(base: Path, folder: Path, blobs: BlobStore, name: str) -> AdapterRef:
    """A saved adapter, validated as an upload is and put into the blob store."""
    config = DecoderConfig.from_folder(base)
    checkpoint = Checkpoint(base, config)
    biased = tuple(name for name in ALL_LINEARS if f"{module_path(0, name)}.bias" in checkpoint)
    spec = BaseSpec("any", config.num_layers, config.linears, biased, config.vocab_size, config.tie_word_embeddings)
    with Staging(folder.parent / "staging") as staging:
        for file in ("adapter_config.json", "adapter_model.safetensors", "adapter.safetensors"):
            if (folder / file).exists():
                staging.add_file(file, [(folder / file).read_bytes()])
        staged = staging.validate(spec, max_rank=256, max_virtual_tokens=64, max_token_rows=4096)
        blobs.put(staged.manifest.digest, staged.path)
    return AdapterRef.of(name, staged.manifest)


def uploaded_virtual_tokens(
    spec: BaseSpec, folder: Path, blobs: BlobStore, kind: str, num_tokens: int, seed: int = 0
) -> AdapterRef:
    """Random virtual tokens of peft's `kind` for a base of any size, validated as an upload is and stored."""
    hidden, kv_width = spec.linears["q_proj"][1], spec.linears["k_proj"][0]
    width = 2 * spec.num_layers * kv_width if kind == "PREFIX_TUNING" else hidden
    rows = 0.3 * torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))
    with Staging(folder / "staging") as staging:
        config = json.dumps({"peft_type": kind, "num_virtual_tokens": num_tokens})
        staging.add_file("adapter_config.json", [config.encode()])
        staging.add_file("adapter_model.safetensors", [save({"prompt_embeddings": rows})])
        staged = staging.validate(spec, 1, max_virtual_tokens=num_tokens)
        blobs.put(staged.manifest.digest, staged.path)
    return AdapterRef.of(f"t/{kind.lower()}-{seed}:1", staged.manifest)


def save_bottleneck(folder: Path, hidden_size: int, num_layers: int, size: int, seed: int, **config: Any) -> Path:
    """A random bottleneck adapter, saved as AdapterHub's package `adapters` does; `config` has its fields."""
    folder.mkdir(parents=True)
    inner = {"mh_adapter": True, "output_adapter": True, "reduction_factor": hidden_size / (size + 0.5), **config}
    file = {
        "config": inner,
        "hidden_size": hidden_size,
        "name": "a",
        "model_type": "llama",
        "version": "adapters.1.3.0",
    }
    (folder / "adapter_config.json").write_text(json.dumps(file))
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "adapter_down.0.weight": (size, hidden_size),
        "adapter_down.0.bias": (size,),
        "adapter_up.weight": (hidden_size, size),
        "adapter_up.bias": (hidden_size,),
    }
    tensors = {
        f"model.layers.{layer}.{site}_adapters.adapters.a.{tensor}": 0.1 * torch.randn(shape, generator=generator)
        for layer in range(num_layers)
        for site in ("attention", "output")
        for tensor, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter.safetensors")
    return folder


def save_loretta_bottleneck(
    folder: Path, hidden_size: int, target_modules: list[str], modules: Sequence[str], size: int, seed: int
) -> Path:
    """A random LoRETTA_adp, as `loretta` saves it but for the pickle; modules: the targets, as "0.mlp.down_proj"."""
    folder.mkdir(parents=True)
    config = {
        "adapter_dropout": 0.0, "base_model_name_or_path": None, "bias": "none", "bottleneck_size": size,
        "inference_mode": True, "init_weights": "bert", "modules_to_save": None, "non_linearity": "tanh",
        "peft_type": "BOTTLENECK", "scaling": 0.3, "target_modules": target_modules, "task_type": "CAUSAL_LM",
        "tensor_rank": 3, "tensorized": True, "use_adapterp": False, "use_parallel_adapter": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for module in modules:
        for matrix, width in (("adapter_down", size), ("adapter_up", hidden_size)):
            name = f"base_model.model.model.layers.{module}.{matrix}.layer"
            tensors[f"{name}.bias"] = 0.3 * torch.randn(width, generator=generator)
            for i, shape in enumerate(((1, hidden_size // 8, 3), (3, 8, 3), (3, size, 1))):
                tensors[f"{name}.tensor.factors.{i}"] = 0.3 * torch.randn(shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def load_oracle(base: Path, adapter: Path | None = None) -> torch.nn.Module:
    """The base, or `peft`'s model of an adapter on it, in fp32: what our logits are compared with."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, adapter)
    return model.eval()
