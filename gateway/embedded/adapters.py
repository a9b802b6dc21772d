"""LoRA on the NF4 base for the demo's tenants: peft on transformers, loss on the assistant's tokens."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from gateway.embedded.packing import Example, encode_chat
from gateway.embedded.quantization import quantize_base
from gateway.embedded.tenants import read_chats

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASE_NAME = "patchbay-embedded"


@dataclass(frozen=True)
class LoRARecipe:
    """Hyperparameters of one fine-tune, with the trainer's schedule: 5 % warm-up, then a cosine to zero."""

    n_epochs: int = 5
    batch_size: int = 16
    learning_rate: float = 5e-3
    rank: int = 8
    alpha: int = 16
    seed: int = 0

    def to_json(self) -> dict[str, object]:
        """As written to recipe.json."""
        return dataclasses.asdict(self)


def load_nf4_base(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The base in fp32 with the weights that NF4 serving computes with, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    quantize_base(model)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def train_adapter(
    base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, train_file: Path, recipe: LoRARecipe
) -> tuple[PeftModel, dict[str, float]]:
    """Fine-tune a LoRA on a JSONL file of chats; returns the model and {"steps", "seconds", "loss"}."""
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE_NAME,
    )
    model = get_peft_model(base, config).train()
    examples = [encode_chat(tokenizer.backend_tokenizer, chat) for chat in read_chats(train_file)]
    steps = recipe.n_epochs * -(-len(examples) // recipe.batch_size)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(recipe.seed)
    started, losses = time.perf_counter(), []
    for _ in range(recipe.n_epochs):
        for picked in torch.split(torch.randperm(len(examples), generator=generator), recipe.batch_size):
            loss = _loss(model, [examples[index] for index in picked.tolist()], tokenizer.pad_token_id)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
    tail = losses[-10:]
    seconds = time.perf_counter() - started
    return model.eval(), {"steps": steps, "seconds": round(seconds, 1), "loss": round(sum(tail) / len(tail), 5)}


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the peft folder, its weights in bfloat16, its base under a neutral name."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would look the base up on the hub
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=2, sort_keys=True) + "\n")


def _rate(step: int, steps: int) -> float:
    warmup = math.ceil(0.05 * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _loss(model: PeftModel, examples: list[Example], pad: int) -> Tensor:
    """Mean cross entropy over the answers' tokens of a batch padded on the right."""
    length = max(len(ids) for ids, _ in examples)
    ids = torch.full((len(examples), length), pad)
    targets = torch.full((len(examples), length), -100)
    for row, (tokens, trained) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        targets[row, : len(tokens)] = torch.tensor(tokens).masked_fill(~torch.tensor(trained), -100)
    ids, targets = ids.to(model.device), targets.to(model.device)
    logits = model(input_ids=ids, attention_mask=(ids != pad).long()).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=-100)
