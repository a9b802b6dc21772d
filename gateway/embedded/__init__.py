"""The embedded base model, its ready adapters and the demo's data, as folders beside this file."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def embedded_path() -> Path:
    """The base model: a Hugging Face folder (config, tokenizer, chat template, safetensors)."""
    return _HERE / "base"


def adapters_path() -> Path:
    """The ready adapters: one peft folder per tenant that has one."""
    return _HERE / "adapters"


def adapter_path(tenant: str) -> Path:
    """The peft folder of `tenant`'s ready adapter."""
    return adapters_path() / tenant


def demo_path() -> Path:
    """The demo's data: `<tenant>.train.jsonl`, `<tenant>.heldout.jsonl`, `prompts.json`, `recipe.json`."""
    return _HERE / "demo"
