"""A peft folder sent as its files: what is accepted, and that each bad input is refused by name, leaving nothing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import AdapterInvalid, StoreUnavailable, UploadTooLarge
from adapters_store.sandbox import SandboxLimits
from adapters_store.upload import Staging, UploadLimits, clean_staging

from .conftest import FINGERPRINT, edit_config, fill_disk, save_adapter, stage, stage_folder

WEIGHTS = "adapter_model.safetensors"
Q0_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q0_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def refused(staging: Staging, folder: Path, base: BaseSpec, **options: Any) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as caught:
        stage(staging, folder, base, **options)
    return caught.value


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


def test_a_peft_folder_is_accepted(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    manifest = stage(staging, adapter, base).manifest
    assert manifest.rank == 4
    assert manifest.target_modules == ("q_proj", "v_proj")
    assert manifest.base_fingerprint == FINGERPRINT
    assert manifest.num_parameters == 2 * (4 * 32 + 32 * 4 + 4 * 32 + 16 * 4)
    assert {delta.scale for delta in manifest.deltas} == {2.0}


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pt", "state.pkl", "model.PTH", "x.npz"])
def test_pickle_files_are_refused_with_advice(staging: Staging, name: str) -> None:
    with pytest.raises(AdapterInvalid, match="safe_serialization=True") as caught:
        staging.add_file(name, [b"\x80\x04"])
    assert caught.value.file == name


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_under_the_safetensors_name_is_refused(
    staging: Staging, adapter: Path, base: BaseSpec, protocol: int
) -> None:
    (adapter / WEIGHTS).write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
    error = refused(staging, adapter, base)
    assert error.file == WEIGHTS
    assert "safe_serialization=True" in error.reason


def test_a_torch_zip_under_the_safetensors_name_is_refused(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    torch.save({"a": torch.zeros(1)}, adapter / WEIGHTS)
    assert "safe_serialization=True" in refused(staging, adapter, base).reason


def test_a_stated_fingerprint_of_another_base_is_refused(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    assert refused(staging, adapter, base, base_fingerprint="0" * 64).field == "base_fingerprint"


def test_patchbay_json_of_another_base_is_refused(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    (adapter / "patchbay.json").write_text(json.dumps({"base_fingerprint": "0" * 64}))
    error = refused(staging, adapter, base)
    assert (error.file, error.field) == ("patchbay.json", "base_fingerprint")


def test_weights_metadata_of_another_base_is_refused(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file(tensors, adapter / WEIGHTS, metadata={"patchbay.base_fingerprint": "0" * 64})
    error = refused(staging, adapter, base)
    assert (error.file, error.field) == (WEIGHTS, "base_fingerprint")


def test_the_served_base_may_be_stated_everywhere(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    (adapter / "patchbay.json").write_text(json.dumps({"base_fingerprint": FINGERPRINT}))
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS, metadata={"patchbay.base_fingerprint": FINGERPRINT})
    assert stage(staging, adapter, base, base_fingerprint=FINGERPRINT).manifest.base_fingerprint == FINGERPRINT


def test_a_wrong_shape_is_refused_by_tensor(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    edit_weights(adapter, **{Q0_A: torch.zeros(4, 31)})
    error = refused(staging, adapter, base)
    assert (error.file, error.field) == (WEIGHTS, Q0_A)
    assert "[4, 31]" in error.reason
    assert "[4, 32]" in error.reason


def test_a_rank_unlike_the_config_is_refused(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    edit_config(adapter, r=8)
    assert refused(staging, adapter, base).file == WEIGHTS


def test_more_layers_than_the_base_has_are_refused(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    extra = Q0_A.replace("layers.0", "layers.2")
    edit_weights(adapter, **{extra: torch.zeros(4, 32)})
    assert refused(staging, adapter, base).field == extra


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "norm", "self_attn", "q_pro", "../q_proj"])
def test_unknown_target_modules_are_refused_by_name(
    staging: Staging, adapter: Path, base: BaseSpec, module: str
) -> None:
    edit_config(adapter, target_modules=["q_proj", "v_proj", module])
    error = refused(staging, adapter, base)
    assert error.field == "target_modules"
    assert repr(module) in error.reason


def test_a_missing_tensor_is_refused_by_name(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    edit_weights(adapter, **{Q0_B: None})
    error = refused(staging, adapter, base)
    assert error.field == Q0_B
    assert "missing" in error.reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embeddings"),
        ("base_model.model.lm_head.base_layer.weight", "copies of base weights"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.layer.tensor.factors.0", "LoRETTA"),
        ("something_else", "not a tensor"),
    ],
)
def test_extra_tensors_are_refused_by_name(
    staging: Staging, adapter: Path, base: BaseSpec, name: str, reason: str
) -> None:
    edit_weights(adapter, **{name: torch.zeros(32)})
    error = refused(staging, adapter, base)
    assert error.field == name
    assert reason in error.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_by_tensor(
    staging: Staging, adapter: Path, base: BaseSpec, dtype: torch.dtype, value: float
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(adapter / WEIGHTS).items()}
    tensors[Q0_B][31, 3] = value
    save_file(tensors, adapter / WEIGHTS)
    error = refused(staging, adapter, base)
    assert (error.file, error.field) == (WEIGHTS, Q0_B)
    assert "NaN" in error.reason


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 4e4), (torch.bfloat16, 1.7e38), (torch.float32, 1.7e38)])
def test_values_that_overflow_once_scaled_are_refused(
    staging: Staging, adapter: Path, base: BaseSpec, dtype: torch.dtype, value: float
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(adapter / WEIGHTS).items()}
    tensors[Q0_B][0, 0] = value
    save_file(tensors, adapter / WEIGHTS)
    error = refused(staging, adapter, base)
    assert error.field == Q0_B
    assert "overflows" in error.reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_by_tensor(
    staging: Staging, adapter: Path, base: BaseSpec, dtype: torch.dtype
) -> None:
    edit_weights(adapter, **{Q0_A: torch.zeros(4, 32).to(dtype)})
    error = refused(staging, adapter, base)
    assert error.field == Q0_A
    assert "dtype" in error.reason


def test_a_rank_above_the_limit_is_refused(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    error = refused(staging, adapter, base, max_rank=3)
    assert error.field == "r"
    assert "limit of 3" in error.reason


def test_a_rank_pattern_above_the_limit_is_refused(staging: Staging, tmp_path: Path, base: BaseSpec) -> None:
    folder = save_adapter(tmp_path / "ranks", rank_pattern={"v_proj": 12})
    assert refused(staging, folder, base, max_rank=8).field == "rank_pattern"


@pytest.mark.parametrize(
    "name", ["/etc/adapter_config.json", "../adapter_config.json", "a/../../adapter_config.json",
             "a\\adapter_config.json", "C:/adapter_config.json", "adapter_config.json\0.txt",
             "a/b/adapter_config.json", "", "."]
)  # fmt: skip
def test_unsafe_paths_are_refused(staging: Staging, name: str) -> None:
    with pytest.raises(AdapterInvalid):
        staging.add_file(name, [b"{}"])


def test_a_name_that_is_no_part_of_an_adapter_is_refused(staging: Staging) -> None:
    with pytest.raises(AdapterInvalid, match="not part of an adapter") as caught:
        staging.add_file("run.sh", [b""])
    assert caught.value.file == "run.sh"


def test_harmless_files_are_dropped(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    staging.add_file("training_args.bin", [b"\x80\x04anything"])
    staging.add_file("tokenizer.json", [b"{}"])
    staged = stage(staging, adapter, base)
    assert {path.name for path in staged.path.parent.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "canonical.safetensors",
    }


def test_an_upload_has_a_limit_of_its_files_those_that_are_dropped_too(staging: Staging) -> None:
    for number in range(64):
        staging.add_file(f"._{number}", [])
    with pytest.raises(AdapterInvalid, match="more than 64 files") as caught:
        staging.begin_file("adapter_config.json")
    assert caught.value.file == "adapter_config.json"


def test_the_same_file_twice_is_refused(staging: Staging) -> None:
    staging.add_file("adapter_config.json", [b"{}"])
    with pytest.raises(AdapterInvalid, match="twice"):
        staging.add_file("adapter_config.json", [b"{}"])


def test_files_of_two_folders_are_refused(staging: Staging) -> None:
    staging.add_file("a/adapter_config.json", [b"{}"])
    with pytest.raises(AdapterInvalid, match="more than one folder"):
        staging.add_file("b/adapter_model.safetensors", [b"{}"])


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_a_missing_file_is_named(staging: Staging, adapter: Path, base: BaseSpec, name: str) -> None:
    (adapter / name).unlink()
    assert refused(staging, adapter, base).file == name


def test_an_upload_over_its_limit_stops_at_the_limit(tmp_path: Path) -> None:
    taken = 0

    def chunks() -> Any:
        nonlocal taken
        while True:
            taken += 1000
            yield bytes(1000)

    with Staging(tmp_path, UploadLimits(max_upload_bytes=10_000)) as staging, pytest.raises(UploadTooLarge):
        staging.add_file(WEIGHTS, chunks())
    assert taken == 11_000
    assert list(tmp_path.iterdir()) == []


def test_a_config_over_its_own_limit_is_refused(staging: Staging) -> None:
    with pytest.raises(UploadTooLarge, match=r"adapter_config\.json"):
        staging.add_file("adapter_config.json", [bytes(2 << 20)])


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_weights_are_refused(staging: Staging, adapter: Path, base: BaseSpec, keep: int) -> None:
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[:keep])
    error = refused(staging, adapter, base)
    assert error.file == WEIGHTS
    assert "truncated" in error.reason


def test_a_truncated_config_is_refused(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    path = adapter / "adapter_config.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert refused(staging, adapter, base).file == "adapter_config.json"


def test_a_catastrophic_regular_expression_runs_out_of_its_time_only(
    tmp_path: Path, adapter: Path, base: BaseSpec
) -> None:
    edit_config(adapter, target_modules="(([a-z_.0-9])+)+!")
    limits = UploadLimits(sandbox=SandboxLimits(cpu_seconds=2, wall_seconds=20))
    with Staging(tmp_path / "s", limits) as staging:
        assert "more time or memory" in refused(staging, adapter, base).reason


def test_equal_adapters_have_equal_digests_however_they_were_written(
    tmp_path: Path, adapter: Path, base: BaseSpec
) -> None:
    with Staging(tmp_path / "s") as staging:
        first = stage(staging, adapter, base).manifest
    tensors = load_file(adapter / WEIGHTS)
    save_file(tensors, adapter / WEIGHTS, metadata={"note": "another writer"})
    edit_config(adapter, lora_dropout=0.3, base_model_name_or_path="elsewhere")
    with Staging(tmp_path / "s") as staging:
        second = stage(staging, adapter, base).manifest
    edit_config(adapter, lora_alpha=9)
    with Staging(tmp_path / "s") as staging:
        third = stage(staging, adapter, base).manifest
    assert first.digest == second.digest
    assert third.digest != first.digest


def test_leaving_the_staging_removes_everything(tmp_path: Path, adapter: Path) -> None:
    def fail() -> None:
        with Staging(tmp_path / "s") as staging:
            stage_folder(staging, adapter)
            staging.begin_file("patchbay.json").write(b"{")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list((tmp_path / "s").iterdir()) == []


@pytest.mark.parametrize("num_bytes", [100, 100_000])  # the disk is written when the file ends, or before
def test_a_full_disk_is_no_fault_of_the_upload_which_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    with Staging(tmp_path) as staging:
        staging.expect_validation()
        process = staging._validator
        assert process is not None
        fill_disk(monkeypatch)
        with pytest.raises(StoreUnavailable, match="No space is left"):
            staging.add_file(WEIGHTS, [bytes(num_bytes)])
    assert list(tmp_path.iterdir()) == []
    assert process._process.returncode is not None


def test_leaving_an_upload_whose_last_bytes_do_not_fit_the_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Staging(tmp_path) as staging:
        fill_disk(monkeypatch)
        staging.begin_file(WEIGHTS).write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_start_up_removes_what_a_dead_process_left_and_nothing_else(tmp_path: Path, adapter: Path) -> None:
    dead = tmp_path / "0123456789abcdef"
    dead.mkdir()
    (dead / "adapter_config.json").write_text("{}")
    dead.with_suffix(".lock").touch()
    with Staging(tmp_path) as staging:
        stage_folder(staging, adapter)
        assert clean_staging(tmp_path) == 1
        assert not dead.exists()
        assert (staging._path / WEIGHTS).exists()


def test_rank_two_to_the_31_is_refused(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    edit_config(adapter, r=2**31)
    assert refused(staging, adapter, base).field == "r"


def test_mixed_dtypes_are_stored_aligned(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    tensors = load_file(adapter / WEIGHTS)
    mixed = {name: tensor.bfloat16() if "lora_A" in name else tensor for name, tensor in tensors.items()}
    save_file(mixed, adapter / WEIGHTS)
    stored = load_file(stage(staging, adapter, base).path)
    assert stored.keys() == mixed.keys()
    assert all(torch.equal(stored[name], mixed[name]) for name in mixed)
    assert np.all([tensor.data_ptr() % tensor.element_size() == 0 for tensor in stored.values()])


def test_what_is_to_validate_an_upload_begins_before_it_has_come(tmp_path: Path, adapter: Path, base: BaseSpec) -> None:
    with Staging(tmp_path / "s") as staging:
        staging.expect_validation()
        process = staging._validator
        assert process is not None
        assert stage(staging, adapter, base).manifest.rank > 0
        assert process._process.returncode == 0
        assert staging._validator is None


def test_few_processes_wait_for_uploads_and_none_outlasts_its_own(tmp_path: Path) -> None:
    stagings = [Staging(tmp_path / "s") for _ in range(3)]
    for staging in stagings:
        staging.expect_validation()
    first, second, third = (staging._validator for staging in stagings)
    assert third is None
    assert first is not None
    assert second is not None
    stagings[0].close()
    assert first._process.returncode is not None
    stagings[2].expect_validation()
    assert stagings[2]._validator is not None
    for staging in stagings[1:]:
        staging.close()
    assert second._process.returncode is not None
