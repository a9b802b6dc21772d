"""Errors, health, adapters, administration, files and jobs over HTTP."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapters_store.errors import StoreUnavailable
from gateway.client import ApiError, GatewayClient, InvalidInput
from gateway.errors import Overloaded
from tests.gateway.server.conftest import TenantClient
from tests.gateway.server.doors import Doors

EXAMPLE = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]})
TRAINING = (EXAMPLE + "\n").encode() * 12


def test_health_ready_metrics_and_description_need_no_key(doors: Doors) -> None:
    assert httpx.get(f"{doors.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{doors.url}/readyz").json() == {"status": "ready"}
    metrics = httpx.get(f"{doors.url}/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'handler="/healthz",method="GET",status="200"' in metrics.text
    assert "/v1/chat/completions" in httpx.get(f"{doors.url}/openapi.json").json()["paths"]


def test_routes_are_counted_by_their_template(doors: Doors, tenant: TenantClient) -> None:
    tenant.http.get("/v1/adapters/some-tenant/some-name")
    text = httpx.get(f"{doors.url}/metrics").text
    assert 'handler="/v1/adapters/{tenant}/{name}"' in text
    assert "some-name" not in text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/", 404), ("PUT", "/v1/models", 405), ("GET", "/v1/models/", 404)],
)
def test_unknown_routes_answer_in_openais_shape(tenant: TenantClient, method: str, path: str, status: int) -> None:
    response = tenant.http.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"].startswith("req_")


def test_every_answer_has_its_own_request_id(tenant: TenantClient) -> None:
    ids = {tenant.http.get("/v1/models", headers={"x-request-id": "mine"}).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert "mine" not in ids


@pytest.mark.parametrize("content", [b"{", b"[1]", b"", b"\xff\xfe", b"[" * 60_000, b'"text"'])
def test_a_body_that_is_no_json_object_is_a_400(tenant: TenantClient, content: bytes) -> None:
    response = tenant.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_a_413(tenant: TenantClient, declared: bool, kind: str) -> None:
    body = b'{"model": "' + b"x" * (1 << 16) + b'"}'
    content: Any = body if declared else iter([body[:100], body[100:]])
    response = tenant.http.post("/v1/completions", content=content, headers={"content-type": kind})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_an_unexpected_error_shows_no_inside_and_is_logged_by_id(
    doors: Doors, tenant: TenantClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("secret inside")

    monkeypatch.setattr(doors.context.registry, "list", broken)
    with caplog.at_level(logging.ERROR):
        response = tenant.http.get("/v1/adapters")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert response.headers["x-request-id"] in caplog.text
    assert "secret inside" in caplog.text


def test_overload_and_outage_have_their_status_and_retry_times(
    doors: Doors, tenant: TenantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(request: Any) -> int:
        raise Overloaded("The queue is full.", retry_after=2.5)

    monkeypatch.setattr(doors.router.engine, "submit", full)
    for stream in (False, True):
        body = {"model": doors.model, "prompt": "the", "stream": stream}
        response = tenant.http.post("/v1/completions", json=body)
        assert response.status_code == 429
        assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("3", "2500")
    with pytest.raises(openai.RateLimitError):
        tenant.openai.completions.create(model=doors.model, prompt="the")

    def down(*args: Any) -> Any:
        raise StoreUnavailable("The database does not answer.")

    monkeypatch.setattr(doors.context.accounts, "authenticate", down)
    assert tenant.http.get("/v1/models").status_code == 503


def test_upload_list_alias_rollback_delete(tenant: TenantClient, adapter: Path, other_adapter: Path) -> None:
    first = tenant.upload("helper", adapter).json()
    assert (first["ref"], first["rank"], first["version"]) == (f"{tenant.id}/helper:1", 4, 1)
    assert first["target_modules"][0] == "q_proj"
    second = tenant.upload(f"{tenant.id}/helper", other_adapter).json()
    assert (second["version"], second["rank"]) == (2, 8)
    path = f"/v1/adapters/{tenant.id}/helper"
    assert tenant.http.get(path).json()["aliases"] == {"default": 2}
    assert tenant.http.put(f"{path}/aliases/prod", json={"version": 1}).json()["aliases"]["prod"] == 1
    assert tenant.http.post(f"{path}/rollback").json()["aliases"]["default"] == 1
    again = tenant.http.post(f"{path}/rollback", json={"alias": "default"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "no_previous_version")
    refused = tenant.http.delete(f"{path}/versions/1")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "alias_in_use")
    assert tenant.http.delete(f"{path}/versions/2").json()["deleted"] is True
    listed = tenant.http.get("/v1/adapters").json()["data"]
    assert [[v["version"] for v in info["versions"]] for info in listed] == [[1]]


def test_without_its_aliases_the_last_version_can_be_deleted(tenant: TenantClient, adapter: Path) -> None:
    path = f"/v1/adapters/{tenant.id}/helper"
    tenant.upload("helper", adapter)
    assert tenant.http.delete(f"{path}/aliases/default").json()["aliases"] == {}
    again = tenant.http.delete(f"{path}/aliases/default")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "model_not_found")
    assert tenant.http.delete(f"{path}/versions/1").json()["deleted"] is True


def test_half_of_a_surrogate_pair_is_refused_by_its_field(doors: Doors, tenant: TenantClient, adapter: Path) -> None:
    tenant.upload("helper", adapter)
    chat = {"model": doors.model, "messages": [{"role": "user", "content": "cut \ud83d"}]}
    for method, path, body, param in (
        ("POST", "/v1/chat/completions", chat, "messages[0].content"),
        ("PUT", f"/v1/adapters/{tenant.id}/helper/tags/a", {"value": "\ud83d"}, "value"),
    ):
        refused = tenant.http.request(
            method, path, content=json.dumps(body), headers={"content-type": "application/json"}
        )
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        assert "surrogate pair" in refused.json()["error"]["message"]


def test_a_version_is_downloaded_as_a_peft_folder_and_uploads_again(
    doors: Doors, tenant: TenantClient, adapter: Path, tmp_path: Path
) -> None:
    first = tenant.upload("helper", adapter).json()
    with GatewayClient(doors.url, tenant.key) as client:
        client.download_adapter(f"{tenant.id}/helper", 1, tmp_path / "mine")
        with pytest.raises(ApiError, match="does not exist"):
            client.download_adapter(f"{tenant.id}/helper", 2, tmp_path / "other")
        with pytest.raises(InvalidInput, match="exists already"):
            client.download_adapter(f"{tenant.id}/helper", 1, tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    assert tenant.upload("again", tmp_path / "mine").json()["digest"] == first["digest"]


def test_tags_of_an_adapter_and_of_a_version_are_set_shown_and_deleted(tenant: TenantClient, adapter: Path) -> None:
    tenant.upload("helper", adapter)
    path = f"/v1/adapters/{tenant.id}/helper"
    assert tenant.http.put(f"{path}/tags/team", json={"value": "north"}).json()["tags"] == {"team": "north"}
    tagged = tenant.http.put(f"{path}/versions/1/tags/eval/score", json={"value": "0.9"}).json()
    assert tagged["versions"][0]["tags"] == {"eval/score": "0.9"}
    (listed,) = tenant.http.get("/v1/adapters").json()["data"]
    assert listed == tagged
    assert tenant.http.delete(f"{path}/tags/team").json()["tags"] == {}
    assert tenant.http.delete(f"{path}/versions/1/tags/eval/score").json()["versions"][0]["tags"] == {}
    refused = tenant.http.put(f"{path}/tags/{'k' * 300}", json={"value": ""})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_tag")
    assert tenant.http.put(f"{path}/versions/2/tags/a", json={"value": ""}).status_code == 404


def test_an_archive_is_the_same_adapter(tenant: TenantClient, adapter: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(adapter, "adapter")
    response = tenant.http.post(
        "/v1/adapters", data={"name": "packed"}, files={"archive": ("adapter.tar.gz", buffer.getvalue())}
    )
    assert response.status_code == 200, response.text
    assert response.json()["digest"] == tenant.upload("loose", adapter).json()["digest"]


def test_a_forms_content_type_may_be_written_in_any_case(doors: Doors, tenant: TenantClient) -> None:
    lines = TRAINING * 100
    assert len(lines) > doors.context.config.limits.max_request_bytes
    files = {"file": ("train.jsonl", lines)}
    request = tenant.http.build_request("POST", "/v1/files", data={"purpose": "fine-tune"}, files=files)
    content_type = request.headers["content-type"].replace("multipart/form-data", "Multipart/Form-Data")
    request.headers["content-type"] = content_type
    response = tenant.http.send(request)
    assert response.status_code == 200, response.text


def test_a_name_after_the_files_is_as_good(tenant: TenantClient, adapter: Path) -> None:
    files: list[Any] = [("files", (path.name, path.read_bytes())) for path in sorted(adapter.iterdir())]
    response = tenant.http.post("/v1/adapters", files=[*files, ("name", (None, "late"))])
    assert response.json()["ref"] == f"{tenant.id}/late:1"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"name": "Bad Name"}, 400, "name"),
        ({"name": ""}, 400, "name"),
        ({"name": "someone-else/helper"}, 403, "name"),
        ({"alias": "Bad Alias"}, 400, "alias"),
        ({"colour": "red"}, 400, "colour"),
    ],
)
def test_bad_upload_fields_keep_nothing(
    doors: Doors, tenant: TenantClient, adapter: Path, change: dict[str, str], status: int, param: str
) -> None:
    response = tenant.upload(**({"name": "helper", "folder": adapter} | change))  # type: ignore[arg-type]
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param
    assert tenant.http.get("/v1/adapters").json()["data"] == []
    assert list((doors.folder / "staging").iterdir()) == []


def test_bad_adapters_are_refused_by_file_and_field(
    doors: Doors, new_tenant: Callable[..., TenantClient], adapter: Path
) -> None:
    tenant = new_tenant(max_rank=2)
    too_high = tenant.upload("helper", adapter)
    assert too_high.status_code == 400
    assert "rank" in too_high.json()["error"]["message"]
    other_base = new_tenant().upload("helper", adapter, base_fingerprint="0" * 64)
    assert other_base.status_code == 400, other_base.text
    assert other_base.json()["error"]["code"] == "invalid_adapter"
    pickle = tenant.http.post(
        "/v1/adapters", data={"name": "x"}, files=[("files", ("adapter_model.bin", b"\x80\x04."))]
    )
    assert (pickle.status_code, pickle.json()["error"]["code"]) == (400, "invalid_adapter")
    assert list((doors.folder / "staging").iterdir()) == []


def test_an_upload_over_the_limit_is_a_413(doors: Doors, tenant: TenantClient) -> None:
    big = b"\0" * (doors.context.config.limits.max_upload_bytes + 1)
    files = {"files": ("adapter_model.safetensors", big)}
    response = tenant.http.post("/v1/adapters", data={"name": "big"}, files=files)
    assert response.status_code == 413
    assert list((doors.folder / "staging").iterdir()) == []


@pytest.mark.parametrize("cut", [10, 200, -20])
def test_a_form_that_is_cut_off_keeps_nothing(doors: Doors, tenant: TenantClient, adapter: Path, cut: int) -> None:
    files = [("files", (path.name, path.read_bytes())) for path in sorted(adapter.iterdir())]
    request = tenant.http.build_request("POST", "/v1/adapters", data={"name": "cut"}, files=files)
    body = request.read()[:cut]
    response = tenant.http.post("/v1/adapters", content=body, headers={"content-type": request.headers["content-type"]})
    assert response.status_code == 400, response.text
    assert tenant.http.get("/v1/adapters").json()["data"] == []
    assert list((doors.folder / "staging").iterdir()) == []


def test_a_client_that_leaves_an_upload_leaves_nothing(doors: Doors, tenant: TenantClient, adapter: Path) -> None:
    files = [("files", (path.name, path.read_bytes())) for path in sorted(adapter.iterdir())]
    request = tenant.http.build_request("POST", "/v1/adapters", data={"name": "cut"}, files=files)
    body, staging = request.read(), doors.folder / "staging"

    def parts() -> Iterator[bytes]:
        yield body[:-1000]
        _wait(lambda: any(staging.iterdir()))
        raise ConnectionAbortedError

    headers = {"content-type": request.headers["content-type"], "content-length": str(len(body))}
    with pytest.raises(ConnectionAbortedError):
        tenant.http.post("/v1/adapters", content=parts(), headers=headers)
    _wait(lambda: not any(staging.iterdir()))


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_tenants_and_keys(doors: Doors, admin: httpx.Client) -> None:
    made = admin.post("/v1/tenants", json={"id": "acme", "max_rank": 8})
    assert made.json() | {"created_at": 0} == {"object": "tenant", "id": "acme", "max_rank": 8, "created_at": 0}
    twice = admin.post("/v1/tenants", json={"id": "acme"})
    assert (twice.status_code, twice.json()["error"]["code"]) == (409, "tenant_exists")
    assert "acme" in [tenant["id"] for tenant in admin.get("/v1/tenants").json()["data"]]
    key = admin.post("/v1/keys", json={"tenant": "acme"}).json()
    assert httpx.get(f"{doors.url}/v1/models", headers={"authorization": f"Bearer {key['key']}"}).is_success
    listed = {one["id"]: one for one in admin.get("/v1/keys").json()["data"]}
    assert listed[key["id"]]["tenant"] == "acme"
    assert key["key"] not in json.dumps(listed)
    assert not any("hash" in one for one in listed.values())
    assert admin.delete("/v1/keys/00000000").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/tenants", {"id": "UPPER"}, 400, "tenant"),
        ("/v1/tenants", {"id": "ok-id", "max_ranks": 1}, 400, "max_ranks"),
        ("/v1/tenants", {"max_rank": 1}, 400, "id"),
        ("/v1/keys", {"tenant": "never-made"}, 404, "tenant"),
        ("/v1/keys", {"role": "admin", "tenant": "acme"}, 400, "tenant"),
        ("/v1/keys", {"role": "tenant"}, 400, "tenant"),
        ("/v1/keys", {"role": "god"}, 400, "role"),
        ("/v1/keys", {"tenant": "x", "allowed_routes": ["*"]}, 400, "allowed_routes"),
    ],
)
def test_bad_administration_is_refused_by_field(
    admin: httpx.Client, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    response = admin.post(path, json=body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


def test_files_through_the_sdk(tenant: TenantClient, new_tenant: Callable[..., TenantClient]) -> None:
    file = tenant.openai.files.create(file=("train.jsonl", TRAINING), purpose="fine-tune")
    assert (file.bytes, file.filename, file.status) == (len(TRAINING), "train.jsonl", "processed")
    assert tenant.openai.files.retrieve(file.id).id == file.id
    assert [one.id for one in tenant.openai.files.list()] == [file.id]
    assert tenant.openai.files.content(file.id).read() == TRAINING
    stranger = new_tenant()
    with pytest.raises(openai.NotFoundError):
        stranger.openai.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        stranger.openai.files.content(file.id)
    assert list(stranger.openai.files.list()) == []
    assert tenant.openai.files.delete(file.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        tenant.openai.files.retrieve(file.id)


def test_a_file_for_which_the_disk_has_no_room_is_503(tenant: TenantClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: os.fdopen(os.open("/dev/full", os.O_RDWR), "w+b"))
    files, data = {"file": ("train.jsonl", b"x" * 100_000)}, {"purpose": "fine-tune"}
    response = tenant.http.post("/v1/files", data=data, files=files)
    assert response.status_code == 503
    assert "No space is left" in response.json()["error"]["message"]


def test_transfers_under_way_hold_up_no_other_request(
    doors: Doors, tenant: TenantClient, adapter: Path, admin: httpx.Client
) -> None:
    assert tenant.upload("own", adapter).status_code == 200
    may_end, path = threading.Event(), f"/v1/adapters/{tenant.id}/own"
    busy = [doors.context.transfers.submit(may_end.wait, 30) for _ in range(32)]
    with ThreadPoolExecutor(8) as clients:
        downloads = [clients.submit(tenant.http.get, f"{path}/versions/1/download") for _ in range(8)]
        assert tenant.http.get(path).status_code == 200
        assert tenant.openai.models.retrieve(f"{tenant.id}/own").id == f"{tenant.id}/own"
        assert tenant.upload("other", adapter).status_code == 200
        assert admin.get("/v1/keys").status_code == 200
        assert not any(download.done() for download in downloads)
        may_end.set()
        assert {download.result().status_code for download in downloads} == {200}
    assert all(work.result() for work in busy)


def test_bad_files_are_refused(doors: Doors, tenant: TenantClient) -> None:
    big = b"x" * (doors.context.config.limits.max_training_file_bytes + 1)
    for data, files, status, param in (
        ({"purpose": "vision"}, {"file": ("a.jsonl", b"{}")}, 400, "purpose"),
        ({}, {"file": ("a.jsonl", b"{}")}, 400, "purpose"),
        ({"purpose": "fine-tune"}, {"file": ("a.jsonl", b"")}, 400, "file"),
        ({"purpose": "fine-tune"}, {"document": ("a.jsonl", b"{}")}, 400, "document"),
        ({"purpose": "fine-tune", "expires_after": "9"}, {"file": ("a", b"{}")}, 400, "expires_after"),
        ({"purpose": "fine-tune"}, {"file": ("a.jsonl", big)}, 413, None),
    ):
        response = tenant.http.post("/v1/files", data=data, files=files)
        assert response.status_code == status, response.text
        assert response.json()["error"]["param"] == param, response.text
    no_form = tenant.http.post("/v1/files", json={"purpose": "fine-tune"})
    assert no_form.status_code == 400


@pytest.fixture
def training_file(tenant: TenantClient) -> Iterator[str]:
    return tenant.openai.files.create(file=("train.jsonl", TRAINING), purpose="fine-tune").id


def test_jobs_through_the_sdk(
    doors: Doors, tenant: TenantClient, training_file: str, new_tenant: Callable[..., TenantClient]
) -> None:
    jobs = tenant.openai.fine_tuning.jobs
    job = jobs.create(
        model=doors.model,
        training_file=training_file,
        suffix="support",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        metadata={"team": "a"},
        extra_body={"peft": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}},
    )
    assert job.status == "validating_files"
    assert (job.hyperparameters.n_epochs, job.seed, job.organization_id) == (2, 7, tenant.id)
    assert job.model_dump()["peft"]["r"] == 8
    assert jobs.retrieve(job.id) == job
    older = jobs.create(model=doors.model, training_file=training_file)
    assert {one.id for one in jobs.list(limit=1)} == {job.id, older.id}, "the SDK pages through all"
    events = list(jobs.list_events(job.id))
    assert events[-1].message.startswith("Created")
    with pytest.raises(openai.NotFoundError):
        new_tenant().openai.fine_tuning.jobs.retrieve(job.id)
    assert jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        jobs.cancel(job.id)
    assert next(event.message for event in jobs.list_events(job.id, limit=1)) == "Fine-tuning job cancelled"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"training_file": "file-nothere"}, 400, "training_file"),
        ({"model": "someone/else"}, 404, "model"),
        ({"suffix": "Not A Name"}, 400, "suffix"),
        ({"peft": {"r": 64}}, 400, "peft.r"),
        ({"peft": {"rank": 8}}, 400, "peft.rank"),
        ({"peft": {"target_modules": ["lm_head"]}}, 400, "peft.target_modules[0]"),
        ({"method": {"type": "dpo"}}, 400, "method.type"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs"),
        ({"integrations": [{"type": "wandb"}]}, 400, "integrations"),
        ({"metadata": {"k": "v" * 600}}, 400, "metadata.k"),
        ({"priority": 1}, 400, "priority"),
    ],
)
def test_bad_jobs_are_refused_by_field(
    doors: Doors, tenant: TenantClient, training_file: str, change: dict[str, Any], status: int, param: str
) -> None:
    body = {"model": doors.model, "training_file": training_file} | change
    response = tenant.http.post("/v1/fine_tuning/jobs", json=body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param, response.text
