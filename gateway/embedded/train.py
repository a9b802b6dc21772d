"""The training loop of the embedded base: packed rows, AdamW, the last steps through NF4 round trips."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from gateway.embedded.packing import Rows
from gateway.embedded.quantization import base_linears, round_trip

LossLog = list[dict[str, float]]


@dataclass(frozen=True)
class Phase:
    """`steps` optimizer steps over rows of `length` tokens, with or without the NF4 round trip."""

    steps: int
    length: int
    nf4: bool


@dataclass(frozen=True)
class Recipe:
    """How the base is trained. tokens_per_step counts padding; text_share is the share of text rows."""

    phases: tuple[Phase, ...]
    tokens_per_step: int = 65_536
    text_share: float = 0.25
    peak_lr: float = 3e-3
    warmup_steps: int = 200
    decay_share: float = 0.5
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps over all phases."""
        return sum(phase.steps for phase in self.phases)


@dataclass(frozen=True)
class PhaseData:
    """The rows of one phase, and held-out ones (no text where what was held out is not known)."""

    text: Rows
    chats: Rows
    val_chats: Rows
    val_text: Rows | None = None


def base_config(vocab_size: int, bos: int, eos: int, pad: int) -> LlamaConfig:
    """The embedded base's shape: 4.3 million parameters, every linear's input a multiple of NF4's block."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def row_loss(model: LlamaForCausalLM, ids: Tensor, trained: Tensor) -> Tensor:
    """Mean cross entropy over the trained tokens. Examples of one row do not see each other.

    ids: int64 [rows, length]; trained: bool, the same shape.
    """
    example = (ids == model.config.bos_token_id).cumsum(dim=1)  # [rows, length]
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    mask = (example[:, :, None] == example[:, None, :]) & causal
    logits = model(input_ids=ids, attention_mask=mask[:, None], use_cache=False).logits
    targets = ids[:, 1:].masked_fill(~trained[:, 1:], -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, a plateau, then a linear decay to zero over the last `decay_share` of the steps."""
    decay_steps = max(1, int(recipe.steps * recipe.decay_share))
    return recipe.peak_lr * min(1.0, (step + 1) / recipe.warmup_steps, (recipe.steps - step) / decay_steps)


def train_base(
    model: LlamaForCausalLM, recipe: Recipe, data: Callable[[int], PhaseData], log_every: int = 50
) -> LossLog:
    """Train `model` in place on its device; returns losses every `log_every` steps and after each phase.

    data: gives the rows of a length. On CUDA the forward pass runs in bfloat16 and each layer is compiled.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        _groups(model, recipe), lr=recipe.peak_lr, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    if device.type == "cuda":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    log: LossLog = []
    step, started = 0, time.perf_counter()
    for phase in recipe.phases:
        rows = data(phase.length)
        weights: list[Tensor] = [m.weight for m in base_linears(model).values()] if phase.nf4 else []
        for ids, trained in _batches(rows, recipe, phase, device):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            loss = _step(model, optimizer, ids, trained, weights, recipe.clip)
            step += 1
            if step % log_every == 0:
                log.append(_entry(step, started, train=loss.item()))
        log.append(_entry(step, started, **_validate(model, rows)))
    return log


def _entry(step: int, started: float, **losses: float) -> dict[str, float]:
    seconds = round(time.perf_counter() - started, 1)
    entry = {"step": step, "seconds": seconds, **{name: round(loss, 4) for name, loss in losses.items()}}
    print(entry, flush=True)
    return entry


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, object]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    trained: Tensor,
    nf4_weights: list[Tensor],
    clip: float,
) -> Tensor:
    """One optimizer step. `nf4_weights` are quantized for the forward and backward pass only (straight through)."""
    masters = [weight.detach().clone() for weight in nf4_weights]
    if nf4_weights:
        rounded = round_trip(torch.cat([master.flatten() for master in masters]))
        _assign(nf4_weights, torch.split(rounded, [master.numel() for master in masters]))
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.is_cuda):
        loss = row_loss(model, ids, trained)
    loss.backward()  # type: ignore[no-untyped-call]
    _assign(nf4_weights, masters)
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _assign(weights: list[Tensor], values: list[Tensor] | tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value.view_as(weight))


def _batches(rows: PhaseData, recipe: Recipe, phase: Phase, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches with a fixed number of text rows in each."""
    size = recipe.tokens_per_step // phase.length
    num_text = math.ceil(size * recipe.text_share)
    generator = torch.Generator().manual_seed(recipe.seed + phase.length)
    text, chats = _on(rows.text, device), _on(rows.chats, device)
    text_order, chat_order = _order(len(rows.text), generator), _order(len(rows.chats), generator)
    for _ in range(phase.steps):
        picked_text = torch.tensor([next(text_order) for _ in range(num_text)], device=device)
        picked_chats = torch.tensor([next(chat_order) for _ in range(size - num_text)], device=device)
        yield (
            torch.cat((text[0][picked_text], chats[0][picked_chats])).long(),
            torch.cat((text[1][picked_text], chats[1][picked_chats])),
        )


def _order(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _on(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(rows.ids).to(device), torch.from_numpy(rows.trained).to(device)


@torch.no_grad()
def _validate(model: LlamaForCausalLM, rows: PhaseData) -> dict[str, float]:
    """Losses on rows that are never trained on."""
    device = next(model.parameters()).device
    losses: dict[str, float] = {}
    for name, held_out in (("val_text", rows.val_text), ("val_chats", rows.val_chats)):
        if held_out is None:
            continue
        ids, trained = _on(held_out, device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=ids.is_cuda):
            losses[name] = row_loss(model, ids[:64].long(), trained[:64]).item()
    return losses
