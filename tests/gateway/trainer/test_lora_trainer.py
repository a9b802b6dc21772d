from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gateway.config import EngineConfig
from gateway.models.loader import load_model
from gateway.trainer import lora_trainer
from gateway.trainer.batches import micro_batches
from gateway.trainer.dataset import TokenizedExample
from gateway.trainer.hyperparameters import Hyperparameters, PeftOptions, TrainingSettings, resolve_settings
from gateway.trainer.lora_trainer import LoRATrainer, TrainingDiverged
from gateway.trainer.nf4_linear import NF4Linear
from gateway.trainer.step_metrics import StepMetrics
from gateway.trainer.training_base import TrainingBase, load_training_base
from lora_kernels.nf4 import dequantize_nf4, quantize_nf4
from tests.gateway.trainer.tiny import make_base_folder

IDS = torch.arange(20, 60)[None]


def settings(**changes: Any) -> TrainingSettings:
    values = {"rank": 4, "alpha": 8.0, "target_modules": ("q_proj", "v_proj", "down_proj"), "learning_rate": 1e-2}
    values |= {"lr_scheduler": "cosine", "n_epochs": 4, "batch_size": 8, "seed": 7}
    return TrainingSettings(**values | changes)


def reference(folder: Path, *, quantized: bool = True) -> Any:
    """transformers' own loading of the base, its linears through one NF4 round trip."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path, module in model.named_modules():
        if quantized and path.endswith("_proj"):
            module.weight.data = dequantize_nf4(quantize_nf4(module.weight.data), torch.float32)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS).logits
    return result


def run(
    base: TrainingBase, examples: Sequence[TokenizedExample], folder: Path, **changes: Any
) -> tuple[list[StepMetrics], dict[str, torch.Tensor]]:
    trainer = LoRATrainer(base, settings(**changes))
    steps: list[StepMetrics] = []
    trainer.train(examples, [], steps.append)
    trainer.save(folder)
    trainer.close()
    return steps, load_file(folder / "adapter_model.safetensors")


def test_the_base_is_the_servers(base: TrainingBase, base_folder: Path, engine_config: EngineConfig) -> None:
    assert base.spec == load_model(engine_config).spec
    assert isinstance(base.model.model.layers[1].mlp.down_proj, NF4Linear)
    assert torch.equal(logits(base.model), logits(reference(base_folder)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_base(tmp_path: Path, tied: bool) -> None:
    folder = make_base_folder(tmp_path, tied=tied)
    base = load_training_base(EngineConfig(base=str(folder), device="cpu", quantization="none"))
    assert torch.equal(logits(base.model), logits(reference(folder, quantized=False)))


def test_the_loss_falls_and_peft_loads_the_result_with_equal_logits(
    base: TrainingBase, base_folder: Path, examples: Sequence[TokenizedExample], tmp_path: Path
) -> None:
    trainer = LoRATrainer(base, settings(n_epochs=8))
    steps: list[StepMetrics] = []
    result = trainer.train(examples, examples[:6], steps.append)
    trainer.save(tmp_path)
    trained = logits(base.model)
    trainer.close()

    assert [s.step for s in steps] == list(range(1, 25))
    assert steps[-1].train_loss < 0.5 * steps[0].train_loss
    assert steps[-1].train_mean_token_accuracy > steps[0].train_mean_token_accuracy
    assert result.trained_tokens == 8 * sum(map(len, examples))
    validated = [s for s in steps if s.valid_loss is not None]
    assert [s.step for s in validated] == list(range(3, 25, 3))
    assert validated[-1].valid_loss < validated[0].valid_loss

    loaded = PeftModel.from_pretrained(reference(base_folder), tmp_path)
    torch.testing.assert_close(logits(loaded), trained, rtol=0, atol=1e-5)
    stated = json.loads((tmp_path / "patchbay.json").read_text())
    assert stated == {"base_fingerprint": base.spec.fingerprint}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name
    assert str(base_folder.parent) not in json.dumps(config)


def test_closing_leaves_the_base_as_it_was(
    base: TrainingBase, examples: Sequence[TokenizedExample], tmp_path: Path
) -> None:
    before = logits(base.model)
    run(base, examples, tmp_path, n_epochs=1)
    assert torch.equal(logits(base.model), before)
    assert not any("lora" in name for name, _ in base.model.named_modules())


def test_the_seed_decides_everything(base: TrainingBase, examples: Sequence[TokenizedExample], tmp_path: Path) -> None:
    torch.manual_seed(99)
    _, first = run(base, examples, tmp_path / "a", n_epochs=1)
    torch.manual_seed(1)
    _, again = run(base, examples, tmp_path / "b", n_epochs=1)
    _, other = run(base, examples, tmp_path / "c", n_epochs=1, seed=8)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_splitting_a_batch_changes_nothing_but_rounding(
    base: TrainingBase,
    examples: Sequence[TokenizedExample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, _ = run(base, examples, tmp_path / "a", n_epochs=2)
    num_batches = 0

    def split(rows: Sequence[TokenizedExample]) -> Iterator[Any]:
        nonlocal num_batches
        for batch in micro_batches(rows, max_tokens=64):
            num_batches += 1
            yield batch

    monkeypatch.setattr(lora_trainer, "micro_batches", split)
    parts, _ = run(base, examples, tmp_path / "b", n_epochs=2)
    assert num_batches > 2 * len(whole)
    assert [s.train_loss for s in parts] == pytest.approx([s.train_loss for s in whole], rel=1e-3)


def test_a_loss_that_is_no_number_ends_the_run(
    base: TrainingBase, examples: Sequence[TokenizedExample], tmp_path: Path
) -> None:
    before = logits(base.model)
    trainer = LoRATrainer(base, settings(learning_rate=float("inf")))
    with pytest.raises(TrainingDiverged, match="no longer finite"):
        trainer.train(examples, [], lambda step: None)
    trainer.close()
    assert torch.equal(logits(base.model), before)


def test_auto_becomes_values_that_suit_the_set_and_the_base() -> None:
    resolve = functools.partial(resolve_settings, Hyperparameters(), PeftOptions(), hidden_size=4096, seed=0)
    assert [resolve(num_examples=n).n_epochs for n in (10, 320, 1000, 10_000, 30_000)] == [10, 8, 3, 2, 1]
    assert [resolve(num_examples=n).batch_size for n in (10, 64, 1000)] == [1, 8, 16]
    assert resolve(num_examples=100).learning_rate == pytest.approx(2.87e-4, rel=1e-2)
    asked = Hyperparameters(n_epochs=2, batch_size=5, learning_rate_multiplier=2)
    chosen = resolve_settings(asked, PeftOptions(r=8), num_examples=100, hidden_size=4096, seed=0)
    assert (chosen.n_epochs, chosen.batch_size, chosen.alpha) == (2, 5, 16)
    assert chosen.learning_rate == pytest.approx(5.74e-4, rel=1e-2)


@pytest.mark.parametrize(
    ("scheduler", "middle", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1, 1)]
)
def test_the_rate_warms_up_and_decays(scheduler: Any, middle: float, end: float) -> None:
    chosen = settings(lr_scheduler=scheduler, learning_rate=1.0)
    rates = [chosen.learning_rate_at(step, 100) for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[52] == pytest.approx(middle, abs=0.02)
    assert rates[99] == pytest.approx(end, abs=0.02)
