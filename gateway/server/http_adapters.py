"""Patchbay's own routes for adapters, tenants and keys. Unknown fields are refused."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from adapters_store.aliases import Canary
from adapters_store.names import DEFAULT_ALIAS
from adapters_store.registry import AdapterInfo
from adapters_store.versions import AdapterVersion
from gateway.errors import InvalidRequest
from gateway.server.adapters import AdapterService, UploadFile
from gateway.server.context import ServerContext
from gateway.server.http_routes import Caller, PolicyRoute
from gateway.server.multipart import read_form
from gateway.server.openai_schema import (
    AliasRequest,
    KeyRequest,
    RollbackRequest,
    SelfTestRequest,
    TagRequest,
    TenantRequest,
)

_UPLOAD_FIELDS: Final = ("name", "alias", "base_fingerprint")
_DEFAULT_ALIAS: Final = RollbackRequest()
_NO_GOLDEN: Final = SelfTestRequest()


def adapter_routes(context: ServerContext) -> APIRouter:
    """/v1/adapters."""
    router = APIRouter(route_class=PolicyRoute)
    service = AdapterService(context)

    @router.post("/v1/adapters")
    async def upload_adapter(request: Request, caller: Caller) -> Response:
        async with service.upload(caller) as upload:

            async def on_file(field: str, file_name: str) -> UploadFile:
                if field not in ("files", "archive"):
                    raise InvalidRequest(f"files come in `files` or `archive`, not in {field!r}", param=field)
                return await upload.begin(file_name, archive=field == "archive")

            fields = await read_form(request.headers.get("content-type"), request.stream(), on_file)
            check_fields(fields, required=("name",), known=_UPLOAD_FIELDS)
            alias, fingerprint = fields.get("alias") or DEFAULT_ALIAS, fields.get("base_fingerprint")
            version = await upload.publish(fields["name"], alias, fingerprint)
        return JSONResponse(_version_body(version))

    @router.get("/v1/adapters")
    async def list_adapters(caller: Caller) -> Response:
        return JSONResponse(_list([_adapter_body(info) for info in await service.list(caller)]))

    @router.get("/v1/adapters/{tenant}/{name}")
    async def get_adapter(tenant: str, name: str, caller: Caller) -> Response:
        return JSONResponse(_adapter_body(await service.get(caller, tenant, name)))

    @router.put("/v1/adapters/{tenant}/{name}/aliases/{alias}")
    async def set_alias(tenant: str, name: str, alias: str, body: AliasRequest, caller: Caller) -> Response:
        canary = Canary(body.canary.version, body.canary.percent) if body.canary is not None else None
        return JSONResponse(_adapter_body(await service.set_alias(caller, tenant, name, alias, body.version, canary)))

    @router.delete("/v1/adapters/{tenant}/{name}/aliases/{alias}")
    async def delete_alias(tenant: str, name: str, alias: str, caller: Caller) -> Response:
        return JSONResponse(_adapter_body(await service.delete_alias(caller, tenant, name, alias)))

    @router.post("/v1/adapters/{tenant}/{name}/rollback")
    async def rollback(tenant: str, name: str, caller: Caller, body: RollbackRequest = _DEFAULT_ALIAS) -> Response:
        return JSONResponse(_adapter_body(await service.rollback(caller, tenant, name, body.alias)))

    @router.post("/v1/adapters/{tenant}/{name}/versions/{version}/test")
    async def test_version(
        tenant: str, name: str, version: int, caller: Caller, body: SelfTestRequest = _NO_GOLDEN
    ) -> Response:
        return JSONResponse(_version_body(await service.test(caller, tenant, name, version, body.golden)))

    @router.get("/v1/adapters/{tenant}/{name}/versions/{version}/download")
    async def download_version(tenant: str, name: str, version: int, caller: Caller) -> Response:
        tar = await service.export(caller, tenant, name, version)
        disposition = f'attachment; filename="{tar.folder}.tar"'
        headers = {"content-length": str(tar.num_bytes), "content-disposition": disposition}
        return StreamingResponse(tar.chunks(), headers=headers, media_type="application/x-tar")

    @router.put("/v1/adapters/{tenant}/{name}/tags/{key:path}")
    async def set_tag(tenant: str, name: str, key: str, body: TagRequest, caller: Caller) -> Response:
        return JSONResponse(_adapter_body(await service.set_tag(caller, tenant, name, None, key, body.value)))

    @router.delete("/v1/adapters/{tenant}/{name}/tags/{key:path}")
    async def delete_tag(tenant: str, name: str, key: str, caller: Caller) -> Response:
        return JSONResponse(_adapter_body(await service.delete_tag(caller, tenant, name, None, key)))

    @router.put("/v1/adapters/{tenant}/{name}/versions/{version}/tags/{key:path}")
    async def set_version_tag(
        tenant: str, name: str, version: int, key: str, body: TagRequest, caller: Caller
    ) -> Response:
        return JSONResponse(_adapter_body(await service.set_tag(caller, tenant, name, version, key, body.value)))

    @router.delete("/v1/adapters/{tenant}/{name}/versions/{version}/tags/{key:path}")
    async def delete_version_tag(tenant: str, name: str, version: int, key: str, caller: Caller) -> Response:
        return JSONResponse(_adapter_body(await service.delete_tag(caller, tenant, name, version, key)))

    @router.delete("/v1/adapters/{tenant}/{name}/versions/{version}")
    async def delete_version(tenant: str, name: str, version: int, caller: Caller) -> Response:
        await service.delete(caller, tenant, name, version)
        return JSONResponse({"id": f"{tenant}/{name}:{version}", "object": "adapter.version", "deleted": True})

    return router


def admin_routes(context: ServerContext) -> APIRouter:
    """/v1/tenants and /v1/keys."""
    router = APIRouter(route_class=PolicyRoute)
    accounts = context.accounts

    @router.post("/v1/tenants")
    async def create_tenant(body: TenantRequest) -> Response:
        tenant = await asyncio.to_thread(accounts.create_tenant, body.id, body.max_rank)
        return JSONResponse({"object": "tenant", **dataclasses.asdict(tenant)})

    @router.get("/v1/tenants")
    async def list_tenants() -> Response:
        tenants = await asyncio.to_thread(accounts.list_tenants)
        return JSONResponse(_list([{"object": "tenant", **dataclasses.asdict(tenant)} for tenant in tenants]))

    @router.post("/v1/keys")
    async def create_key(body: KeyRequest) -> Response:
        if (body.tenant is None) != (body.role == "admin"):
            raise InvalidRequest("a tenant's key names its tenant, an admin key names none", param="tenant")
        key = await asyncio.to_thread(accounts.create_key, body.tenant, body.role)
        made = {"id": key.split("_")[1], "tenant": body.tenant, "role": body.role, "key": key}
        return JSONResponse({"object": "key", **made})

    @router.get("/v1/keys")
    async def list_keys() -> Response:
        keys = await asyncio.to_thread(accounts.list_keys)
        return JSONResponse(_list([{"object": "key", **dataclasses.asdict(key)} for key in keys]))

    @router.delete("/v1/keys/{key_id}")
    async def revoke_key(key_id: str) -> Response:
        await asyncio.to_thread(accounts.revoke_key, key_id)
        return JSONResponse({"id": key_id, "object": "key", "revoked": True})

    return router


def check_fields(fields: Mapping[str, str], *, required: Sequence[str], known: Sequence[str]) -> None:
    """Raise `InvalidRequest` for a form field that is missing or unknown."""
    for name in fields:
        if name not in known:
            raise InvalidRequest(f"Unrecognized form field: {name}", param=name)
    for name in required:
        if not fields.get(name):
            raise InvalidRequest(f"Missing required form field: {name!r}.", param=name)


def _adapter_body(info: AdapterInfo) -> dict[str, Any]:
    return {
        "id": f"{info.tenant}/{info.name}",
        "object": "adapter",
        "tenant": info.tenant,
        "name": info.name,
        "created_at": info.created_at,
        "aliases": dict(info.aliases),
        "canaries": {alias: dataclasses.asdict(canary) for alias, canary in info.canaries.items()},
        "tags": dict(info.tags),
        "versions": [
            {**_version_body(version), "tags": dict(info.version_tags.get(version.version, {}))}
            for version in info.versions
        ],
    }


def _version_body(version: AdapterVersion) -> dict[str, Any]:
    manifest = version.manifest
    return {
        "id": version.ref,
        "object": "adapter.version",
        "ref": version.ref,
        "tenant": version.tenant,
        "name": version.name,
        "version": version.version,
        "kind": manifest.kind,
        "rank": version.rank,
        "num_virtual_tokens": manifest.num_virtual_tokens,
        "import_error": manifest.import_error,
        "target_modules": list(manifest.target_modules),
        "num_parameters": manifest.num_parameters,
        "size_bytes": manifest.size_bytes,
        "digest": version.digest,
        "base_fingerprint": manifest.base_fingerprint,
        "status": version.status,
        "report": version.report.as_json if version.report is not None else None,
        "created_at": version.created_at,
    }


def _list(data: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": data}
