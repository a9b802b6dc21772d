"""Who may call what: one policy row for every HTTP route and gRPC method, and none for what is denied."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Final

from gateway.errors import AuthenticationFailed, PermissionDenied

if TYPE_CHECKING:
    from adapters_store.accounts import Principal
    from gateway.server.context import ServerContext

ADMIN_SALT: Final = "@admin"
"""Prefix-cache salt of an admin key's calls; no tenant can have this id."""


class Access(Enum):
    """What a route asks of its caller.

    PUBLIC: nothing. ANY_KEY: any key; a tenant's key reaches its tenant's objects, an admin key every tenant's.
    TENANT: a tenant's key, since the route makes or reads objects that belong to one tenant. ADMIN: an admin key.
    """

    PUBLIC = "public"
    ANY_KEY = "any key"
    TENANT = "tenant"
    ADMIN = "admin"


HTTP_POLICY: Final[Mapping[tuple[str, str], Access]] = {
    ("GET", "/healthz"): Access.PUBLIC,
    ("GET", "/readyz"): Access.PUBLIC,
    ("GET", "/health"): Access.PUBLIC,
    ("GET", "/version"): Access.PUBLIC,
    ("GET", "/metrics"): Access.PUBLIC,
    ("GET", "/openapi.json"): Access.PUBLIC,
    ("GET", "/v1/models"): Access.ANY_KEY,
    ("GET", "/v1/models/{model:path}"): Access.ANY_KEY,
    ("POST", "/v1/completions"): Access.ANY_KEY,
    ("POST", "/v1/chat/completions"): Access.ANY_KEY,
    ("POST", "/v1/adapters"): Access.ANY_KEY,
    ("GET", "/v1/adapters"): Access.ANY_KEY,
    ("GET", "/v1/adapters/{tenant}/{name}"): Access.ANY_KEY,
    ("PUT", "/v1/adapters/{tenant}/{name}/aliases/{alias}"): Access.ANY_KEY,
    ("DELETE", "/v1/adapters/{tenant}/{name}/aliases/{alias}"): Access.ANY_KEY,
    ("POST", "/v1/adapters/{tenant}/{name}/rollback"): Access.ANY_KEY,
    ("DELETE", "/v1/adapters/{tenant}/{name}/versions/{version}"): Access.ANY_KEY,
    ("POST", "/v1/adapters/{tenant}/{name}/versions/{version}/test"): Access.ANY_KEY,
    ("PUT", "/v1/adapters/{tenant}/{name}/tags/{key:path}"): Access.ANY_KEY,
    ("DELETE", "/v1/adapters/{tenant}/{name}/tags/{key:path}"): Access.ANY_KEY,
    ("PUT", "/v1/adapters/{tenant}/{name}/versions/{version}/tags/{key:path}"): Access.ANY_KEY,
    ("DELETE", "/v1/adapters/{tenant}/{name}/versions/{version}/tags/{key:path}"): Access.ANY_KEY,
    ("GET", "/v1/adapters/{tenant}/{name}/versions/{version}/download"): Access.ANY_KEY,
    ("POST", "/v1/load_lora_adapter"): Access.ADMIN,
    ("POST", "/v1/unload_lora_adapter"): Access.ADMIN,
    ("POST", "/v1/files"): Access.TENANT,
    ("GET", "/v1/files"): Access.TENANT,
    ("GET", "/v1/files/{file_id}"): Access.TENANT,
    ("GET", "/v1/files/{file_id}/content"): Access.TENANT,
    ("DELETE", "/v1/files/{file_id}"): Access.TENANT,
    ("POST", "/v1/fine_tuning/jobs"): Access.TENANT,
    ("GET", "/v1/fine_tuning/jobs"): Access.TENANT,
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): Access.TENANT,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): Access.TENANT,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): Access.TENANT,
    ("POST", "/v1/tenants"): Access.ADMIN,
    ("GET", "/v1/tenants"): Access.ADMIN,
    ("POST", "/v1/keys"): Access.ADMIN,
    ("GET", "/v1/keys"): Access.ADMIN,
    ("DELETE", "/v1/keys/{key_id}"): Access.ADMIN,
}

GRPC_POLICY: Final[Mapping[str, Access]] = {
    "/grpc.health.v1.Health/Check": Access.PUBLIC,
    "/grpc.health.v1.Health/List": Access.PUBLIC,
    "/grpc.health.v1.Health/Watch": Access.PUBLIC,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Access.PUBLIC,
    "/patchbay.v1.Inference/Generate": Access.ANY_KEY,
    "/patchbay.v1.Inference/GenerateStream": Access.ANY_KEY,
    "/patchbay.v1.Inference/Chat": Access.ANY_KEY,
    "/patchbay.v1.Inference/ChatStream": Access.ANY_KEY,
    "/patchbay.v1.Adapters/Upload": Access.ANY_KEY,
    "/patchbay.v1.Adapters/List": Access.ANY_KEY,
    "/patchbay.v1.Adapters/Get": Access.ANY_KEY,
    "/patchbay.v1.Adapters/SetAlias": Access.ANY_KEY,
    "/patchbay.v1.Adapters/DeleteAlias": Access.ANY_KEY,
    "/patchbay.v1.Adapters/Rollback": Access.ANY_KEY,
    "/patchbay.v1.Adapters/Test": Access.ANY_KEY,
    "/patchbay.v1.Adapters/SetTag": Access.ANY_KEY,
    "/patchbay.v1.Adapters/DeleteTag": Access.ANY_KEY,
    "/patchbay.v1.Adapters/Download": Access.ANY_KEY,
    "/patchbay.v1.Adapters/Delete": Access.ANY_KEY,
    "/patchbay.v1.FineTuning/Create": Access.TENANT,
    "/patchbay.v1.FineTuning/Get": Access.TENANT,
    "/patchbay.v1.FineTuning/List": Access.TENANT,
    "/patchbay.v1.FineTuning/Cancel": Access.TENANT,
    "/patchbay.v1.FineTuning/StreamEvents": Access.TENANT,
}


async def authorize(context: ServerContext, authorization: str | None, access: Access) -> Principal | None:
    """The caller named by an `Authorization: Bearer pb_...` value; None on a public route.

    Raises `AuthenticationFailed` without a valid key and `PermissionDenied` when the key may not use the route.
    """
    if access is Access.PUBLIC:
        return None
    key, loop = _bearer(authorization), asyncio.get_running_loop()
    principal = await loop.run_in_executor(context.lookups, context.accounts.authenticate, key)
    if principal is None:
        raise AuthenticationFailed("The API key is not valid: it is unknown, malformed or revoked.")
    if access is Access.ADMIN and principal.role != "admin":
        raise PermissionDenied("This needs an admin key. Ask the operator of this Patchbay for the change.")
    if access is Access.TENANT and principal.tenant is None:
        raise PermissionDenied("This needs a tenant's key: an admin key owns no files and no jobs.")
    return principal


def _bearer(authorization: str | None) -> str:
    if not authorization:
        raise AuthenticationFailed("No API key was given. Send it as `Authorization: Bearer pb_...`.")
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise AuthenticationFailed("The Authorization header must read `Bearer pb_...`.")
    return key.strip()
