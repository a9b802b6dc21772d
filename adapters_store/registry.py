"""The adapter registry: immutable versions, and the aliases that name them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.errors import AdapterNotFound, AliasInUse, NoPreviousVersion, TenantNotFound
from adapters_store.manifest import AdapterManifest
from adapters_store.names import DEFAULT_ALIAS, AdapterRef, check_name
from adapters_store.references import delete_unreferenced, lock_blob
from adapters_store.tables import adapter_versions, adapters, alias_history, aliases, tenants, version_tags
from adapters_store.tags import Tags, tags_of_adapters, tags_of_versions
from adapters_store.upload import StagedAdapter

_MAX_VERSION = 2**31 - 1


@dataclass(frozen=True)
class AdapterVersion:
    """One immutable version. `digest` names its blob, `rank` is its largest; `created_at` in unix seconds."""

    tenant: str
    name: str
    version: int
    digest: str
    rank: int
    manifest: AdapterManifest
    created_at: int

    @property
    def ref(self) -> str:
        """The reference that always means this version, such as `acme/support:3`."""
        return f"{self.tenant}/{self.name}:{self.version}"


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter: its versions, oldest first, the version that each alias names, and tags of it and of versions."""

    tenant: str
    name: str
    created_at: int
    versions: tuple[AdapterVersion, ...]
    aliases: Mapping[str, int]
    tags: Tags = field(default_factory=dict)
    version_tags: Mapping[int, Tags] = field(default_factory=dict)


