"""First-order LoRA training with `peft`, on a dense or an NF4 base (LoRA, arXiv 2106.09685; QLoRA, 2305.14314)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from gateway.errors import InvalidRequest
from gateway.trainer.batches import Batch, micro_batches, shuffled_batches
from gateway.trainer.dataset import TokenizedExample
from gateway.trainer.hyperparameters import TrainingSettings
from gateway.trainer.step_metrics import StepMetrics
from gateway.trainer.training_base import TrainingBase

VALIDATION_BATCH = 16


class TrainingDiverged(InvalidRequest):
    """The loss became infinite or not a number."""


@dataclass(frozen=True)
class TrainingResult:
    """What a run did: steps, tokens seen (padding not counted), and its last step."""

    steps: int
    trained_tokens: int
    last: StepMetrics


@dataclass(frozen=True)
class _Score:
    """Sums over predicted tokens."""

    loss: float
    correct: int
    count: int


OnStep = Callable[[StepMetrics], None]


class LoRATrainer:
    """Trains one adapter on `base`, whose model it holds until `close` takes the adapter off again.

    The result depends on `settings` and the examples alone on the CPU with a fixed number of threads: the seed draws
    the initial A matrices and the order of the examples, and there is no dropout. `check` is called before each
    forward pass; what it raises ends the run.
    """

    def __init__(
        self, base: TrainingBase, settings: TrainingSettings, check: Callable[[], None] = lambda: None
    ) -> None:
        self.base = base
        self.settings = settings
        self._check = check
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(settings.target_modules),
            base_model_name_or_path=base.name,
        )
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.model: Any = get_peft_model(base.model, config)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        # The betas' second is below Adam's usual 0.999: runs of a few hundred steps do not outlive its memory.
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def close(self) -> None:
        """Take the adapter off the base, which is then as it was."""
        self.model.unload()

    def train(
        self, train: Sequence[TokenizedExample], valid: Sequence[TokenizedExample], on_step: OnStep
    ) -> TrainingResult:
        """Run all epochs, calling `on_step` after each step.

        Raises `TrainingDiverged` when the loss is no longer finite.
        """
        generator = torch.Generator().manual_seed(self.settings.seed)
        total_steps = self.settings.total_steps(len(train))
        step = trained_tokens = 0
        for _ in range(self.settings.n_epochs):
            last_of_epoch = step + self.settings.steps_per_epoch(len(train))
            for examples in shuffled_batches(train, self.settings.batch_size, generator):
                started = time.perf_counter()
                rate = self.settings.learning_rate_at(step, total_steps)
                score = self._step(examples, rate)
                step += 1
                num_tokens = sum(map(len, examples))
                trained_tokens += num_tokens
                speed = num_tokens / (time.perf_counter() - started)
                validation = self.evaluate(valid) if valid and step == last_of_epoch else None
                metrics = _metrics(step, total_steps, rate, speed, score, validation)
                on_step(metrics)
        return TrainingResult(step, trained_tokens, metrics)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[TokenizedExample]) -> _Score:
        """Summed loss and correct tokens over `examples`."""
        scores = []
        for start in range(0, len(examples), VALIDATION_BATCH):
            for batch in micro_batches(examples[start : start + VALIDATION_BATCH]):
                loss, correct = self._loss(batch.to(self.base.device))
                scores.append(_Score(float(loss), int(correct), len(batch.targets)))
        return _sum(scores)

    def save(self, folder: Path) -> None:
        """Write the adapter as `peft` does, and `patchbay.json` with the base's fingerprint."""
        folder.mkdir(parents=True, exist_ok=True)
        # PeftModel.save_pretrained would also write a model card and look the base up on the hub.
        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = self.model.peft_config["default"]
        inference_mode, config.inference_mode = config.inference_mode, True
        config.save_pretrained(folder)
        config.inference_mode = inference_mode
        (folder / "patchbay.json").write_text(json.dumps({"base_fingerprint": self.base.spec.fingerprint}))

    def _step(self, examples: Sequence[TokenizedExample], rate: float) -> _Score:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        batches = [batch.to(self.base.device) for batch in micro_batches(examples)]
        num_targets = sum(len(batch.targets) for batch in batches)
        scores = []
        for batch in batches:
            loss, correct = self._loss(batch)
            torch.autograd.backward(loss / num_targets)
            scores.append(_Score(float(loss.detach()), int(correct), len(batch.targets)))
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.max_grad_norm)
        if not torch.isfinite(norm):
            raise TrainingDiverged(
                "the loss is no longer finite. Lower learning_rate_multiplier (or peft.learning_rate).",
                param="hyperparameters",
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return _sum(scores)

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed cross-entropy and number of correct tokens, both 0-d; logits for the tokens to learn only."""
        self._check()
        decoder = self.base.model  # the adapter's layers are in place, inside the base
        hidden = decoder.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        rows = hidden.flatten(0, 1).index_select(0, batch.positions)
        logits = decoder.lm_head(rows).float()  # [num_targets, vocab]
        correct = (logits.detach().argmax(dim=1) == batch.targets).sum()
        return F.cross_entropy(logits, batch.targets, reduction="sum"), correct


def _sum(scores: Sequence[_Score]) -> _Score:
    return _Score(sum(s.loss for s in scores), sum(s.correct for s in scores), sum(s.count for s in scores))


def _metrics(
    step: int, total_steps: int, rate: float, speed: float, score: _Score, valid: _Score | None
) -> StepMetrics:
    return StepMetrics(
        step=step,
        total_steps=total_steps,
        train_loss=score.loss / score.count,
        train_mean_token_accuracy=score.correct / score.count,
        learning_rate=rate,
        tokens_per_second=speed,
        valid_loss=None if valid is None else valid.loss / valid.count,
        valid_mean_token_accuracy=None if valid is None else valid.correct / valid.count,
    )
