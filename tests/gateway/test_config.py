"""What of a configuration is taken, and what is said of the rest."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.config import EngineConfig, GatewayConfig, LimitsConfig, from_dict
from gateway.errors import ConfigInvalid

SECTIONS = [field.default_factory for field in fields(GatewayConfig)]


def read(folder: Path, text: str) -> GatewayConfig:
    file = folder / "patchbay.yaml"
    file.write_text(text)
    return GatewayConfig.from_file(file)


def test_what_a_file_does_not_name_is_the_default(tmp_path: Path) -> None:
    assert read(tmp_path, "") == GatewayConfig()
    config = read(tmp_path, "server: {replica_num_cpus: 2}\nstore: {import_roots: [/a, s3://b]}\n")
    assert config == GatewayConfig(
        server=replace(GatewayConfig().server, replica_num_cpus=2.0),
        store=replace(GatewayConfig().store, import_roots=("/a", "s3://b")),
    )


def test_tenants_are_named_by_text_whatever_yaml_takes_it_for(tmp_path: Path) -> None:
    weights = read(tmp_path, "limits: {tenant_weights: {acme: 2, 7: 0.5}}").limits.tenant_weights
    assert weights == {"acme": 2.0, "7": 0.5}
    with pytest.raises(ConfigInvalid, match=r"not datetime\.date; quote it"):
        read(tmp_path, "limits: {tenant_weights: {2026-01-01: 2}}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "engine: {tensor_parallel_size: 0}",
            "engine.tensor_parallel_size: input should be greater than or equal to 1",
        ),
        ("engine: {tenant_adapter_share: 0}", "engine.tenant_adapter_share: input should be greater than 0, not 0"),
        ("engine: {tenant_adapter_share: -1}", "engine.tenant_adapter_share: input should be greater than 0, not -1"),
        ("server: {htp_port: 9000}", "unknown key server.htp_port; known keys: default_tenant,"),
        ("store: {data_dir: 2026-13-45}", "cannot read the configuration"),
        ("engine: {max_num_seqs: 0}", "engine.max_num_seqs: input should be greater than 0, not 0"),
        (
            "engine: {tensor_parallel_size: 1000000}",
            "engine.tensor_parallel_size: input should be less than or equal to",
        ),
        ("engine: {max_model_len: true}", "engine.max_model_len: input should be a valid integer, not True"),
        (f"engine: {{kv_cache_tokens: 1{'0' * 400}}}", "engine.kv_cache_tokens: input should be less than"),
        (
            "engine: {num_adapter_slots: -1}",
            "engine.num_adapter_slots: input should be greater than or equal to 0, not -1",
        ),
        ("engine: {tenant_adapter_share: 1.5}", "engine.tenant_adapter_share: input should be less than or equal to 1"),
        ("engine: {gpu_memory_utilization: .nan}", "engine.gpu_memory_utilization: input should be a finite number"),
        ("engine: {quantization: int3}", "engine.quantization: input should be 'nf4' or 'none', not 'int3'"),
        ("engine: {speed: 3}", "unknown key engine.speed; known keys: adapter_dtype, base,"),
        ("engine: 3", "engine: input should be an object, not 3"),
        ("store: {self_test_timeout_s: .inf}", "store.self_test_timeout_s: input should be a finite number"),
        ("store: {import_roots: [1]}", "store.import_roots.0: input should be a valid string, not 1"),
        ("limits: {max_uploads: 0}", "limits.max_uploads: input should be greater than 0"),
        ("limits: {max_import_error: 1}", "limits.max_import_error: input should be less than 1"),
        ("limits: {tenant_weights: {acme: 0}}", "limits.tenant_weights.acme: input should be greater than 0, not 0"),
        ("server: {http_port: 70000}", "server.http_port: input should be less than 65536"),
        ("server: {host: ''}", "server.host: string should have at least 1 character, not ''"),
        ("sever: {}", "unknown key sever; known keys: engine, limits, server, store, trainer"),
        ("[engine]", "the configuration: input should be an object"),
        ("engine: [", "cannot read the configuration"),
    ],
)
def test_a_bad_value_is_refused_by_its_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigInvalid, match=f"^{re.escape(message)}"):
        read(tmp_path, text)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "patchbay.yaml"
    file.write_bytes(b"engine: {base: \xff}")
    with pytest.raises(ConfigInvalid, match=r"cannot read the configuration .*utf-8"):
        GatewayConfig.from_file(file)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigInvalid, match=r"limits\.max_n: .*; limits\.max_stop: ") as caught:
        from_dict(LimitsConfig, {"max_n": 0, "max_stop": "x"}, "limits")
    assert caught.value.param == "limits.max_n"


def test_no_section_holds_a_bad_value() -> None:
    with pytest.raises(ValidationError, match="max_num_seqs"):
        replace(EngineConfig(), max_num_seqs=0)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_explained(section: Any) -> None:
    explained = set(re.findall(r"\w+", section.__doc__))
    obvious = {"host", "http_port", "grpc_port", "device"}
    assert {field.name for field in fields(section)} - explained <= obvious