class AdapterRegistry:
    """Versions and aliases in SQL, bytes in the blob store. Safe to use from any thread.

    A tenant's calls see only its own adapters: another's looks exactly like one that does not exist.
    Every method may raise `StoreUnavailable`.
    """

    def __init__(self, database: Database, blobs: BlobStore) -> None:
        self._database = database
        self._blobs = blobs

    def publish(
        self,
        tenant: str,
        name: str,
        staged: StagedAdapter,
        alias: str = DEFAULT_ALIAS,
        also: Callable[[Connection, AdapterVersion], None] | None = None,
    ) -> AdapterVersion:
        """Store a validated adapter as the next version and point `alias` at it.

        The blob is made durable first; then one transaction adds the version, moves the alias and does what `also`
        does. Killed at any point, the alias names the old version or the new one, whole; at worst an unreferenced blob
        is left. Raises `InvalidName` or `TenantNotFound`, and what `also` raises, which undoes the rest.
        """
        check_name("name", name)
        check_name("alias", alias)
        self._require_tenant(tenant)
        manifest, now = staged.manifest, int(time.time())
        self._blobs.put(manifest.digest, staged.path)
        with self._database.write() as connection:
            lock_blob(self._database, connection, manifest.digest)
            if not self._blobs.exists(manifest.digest):  # a delete of its last version came between
                self._blobs.put(manifest.digest, staged.path)
            adapter_id, version = _next_version(connection, tenant, name, now)
            created = AdapterVersion(tenant, name, version, manifest.digest, manifest.rank, manifest, now)
            _insert_version(connection, adapter_id, created)
            _point_alias(connection, adapter_id, alias, version, now)
            if also is not None:
                also(connection, created)
        return created

    def resolve(self, tenant: str, ref: str) -> AdapterVersion:
        """The version that `ref` (`tenant/name`, `:3` or `@alias`) names now. Raises `AdapterNotFound`."""
        parsed = AdapterRef.parse(ref)
        query = _versions_query().where(
            adapters.c.tenant == tenant, adapters.c.tenant == parsed.tenant, adapters.c.name == parsed.name
        )
        if parsed.version is not None:
            query = query.where(adapter_versions.c.version == parsed.version)
        else:
            named = and_(aliases.c.adapter_id == adapters.c.id, aliases.c.version == adapter_versions.c.version)
            query = query.join(aliases, named).where(aliases.c.alias == parsed.alias)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise AdapterNotFound(ref)
        return _version_of(row)

    def list(self, tenant: str) -> tuple[AdapterInfo, ...]:
        """All adapters of a tenant that have a version, by name."""
        return self._infos(tenant, None)

    def get(self, tenant: str, name: str) -> AdapterInfo:
        """One adapter. Raises `AdapterNotFound`."""
        infos = self._infos(tenant, name)
        if not infos:
            raise AdapterNotFound(f"{tenant}/{name}")
        return infos[0]

    def set_alias(self, tenant: str, name: str, alias: str, version: int) -> AdapterVersion:
        """Point an alias, new or not, at a version. Raises `InvalidName` or `AdapterNotFound`."""
        check_name("alias", alias)
        with self._database.write() as connection:
            adapter_id = _lock_adapter(connection, tenant, name)
            row = _find_version(connection, tenant, name, version)
            _point_alias(connection, adapter_id, alias, version, int(time.time()))
        return _version_of(row)

    def rollback(self, tenant: str, name: str, alias: str = DEFAULT_ALIAS) -> AdapterVersion:
        """Point an alias at the version that it named before; again goes one further back.

        Raises `AdapterNotFound` or `NoPreviousVersion`.
        """
        with self._database.write() as connection:
            adapter_id = _lock_adapter(connection, tenant, name)
            history = _history(connection, adapter_id, alias)
            if not history:
                raise AdapterNotFound(f"{tenant}/{name}@{alias}")
            before = next((row for row in history if row.version != history[0].version), None)
            if before is None:
                raise NoPreviousVersion(f"{tenant}/{name}@{alias}")
            _unwind_alias(connection, adapter_id, alias, before, int(time.time()))
            return _version_of(_find_version(connection, tenant, name, before.version))

    def delete_alias(self, tenant: str, name: str, alias: str) -> None:
        """Take an alias away; the version that it named stays. Raises `AdapterNotFound`."""
        with self._database.write() as connection:
            adapter_id = _lock_adapter(connection, tenant, name)
            is_alias = and_(aliases.c.adapter_id == adapter_id, aliases.c.alias == alias)
            if connection.execute(delete(aliases).where(is_alias)).rowcount == 0:
                raise AdapterNotFound(f"{tenant}/{name}@{alias}")

    def delete(self, tenant: str, name: str, version: int) -> None:
        """Remove a version, and its bytes unless another version shares them. Its number is never used again.

        Raises `AdapterNotFound`, or `AliasInUse` while an alias names it.
        """
        with self._database.write() as connection:
            adapter_id = _lock_adapter(connection, tenant, name)
            row = _find_version(connection, tenant, name, version)
            named_by = _aliases_of(connection, adapter_id, version)
            if named_by:
                raise AliasInUse(f"{tenant}/{name}:{version}", named_by)
            for table in (alias_history, version_tags, adapter_versions):
                is_version = and_(table.c.adapter_id == adapter_id, table.c.version == version)
                connection.execute(delete(table).where(is_version))
        delete_unreferenced(self._database, self._blobs, row.digest)

    def _require_tenant(self, tenant: str) -> None:
        query = select(tenants.c.id).where(tenants.c.id == tenant)
        with self._database.read() as connection:
            if connection.execute(query).one_or_none() is None:
                raise TenantNotFound(tenant)

    def _infos(self, tenant: str, name: str | None) -> tuple[AdapterInfo, ...]:
        is_wanted = adapters.c.tenant == tenant
        if name is not None:
            is_wanted = and_(is_wanted, adapters.c.name == name)
        version_query = _versions_query().where(is_wanted).order_by(adapters.c.name, adapter_versions.c.version)
        alias_query = select(adapters.c.name, aliases.c.alias, aliases.c.version).join(
            aliases, aliases.c.adapter_id == adapters.c.id
        )
        adapter_query = select(adapters.c.name, adapters.c.created_at).where(is_wanted).order_by(adapters.c.name)
        with self._database.read() as connection:
            created = {row.name: row.created_at for row in connection.execute(adapter_query)}
            versions = [_version_of(row) for row in connection.execute(version_query)]
            tags, tags_by_version = tags_of_adapters(connection, is_wanted), tags_of_versions(connection, is_wanted)
            named = list(connection.execute(alias_query.where(is_wanted).order_by(aliases.c.alias)))
        by_name: dict[str, list[AdapterVersion]] = {}
        for version in versions:
            by_name.setdefault(version.name, []).append(version)
        alias_maps: dict[str, dict[str, int]] = {}
        for row in named:
            alias_maps.setdefault(row.name, {})[row.alias] = row.version
        return tuple(
            AdapterInfo(
                tenant,
                adapter,
                created[adapter],
                tuple(found),
                alias_maps.get(adapter, {}),
                tags.get(adapter, {}),
                tags_by_version.get(adapter, {}),
            )
            for adapter, found in by_name.items()
        )


def _versions_query() -> Select[Any]:
    return select(
        adapters.c.tenant,
        adapters.c.name,
        adapter_versions.c.version,
        adapter_versions.c.digest,
        adapter_versions.c.rank,
        adapter_versions.c.manifest,
        adapter_versions.c.created_at,
    ).join_from(adapters, adapter_versions, adapter_versions.c.adapter_id == adapters.c.id)


