"""Deny by default: every route and method has a policy row, and the rows hold."""

from __future__ import annotations

import asyncio
import re
import threading
from pathlib import Path

import grpc
import httpx
import pytest
from fastapi import APIRouter
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from starlette.routing import Route

from gateway.rpc import patchbay_pb2 as pb
from gateway.rpc import patchbay_pb2_grpc as pb_grpc
from gateway.server.auth import GRPC_POLICY, HTTP_POLICY, Access
from gateway.server.http_routes import PolicyRoute
from tests.gateway.server.conftest import TenantClient
from tests.gateway.server.doors import Doors, bearer, channel

GUARDED = sorted((method, path) for (method, path), access in HTTP_POLICY.items() if access is not Access.PUBLIC)
METHODS = sorted(name for name, access in GRPC_POLICY.items() if access is not Access.PUBLIC)


def test_every_http_route_has_a_policy_row_and_every_row_a_route(doors: Doors) -> None:
    served = set()
    for route in doors.http_app.routes:
        for inner in getattr(route, "original_router", route).routes if not isinstance(route, Route) else [route]:
            assert isinstance(inner, PolicyRoute), inner
            served |= {(method, inner.path) for method in inner.methods}
    assert served == set(HTTP_POLICY)


def test_a_route_without_a_policy_row_cannot_be_made() -> None:
    router = APIRouter(route_class=PolicyRoute)
    with pytest.raises(LookupError, match="/v1/secrets"):
        router.get("/v1/secrets")(lambda: None)


def test_every_grpc_method_has_a_policy_row(doors: Doors) -> None:
    served = set(_methods_by_reflection(doors))
    assert {name for name in served if name.startswith("/patchbay")} == set(METHODS)
    assert served <= set(GRPC_POLICY)


def test_a_grpc_method_without_a_policy_row_is_closed(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {name: access for name, access in GRPC_POLICY.items() if name != "/patchbay.v1.Adapters/List"}
    monkeypatch.setattr("gateway.server.grpc_calls.GRPC_POLICY", rows)
    with pytest.raises(grpc.RpcError) as failure:
        _call(doors, "/patchbay.v1.Adapters/List", doors.admin)
    assert failure.value.code() is grpc.StatusCode.PERMISSION_DENIED  # type: ignore[attr-defined]


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_http_without_a_valid_key_is_refused_before_the_body_is_read(doors: Doors, method: str, path: str) -> None:
    url = doors.url + re.sub(r"{.*?}", "x", path)
    for headers in ({}, {"authorization": "Bearer pb_00000000_" + "0" * 43}, {"authorization": doors.admin}):
        response = httpx.request(method, url, headers=headers, content=b"{")
        assert response.status_code == 401, (headers, response.text)
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("method", METHODS)
def test_grpc_without_a_valid_key_is_refused(doors: Doors, method: str) -> None:
    for key in ("", "pb_00000000_" + "0" * 43):
        with pytest.raises(grpc.RpcError) as failure:
            _call(doors, method, key)
        assert failure.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


@pytest.mark.parametrize(("method", "path"), [row for row, access in HTTP_POLICY.items() if access is Access.ADMIN])
def test_a_tenants_key_cannot_administer(tenant: TenantClient, method: str, path: str) -> None:
    response = tenant.http.request(method, re.sub(r"{.*?}", "x", path), json={})
    assert response.status_code == 403
    assert response.json()["error"]["type"] == "permission_error"


@pytest.mark.parametrize(("method", "path"), [row for row, access in HTTP_POLICY.items() if access is Access.TENANT])
def test_an_admin_key_owns_no_files_and_jobs(admin: httpx.Client, method: str, path: str) -> None:
    assert admin.request(method, re.sub(r"{.*?}", "x", path)).status_code == 403


def test_a_revoked_key_is_refused_at_once(doors: Doors, tenant: TenantClient, admin: httpx.Client) -> None:
    assert tenant.http.get("/v1/models").status_code == 200
    assert admin.delete(f"/v1/keys/{tenant.key.split('_')[1]}").json()["revoked"] is True
    assert tenant.http.get("/v1/models").status_code == 401
    with pytest.raises(grpc.RpcError) as failure:
        _call(doors, "/patchbay.v1.Adapters/List", tenant.key)
    assert failure.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


def test_a_key_and_a_model_are_looked_up_while_slow_work_holds_all_of_the_loops_threads(
    doors: Doors, tenant: TenantClient, adapter: Path
) -> None:
    tenant.upload("own", adapter).raise_for_status()
    done = threading.Event()

    async def hold() -> list[asyncio.Task[bool]]:
        return [asyncio.create_task(asyncio.to_thread(done.wait)) for _ in range(64)]  # an executor has 32 at most

    held = doors.run(hold())
    try:
        body = {"model": "own", "prompt": "the", "max_tokens": 1}
        assert tenant.http.post("/v1/completions", json=body).json()["model"] == f"{tenant.id}/own:1"
        with channel(doors) as client:
            stub = pb_grpc.InferenceStub(client)  # type: ignore[no-untyped-call]
            request = pb.GenerateRequest(model="own", text="the", sampling=pb.SamplingParams(max_tokens=1))
            assert stub.Generate(request, metadata=bearer(tenant.key), timeout=30).model == f"{tenant.id}/own:1"
        assert not any(task.done() for task in held)
    finally:
        done.set()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models/{model}", None),
        ("POST", "/v1/completions", {"model": "{model}", "prompt": "the"}),
        ("POST", "/v1/completions", {"model": "{model}:1", "prompt": "the"}),
        ("GET", "/v1/adapters/{model}", None),
        ("PUT", "/v1/adapters/{model}/aliases/default", {"version": 1}),
        ("DELETE", "/v1/adapters/{model}/aliases/default", None),
        ("POST", "/v1/adapters/{model}/rollback", {}),
        ("DELETE", "/v1/adapters/{model}/versions/1", None),
        ("POST", "/v1/adapters/{model}/versions/1/test", {}),
        ("PUT", "/v1/adapters/{model}/tags/a", {"value": "b"}),
        ("GET", "/v1/adapters/{model}/versions/1/download", None),
        ("DELETE", "/v1/adapters/{model}/versions/1/tags/a", None),
    ],
)
def test_another_tenants_adapter_looks_exactly_like_an_absent_one(
    helper: str, tenant: TenantClient, method: str, path: str, body: dict[str, str] | None
) -> None:
    def ask(model: str) -> tuple[int, str]:
        filled = {key: v.replace("{model}", model) if isinstance(v, str) else v for key, v in (body or {}).items()}
        content = None if body is None else filled
        response = tenant.http.request(method, path.replace("{model}", model), json=content)
        return response.status_code, response.text.replace(model, "MODEL")

    foreign, absent = ask(helper), ask(f"{helper}-not-there")
    assert foreign == absent == ask("no-such-tenant/helper")
    assert foreign[0] == 404


