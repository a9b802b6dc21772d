"""vLLM's routes for adapters, and its names of models."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from gateway.config import StoreConfig, from_dict
from gateway.errors import PermissionDenied
from gateway.server.import_folder import ImportFolder
from tests.gateway.server.conftest import TenantClient
from tests.gateway.server.doors import Doors


@pytest.fixture
def folder(doors: Doors, tenant: TenantClient, adapter: Path) -> Path:
    """A peft folder where the operator allows it."""
    return Path(shutil.copytree(adapter, doors.folder / "imports" / tenant.id))


def load(admin: httpx.Client, name: str, path: Path | str, **fields: object) -> httpx.Response:
    return admin.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **fields})


def test_an_adapter_is_loaded_called_reloaded_and_unloaded(
    admin: httpx.Client, tenant: TenantClient, folder: Path
) -> None:
    name = f"{tenant.id}/sql"
    loaded = load(admin, name, folder)
    assert (loaded.status_code, loaded.text) == (200, f"Success: LoRA adapter '{name}' added successfully.")
    body = {"model": "sql", "prompt": "the", "max_tokens": 1}
    assert tenant.http.post("/v1/completions", json=body).json()["model"] == f"{name}:1"
    again = load(admin, name, folder)
    assert again.status_code == 400
    assert "has already been loaded" in again.json()["error"]["message"]
    assert load(admin, name, folder, load_inplace=True).status_code == 200
    assert tenant.http.get("/v1/models/sql").json()["root"] == f"{name}:2"
    unload = {"lora_name": name, "lora_int_id": 1}
    gone = admin.post("/v1/unload_lora_adapter", json=unload)
    assert (gone.status_code, gone.text) == (200, f"Success: LoRA adapter '{name}' removed successfully.")
    assert tenant.http.post("/v1/completions", json=body).status_code == 404
    assert admin.post("/v1/unload_lora_adapter", json=unload).status_code == 404
    assert tenant.http.get("/v1/models/sql:1").status_code == 200, "its versions stay"
    assert load(admin, name, folder).status_code == 200


def test_health_and_version_answer_without_a_key(doors: Doors) -> None:
    healthy = httpx.get(f"{doors.url}/health")
    assert (healthy.status_code, healthy.content) == (200, b"")
    with doors.not_ready("draining"):
        assert httpx.get(f"{doors.url}/health").status_code == 503
    assert httpx.get(f"{doors.url}/version").json() == {"version": version("patchbay")}


def test_only_an_admin_key_may_load_and_unload(tenant: TenantClient, folder: Path) -> None:
    assert load(tenant.http, f"{tenant.id}/sql", folder).status_code == 403
    assert tenant.http.post("/v1/unload_lora_adapter", json={"lora_name": "sql"}).status_code == 403


def test_a_name_without_a_tenant_needs_a_default_one(admin: httpx.Client, folder: Path) -> None:
    refused = load(admin, "sql", folder)
    assert refused.status_code == 400
    assert "tenant/name" in refused.json()["error"]["message"]


def test_folders_outside_of_the_roots_are_not_read(
    admin: httpx.Client, tenant: TenantClient, doors: Doors, folder: Path, adapter: Path
) -> None:
    (doors.folder / "imports" / "link").symlink_to(adapter)
    inside = Path(shutil.copytree(folder, folder.with_name(f"{folder.name}-file")))
    (inside / "adapter_model.safetensors").unlink()
    (inside / "adapter_model.safetensors").symlink_to(adapter / "adapter_model.safetensors")
    places = (adapter, f"{folder}/../../../{adapter.name}", doors.folder / "imports" / "link", inside, "memory://x")
    for place in places:
        refused = load(admin, f"{tenant.id}/sql", place)
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "lora_path"), place
    for place in (folder / "nothing", f"simplecache::file://{folder}", "nosuch://x"):
        assert load(admin, f"{tenant.id}/sql", place).status_code == 400, place
    (doors.folder / "imports" / "link").unlink()


def test_without_roots_nothing_is_read_and_the_error_names_the_setting(folder: Path) -> None:
    with pytest.raises(PermissionDenied, match=r"store\.import_roots"):
        ImportFolder(str(folder), ())
    assert from_dict(StoreConfig, {"import_roots": ["/a", "s3://b/c"]}).import_roots == ("/a", "s3://b/c")


def test_a_model_is_named_as_in_vllm_and_sglang(doors: Doors, tenant: TenantClient, adapter: Path, helper: str) -> None:
    tenant.upload("sql", adapter)
    ref = f"{tenant.id}/sql:1"
    for own in ("sql", "sql:1", "sql@default", f"{tenant.id}/sql"):
        for name in (own, f"{doors.model}:{own}"):
            model = tenant.http.get(f"/v1/models/{name}").json()
            assert (model["id"], model["parent"], model["root"]) == (name, doors.model, ref)
            body = {"model": name, "prompt": "the", "max_tokens": 1}
            assert tenant.http.post("/v1/completions", json=body).json()["model"] == ref
    for name in ("own", f"{doors.model}:own", f"{doors.model}:{helper}"):
        refused = tenant.http.get(f"/v1/models/{name}")
        assert (refused.status_code, name in refused.json()["error"]["message"]) == (404, True)
