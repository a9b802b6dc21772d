"""The models that a caller may name: the base, and adapters by their names and aliases."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters_store.errors import AdapterNotFound
from adapters_store.names import DEFAULT_ALIAS
from gateway.errors import ModelNotFound
from gateway.server.adapters import reachable_adapters

if TYPE_CHECKING:
    from adapters_store.accounts import Principal
    from adapters_store.registry import AdapterInfo
    from adapters_store.versions import AdapterVersion
    from gateway.server.context import ServerContext
    from gateway.server.router import EngineInfo


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One name that requests may use. root: what it resolves to now. parent: the base, None for the base itself.

    created_at: unix seconds of the version, None for the base.
    """

    id: str
    root: str
    parent: str | None
    tenant: str | None
    created_at: int | None
    max_model_len: int


class ModelService:
    """The models of a caller. An admin key sees every tenant's, a tenant's key its own and the base."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def list(self, principal: Principal) -> list[ModelCard]:
        """The base, then every alias of every adapter ("tenant/name" is its default alias)."""
        info = await self._context.router.info()
        adapters = await asyncio.to_thread(reachable_adapters, self._context, principal)
        return [_base(info), *(card for adapter in adapters for card in _aliases(adapter, info))]

    async def get(self, principal: Principal, model: str) -> ModelCard:
        """One model by any of its names. Raises `ModelNotFound`."""
        info = await self._context.router.info()
        if model == info.model_name:
            return _base(info)
        return _card(model, await self.resolve(principal, model), info)

    async def resolve(self, principal: Principal, model: str, caller: str | None = None) -> AdapterVersion:
        """The version that an adapter's name means now, to this caller where an alias has a canary.

        Names are those of `AdapterRef`, also without the tenant, which is then the caller's, and after "base:". Raises
        `ModelNotFound`, also for another tenant's, and `VersionNotReady`.
        """
        base = (await self._context.router.info()).model_name
        ref = _full_ref(model.removeprefix(f"{base}:"), principal.tenant or self._context.config.server.default_tenant)
        tenant = principal.tenant or ref.partition("/")[0]
        context, loop = self._context, asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(context.lookups, context.registry.resolve, tenant, ref, caller)
        except AdapterNotFound:
            raise ModelNotFound(str(AdapterNotFound(model)), param="model") from None


def _full_ref(name: str, tenant: str | None) -> str:
    return name if "/" in name or tenant is None else f"{tenant}/{name}"


def _base(info: EngineInfo) -> ModelCard:
    return ModelCard(info.model_name, info.model_name, None, None, None, info.max_model_len)


def _aliases(adapter: AdapterInfo, info: EngineInfo) -> list[ModelCard]:
    name = f"{adapter.tenant}/{adapter.name}"
    versions = {version.version: version for version in adapter.versions}
    return [
        _card(name if alias == DEFAULT_ALIAS else f"{name}@{alias}", versions[number], info)
        for alias, number in sorted(adapter.aliases.items())
    ]


def _card(model: str, version: AdapterVersion, info: EngineInfo) -> ModelCard:
    return ModelCard(model, version.ref, info.model_name, version.tenant, version.created_at, info.max_model_len)
