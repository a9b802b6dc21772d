"""Uploads of trained tokens and whole embeddings, on a base whose embeddings are tied and on one whose are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, TrainableTokensConfig
from safetensors.torch import load_file, save_file

from adapters_store.base_spec import BaseSpec
from adapters_store.manifest import TokenRows
from adapters_store.weights import load_weights

from .conftest import edit_config, refused_here, save_kind, stage_here
from .test_export import export, logits

PREFIX = "base_model.model."
EMBED, HEAD = f"{PREFIX}model.embed_tokens.", f"{PREFIX}lm_head."
DELTA = "token_adapter.trainable_tokens_delta"
LISTED = "trainable_token_indices"


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)


def rows(*modules: Any, tensor: str, ids: tuple[int, ...] | None = None) -> TokenRows:
    return TokenRows(modules=modules, tensor=tensor, num_tokens=64 if ids is None else len(ids), ids=ids)


WHOLE = rows("embed_tokens", tensor=f"{EMBED}weight"), rows("lm_head", tensor=f"{HEAD}weight")
E1 = rows("embed_tokens", tensor=EMBED + DELTA, ids=(9, 3))
CASES: dict[str, tuple[PeftConfig, bool, tuple[TokenRows, ...]]] = {
    "a list": (lora(trainable_token_indices=[9, 3]), False, (E1,)),
    "both": (
        lora(trainable_token_indices={"lm_head": [4], "embed_tokens": [9, 3]}),
        False,
        (E1, rows("lm_head", tensor=HEAD + DELTA, ids=(4,))),
    ),
    "whole": (lora(modules_to_save=["lm_head", "embed_tokens"]), False, WHOLE),
    "whole and a list": (lora(modules_to_save=["lm_head"], trainable_token_indices=[9, 3]), False, (WHOLE[1], E1)),
    "of an AdaLoRA": (
        AdaLoraConfig(
            init_r=3, total_step=10, target_modules=["q_proj"], trainable_token_indices=[9, 3], task_type="CAUSAL_LM"
        ),
        False,
        (E1,),
    ),
    "alone": (
        TrainableTokensConfig(token_indices=[9, 3], task_type="CAUSAL_LM"),
        False,
        (rows("embed_tokens", tensor=f"{EMBED}trainable_tokens_delta", ids=(9, 3)),),
    ),
    "tied, a list": (
        lora(trainable_token_indices=[9, 3]),
        True,
        (rows("embed_tokens", "lm_head", tensor=EMBED + DELTA, ids=(9, 3)),),
    ),
    "tied, both alike": (
        lora(trainable_token_indices={"lm_head": [9, 3], "embed_tokens": [9, 3]}),
        True,
        (rows("embed_tokens", "lm_head", tensor=EMBED + DELTA, ids=(9, 3)),),
    ),
    "tied, unlike": (
        lora(trainable_token_indices={"lm_head": [3, 9], "embed_tokens": [9, 3]}),
        True,
        (E1, rows("lm_head", tensor=HEAD + DELTA, ids=(3, 9))),
    ),
    "tied, the head": (
        lora(trainable_token_indices={"lm_head": [9, 3]}),
        True,
        (rows("lm_head", tensor=HEAD + DELTA, ids=(9, 3)),),
    ),
    "tied, one whole": (lora(modules_to_save=["embed_tokens"]), True, WHOLE[:1]),
    "tied, one whole and the other with it": (
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        True,
        WHOLE,
    ),
    "tied, alone": (
        TrainableTokensConfig(token_indices=[9, 3], task_type="CAUSAL_LM"),
        True,
        (
            rows("embed_tokens", tensor=f"{EMBED}trainable_tokens_delta", ids=(9, 3)),
            rows("lm_head", tensor=f"{HEAD}trainable_tokens_delta", ids=(9, 3)),
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_is_kept_exported_and_uploaded_again(tmp_path: Path, base: BaseSpec, case: str) -> None:
    config, tied, wanted = CASES[case]
    base = replace(base, tied=tied)
    uploaded = save_kind(tmp_path / "adapter", config, tied=tied)
    staged = stage_here(uploaded, base, max_token_rows=128)
    assert staged.manifest.token_rows == wanted
    assert load_file(staged.path).keys() == load_file(uploaded / "adapter_model.safetensors").keys()
    exported = export(staged, base, tmp_path / "export")
    torch.testing.assert_close(logits(exported, tied=tied), logits(uploaded, tied=tied), rtol=1e-6, atol=1e-6)
    assert stage_here(exported, base, max_token_rows=128).manifest.digest == staged.manifest.digest


def test_rows_are_read_in_the_order_of_their_tokens(tmp_path: Path, base: BaseSpec) -> None:
    folder = save_kind(tmp_path / "adapter", lora(trainable_token_indices=[9, 3, 40]))
    (table,) = load_weights(stage_here(folder, base, max_token_rows=3).path).token_tables
    saved = load_file(folder / "adapter_model.safetensors")[EMBED + DELTA]
    assert table.ids.tolist() == [3, 9, 40]
    assert torch.equal(table.rows, saved[[1, 0, 2]])


@pytest.mark.parametrize(
    ("tied", "changes", "field", "reason"),
    [
        (False, {LISTED: [9, 64]}, LISTED, "no token 64"),
        (False, {LISTED: [9, -1]}, LISTED, "no token -1"),
        (False, {LISTED: [9, 9]}, LISTED, "twice"),
        (False, {LISTED: []}, LISTED, "at least 1"),
        (False, {LISTED: [1.5]}, LISTED, "integer"),
        (False, {LISTED: {"o_proj": [9]}}, LISTED, "neither embed_tokens nor lm_head"),
        (False, {LISTED: {"embed_tokens": [9], "model.embed_tokens": [3]}}, LISTED, "second time"),
        (False, {"modules_to_save": ["embed_tokens"]}, LISTED, "modules_to_save"),
        (True, {"modules_to_save": ["lm_head"]}, LISTED, "modules_to_save"),
        (True, {LISTED: {"embed_tokens": [9, 3], "lm_head": [9]}, "ensure_weight_tying": True}, LISTED, "differ"),
        (False, {"modules_to_save": ["mlp"]}, "modules_to_save", "norms and embeddings"),
        (False, {LISTED: list(range(5))}, None, "5 rows of embed_tokens and lm_head are above the limit of 4"),
    ],
)
def test_a_field_at_fault_is_refused_by_name(
    tmp_path: Path, base: BaseSpec, tied: bool, changes: Any, field: str | None, reason: str
) -> None:
    folder = save_kind(tmp_path / "adapter", lora(trainable_token_indices=[9, 3]))
    edit_config(folder, **changes)
    error = refused_here(folder, replace(base, tied=tied), max_token_rows=4)
    assert (error.file, error.field) == ("adapter_config.json", field)
    assert reason in error.reason


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path, base: BaseSpec) -> None:
    folder = save_kind(tmp_path / "adapter", lora(modules_to_save=["lm_head"]))
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {f"{HEAD}weight": torch.zeros(66, 32)}, path)
    error = refused_here(folder, base, max_token_rows=64)
    assert error.field == f"{HEAD}weight"
    assert "[66, 32]" in error.reason


def test_tokens_that_the_config_does_not_name_are_refused(tmp_path: Path, base: BaseSpec) -> None:
    folder = save_kind(tmp_path / "adapter", lora(trainable_token_indices=[9, 3]))
    edit_config(folder, trainable_token_indices=None)
    error = refused_here(folder, base, max_token_rows=64)
    assert (error.field, "trained tokens" in error.reason) == (EMBED + DELTA, True)


def test_two_targets_that_the_base_ties_are_refused(tmp_path: Path, base: BaseSpec) -> None:
    """peft saves such a folder with a third tensor."""
    folder = save_kind(tmp_path / "adapter", TrainableTokensConfig(token_indices=[9], task_type="CAUSAL_LM"))
    edit_config(folder, target_modules=["embed_tokens", "lm_head"])
    error = refused_here(folder, replace(base, tied=True), max_token_rows=64)
    assert error.field == "target_modules"
