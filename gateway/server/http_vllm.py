"""vLLM's own routes, as it answers them. Those for adapters want an admin key, and here they publish and last."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from adapters_store.errors import AdapterNotFound
from adapters_store.names import DEFAULT_ALIAS
from gateway.errors import InvalidRequest, NotFound
from gateway.server.adapters import AdapterService, split_name
from gateway.server.context import ServerContext
from gateway.server.http_routes import Caller, PolicyRoute
from gateway.server.openai_schema import LoadLoRARequest, UnloadLoRARequest


def vllm_routes(context: ServerContext) -> APIRouter:
    """/v1/load_lora_adapter, /v1/unload_lora_adapter, /health and /version."""
    router = APIRouter(route_class=PolicyRoute)
    service = AdapterService(context)
    default_tenant = context.config.server.default_tenant

    @router.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadLoRARequest, caller: Caller) -> Response:
        tenant, name = split_name(caller, body.lora_name, default_tenant)
        if not body.load_inplace and await service.has_alias(caller, tenant, name, DEFAULT_ALIAS):
            raise InvalidRequest(
                f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter "
                "in place, set 'load_inplace' to True.",
                param="lora_name",
            )
        async with service.upload(caller) as upload:
            await upload.add_folder(body.lora_path)
            await upload.publish(f"{tenant}/{name}")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadLoRARequest, caller: Caller) -> Response:
        tenant, name = split_name(caller, body.lora_name, default_tenant)
        try:
            await service.delete_alias(caller, tenant, name, DEFAULT_ALIAS)
        except AdapterNotFound:
            raise NotFound(f"The lora adapter '{body.lora_name}' cannot be found.", param="lora_name") from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @router.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if context.readiness.ready else 503)

    @router.get("/version")
    async def show_version() -> Response:
        return JSONResponse({"version": version("patchbay")})

    return router