def test_an_admin_key_may_call_and_manage_every_tenants_adapters(helper: str, admin: httpx.Client) -> None:
    body = {"model": helper, "prompt": "the", "max_tokens": 1}
    assert admin.post("/v1/completions", json=body).json()["model"] == f"{helper}:1"
    assert helper in [info["id"] for info in admin.get("/v1/adapters").json()["data"]]


def _call(doors: Doors, method: str, key: str) -> None:
    _, service, name = method.split("/")
    kind = pb.DESCRIPTOR.services_by_name[service.rpartition(".")[2]].methods_by_name[name]
    metadata = bearer(key) if key else ()
    with channel(doors) as client:
        if kind.client_streaming:
            client.stream_unary(method, lambda m: b"", bytes)(iter([b""]), metadata=metadata, timeout=10)
        elif kind.server_streaming:
            list(client.unary_stream(method, lambda m: b"", bytes)(b"", metadata=metadata, timeout=10))
        else:
            client.unary_unary(method, lambda m: b"", bytes)(b"", metadata=metadata, timeout=10)


def _methods_by_reflection(doors: Doors) -> list[str]:
    """Every method that the server tells of, asked as a client without our stubs asks."""
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

    names = []
    with channel(doors) as client:
        stub = reflection_pb2_grpc.ServerReflectionStub(client)

        def ask(**question: str) -> reflection_pb2.ServerReflectionResponse:
            return next(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**question)])))

        for service in ask(list_services="").list_services_response.service:
            answer = ask(file_containing_symbol=service.name).file_descriptor_response
            for encoded in answer.file_descriptor_proto:
                file = FileDescriptorProto.FromString(encoded)
                names += [
                    f"/{file.package}.{found.name}/{method.name}"
                    for found in file.service
                    if f"{file.package}.{found.name}" == service.name
                    for method in found.method
                ]
    return names