def _version_of(row: Row[Any]) -> AdapterVersion:
    manifest = AdapterManifest.model_validate(row.manifest)
    return AdapterVersion(row.tenant, row.name, row.version, row.digest, row.rank, manifest, row.created_at)


def _next_version(connection: Connection, tenant: str, name: str, now: int) -> tuple[int, int]:
    """The adapter's id and a version number never used before; holds the adapter's row until the commit."""
    taken = _increment_version(connection, tenant, name)
    if taken is not None:
        return taken
    values = {"tenant": tenant, "name": name, "last_version": 1, "created_at": now}
    try:
        with connection.begin_nested():
            row = connection.execute(insert(adapters).values(values).returning(adapters.c.id)).one()
            return row.id, 1
    except IntegrityError:  # another process added the adapter first, or the tenant went away
        taken = _increment_version(connection, tenant, name)
    if taken is None:
        raise TenantNotFound(tenant)
    return taken


def _increment_version(connection: Connection, tenant: str, name: str) -> tuple[int, int] | None:
    statement = (
        update(adapters)
        .where(adapters.c.tenant == tenant, adapters.c.name == name)
        .values(last_version=adapters.c.last_version + 1)
        .returning(adapters.c.id, adapters.c.last_version)
    )
    row = connection.execute(statement).one_or_none()
    return None if row is None else (row.id, row.last_version)


def _insert_version(connection: Connection, adapter_id: int, version: AdapterVersion) -> None:
    values = {
        "adapter_id": adapter_id,
        "version": version.version,
        "digest": version.digest,
        "rank": version.rank,
        "manifest": version.manifest.model_dump(mode="json"),
        "created_at": version.created_at,
    }
    connection.execute(insert(adapter_versions).values(values))


def _lock_adapter(connection: Connection, tenant: str, name: str) -> int:
    query = select(adapters.c.id).where(adapters.c.tenant == tenant, adapters.c.name == name)
    adapter_id: int | None = connection.execute(query.with_for_update()).scalar_one_or_none()
    if adapter_id is None:
        raise AdapterNotFound(f"{tenant}/{name}")
    return adapter_id


def _find_version(connection: Connection, tenant: str, name: str, version: int) -> Row[Any]:
    ref = f"{tenant}/{name}:{version}"
    if not 0 < version <= _MAX_VERSION:
        raise AdapterNotFound(ref)
    query = _versions_query().where(
        adapters.c.tenant == tenant, adapters.c.name == name, adapter_versions.c.version == version
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        raise AdapterNotFound(ref)
    return row


def _point_alias(connection: Connection, adapter_id: int, alias: str, version: int, now: int) -> None:
    """Set an alias and remember it in the history."""
    _set_alias(connection, adapter_id, alias, version, now)
    values = {"adapter_id": adapter_id, "alias": alias, "version": version, "created_at": now}
    connection.execute(insert(alias_history).values(values))


def _set_alias(connection: Connection, adapter_id: int, alias: str, version: int, now: int) -> None:
    is_alias = and_(aliases.c.adapter_id == adapter_id, aliases.c.alias == alias)
    values = {"version": version, "updated_at": now}
    if connection.execute(update(aliases).where(is_alias).values(values)).rowcount == 0:
        connection.execute(insert(aliases).values(adapter_id=adapter_id, alias=alias, **values))


def _history(connection: Connection, adapter_id: int, alias: str) -> list[Row[Any]]:
    """What the alias named, newest first."""
    is_alias = and_(alias_history.c.adapter_id == adapter_id, alias_history.c.alias == alias)
    query = select(alias_history.c.id, alias_history.c.version).where(is_alias)
    return list(connection.execute(query.order_by(alias_history.c.id.desc())))


def _unwind_alias(connection: Connection, adapter_id: int, alias: str, to: Row[Any], now: int) -> None:
    """Take the history back to the row `to`, so that the next rollback goes further."""
    is_newer = and_(
        alias_history.c.adapter_id == adapter_id, alias_history.c.alias == alias, alias_history.c.id > to.id
    )
    connection.execute(delete(alias_history).where(is_newer))
    _set_alias(connection, adapter_id, alias, to.version, now)


def _aliases_of(connection: Connection, adapter_id: int, version: int) -> list[str]:
    is_named = and_(aliases.c.adapter_id == adapter_id, aliases.c.version == version)
    return list(connection.scalars(select(aliases.c.alias).where(is_named).order_by(aliases.c.alias)))
