"""The adapter registry: immutable versions, and the aliases that name them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from sqlalchemy import Connection, and_, delete, select

from adapters_store.aliases import (
    CANARY_COLUMNS,
    Canary,
    aliases_naming,
    drop_canary,
    has_canary,
    history_of,
    is_named,
    names_newer,
    point_alias,
    remove_alias,
    set_alias,
    side_of,
    unwind_alias,
)
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.errors import (
    AdapterNotFound,
    AliasInUse,
    NoPreviousVersion,
    RetestConflict,
    SelfTestFailed,
    StoreError,
    TenantNotFound,
)
from adapters_store.golden import GoldenPrompt
from adapters_store.names import DEFAULT_ALIAS, AdapterRef, check_name, is_name
from adapters_store.references import delete_unreferenced, lock_blob
from adapters_store.reports import VersionReport
from adapters_store.tables import adapter_versions, adapters, alias_history, aliases, tenants, version_tags
from adapters_store.tags import Tags, tags_of_adapters, tags_of_versions
from adapters_store.upload import StagedAdapter
from adapters_store.versions import (
    LISTED,
    AdapterVersion,
    VersionStatus,
    find_version,
    insert_version,
    lock_adapter,
    move_version,
    next_version,
    ready_version,
    version_of,
    versions_query,
)


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter: its versions, oldest first, the version that each alias names, the canaries of some, and tags."""

    tenant: str
    name: str
    created_at: int
    versions: tuple[AdapterVersion, ...]
    aliases: Mapping[str, int]
    canaries: Mapping[str, Canary] = field(default_factory=dict)
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
        test: Callable[[AdapterVersion], VersionReport] | None = None,
    ) -> AdapterVersion:
        """Store a validated adapter as the next version, test it, and point `alias` at it.

        The blob is made durable first, then the version is added as staged. After `test` one transaction makes it
        ready, moves the alias (unless it names a later version by then) and does what `also` does. Killed at any point,
        the alias names the old version or the new one, whole; at worst a staged version is left, which `expire` ends,
        or an unreferenced blob. Raises `InvalidName` or `TenantNotFound`; `SelfTestFailed`, the version then being
        quarantined; and what `test` and `also` raise, of which nothing is left.
        """
        check_name("name", name)
        check_name("alias", alias)
        self._require_tenant(tenant)
        created = self._stage(tenant, name, staged)
        try:
            report = test(created) if test is not None else None
            if report is None or report.passed:
                return self._release(created, alias, report, also)
        except BaseException:
            with suppress(StoreError):
                self._withdraw(created)
            raise
        self.quarantine(created.ref, report)
        raise SelfTestFailed(created.ref, report)

    def _stage(self, tenant: str, name: str, staged: StagedAdapter) -> AdapterVersion:
        manifest, now = staged.manifest, int(time.time())
        self._blobs.put(manifest.digest, staged.path, is_final=True)
        with self._database.write() as connection:
            lock_blob(self._database, connection, manifest.digest)
            if not self._blobs.exists(manifest.digest):  # a delete of its last version came between
                self._blobs.put(manifest.digest, staged.path, is_final=True)
            adapter_id, version = next_version(connection, tenant, name, now)
            created = AdapterVersion(tenant, name, version, manifest.digest, manifest.rank, manifest, now, "staged")
            insert_version(connection, adapter_id, created, staged.golden)
        return created

    def _release(
        self,
        staged: AdapterVersion,
        alias: str,
        report: VersionReport | None,
        also: Callable[[Connection, AdapterVersion], None] | None,
    ) -> AdapterVersion:
        released = replace(staged, status="ready", report=report)
        with self._database.write() as connection:
            adapter_id = lock_adapter(connection, staged.tenant, staged.name)
            if not move_version(connection, adapter_id, staged.version, ("staged",), "ready", report):
                raise AdapterNotFound(staged.ref)
            if not names_newer(connection, adapter_id, alias, staged.version):
                point_alias(connection, adapter_id, alias, staged.version, int(time.time()))
            if also is not None:
                also(connection, released)
        return released

    def _withdraw(self, staged: AdapterVersion) -> None:
        """Forget a version that was never ready."""
        if self._retire_staged(staged):
            self.purge(staged)

    def _retire_staged(self, staged: AdapterVersion) -> bool:
        with self._database.write() as connection:
            adapter_id = lock_adapter(connection, staged.tenant, staged.name)
            return _retire(connection, adapter_id, staged.version, ("staged",))

    def resolve(self, tenant: str, ref: str, caller: str | None = None) -> AdapterVersion:
        """The version that `ref` (`tenant/name`, `:3` or `@alias`) names now.

        caller: who asks, and so on which side of an alias with a canary; None is on the alias's own. Raises
        `AdapterNotFound`, or `VersionNotReady` for one that is staged or quarantined.
        """
        parsed = AdapterRef.parse(ref)
        query = versions_query().where(
            adapters.c.tenant == tenant, adapters.c.tenant == parsed.tenant, adapters.c.name == parsed.name
        )
        if parsed.version is not None:
            query = query.where(adapter_versions.c.version == parsed.version)
        else:
            named = and_(aliases.c.adapter_id == adapters.c.id, is_named(adapter_versions.c.version))
            query = query.join(aliases, named).where(aliases.c.alias == parsed.alias)
            query = query.add_columns(aliases.c.version.label("named"), *CANARY_COLUMNS)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        if not rows:
            raise AdapterNotFound(ref)
        return ready_version(rows[0] if parsed.version is not None else side_of(rows, parsed, caller))

    def list(self, tenant: str) -> tuple[AdapterInfo, ...]:
        """All adapters of a tenant that have a version, by name."""
        return self._infos(tenant, None)

    def get(self, tenant: str, name: str) -> AdapterInfo:
        """One adapter. Raises `AdapterNotFound`."""
        infos = self._infos(tenant, name) if is_name(tenant) and is_name(name) else ()
        if not infos:
            raise AdapterNotFound(f"{tenant}/{name}")
        return infos[0]

    def set_alias(
        self, tenant: str, name: str, alias: str, version: int, canary: Canary | None = None
    ) -> AdapterVersion:
        """Point an alias, new or not, at a version, and part of its requests at a canary; one that it had is dropped.

        Raises `InvalidName`, `AdapterNotFound` or `VersionNotReady`.
        """
        check_name("alias", alias)
        with self._database.write() as connection:
            adapter_id = lock_adapter(connection, tenant, name)
            found = ready_version(find_version(connection, tenant, name, version))
            if canary is not None:
                ready_version(find_version(connection, tenant, name, canary.version))
            point_alias(connection, adapter_id, alias, version, int(time.time()), canary)
        return found

    def rollback(self, tenant: str, name: str, alias: str = DEFAULT_ALIAS) -> AdapterVersion:
        """Drop the alias's canary; without one, point it at the last ready version that it named before.

        Again goes one further back.
        Raises `AdapterNotFound` or `NoPreviousVersion`.
        """
        with self._database.write() as connection:
            adapter_id, now = lock_adapter(connection, tenant, name), int(time.time())
            history = history_of(connection, adapter_id, alias)
            if not history:
                raise AdapterNotFound(f"{tenant}/{name}@{alias}")
            if has_canary(connection, adapter_id, alias):
                set_alias(connection, adapter_id, alias, history[0].version, now)
                return version_of(find_version(connection, tenant, name, history[0].version))
            others = (row for row in history if row.version != history[0].version)
            before = next((row for row in others if row.status == "ready"), None)
            if before is None:
                raise NoPreviousVersion(f"{tenant}/{name}@{alias}")
            unwind_alias(connection, adapter_id, alias, before, now)
            return version_of(find_version(connection, tenant, name, before.version))

    def quarantine(self, ref: str, report: VersionReport) -> bool:
        """Take the version `tenant/name:3` out of service, for its owner to look at; whether it was in service.

        An alias of which it is the canary loses it. An alias that names it is left to its owner, as what that named
        before may be another task. Raises `AdapterNotFound`.
        """
        named = AdapterRef.parse(ref)
        assert named.version is not None, "only versions are quarantined"
        with self._database.write() as connection:
            adapter_id = lock_adapter(connection, named.tenant, named.name)
            drop_canary(connection, adapter_id, named.version)
            return move_version(connection, adapter_id, named.version, ("staged", "ready"), "quarantined", report)

    def testable(self, tenant: str, name: str, version: int) -> AdapterVersion:
        """A version that may be tested again, as it is before: for `record_test`.

        Raises `AdapterNotFound`, or `RetestConflict` for one that is staged.
        """
        ref = f"{tenant}/{name}:{version}"
        found = next((known for known in self.get(tenant, name).versions if known.version == version), None)
        if found is None:
            raise AdapterNotFound(ref)
        if found.status == "staged":
            raise RetestConflict(ref, "is being tested by its upload; wait for what comes of that")
        return found

    def golden(self, version: AdapterVersion) -> tuple[GoldenPrompt, ...]:
        """The golden prompts of a version's upload, which no other look-up reads; none where it was deleted."""
        query = versions_query().with_only_columns(adapter_versions.c.golden)
        query = query.where(adapters.c.tenant == version.tenant, adapters.c.name == version.name)
        with self._database.read() as connection:
            found = connection.execute(query.where(adapter_versions.c.version == version.version)).scalar_one_or_none()
        return tuple(GoldenPrompt(**prompt) for prompt in found or ())

    def record_test(self, tested: AdapterVersion, report: VersionReport) -> AdapterVersion:
        """Record what came of testing a version again: it is ready or quarantined from then on, and no alias moves.

        tested: as `testable` gave it before. One that failed is out of service as by `quarantine`. Raises
        `AdapterNotFound` where it was deleted meanwhile; and `RetestConflict` where it passed and was quarantined
        meanwhile, by what this test knows nothing of.
        """
        with self._database.write() as connection:
            adapter_id = lock_adapter(connection, tested.tenant, tested.name)
            now = version_of(find_version(connection, tested.tenant, tested.name, tested.version))
            if report.passed and now.status == "quarantined" and now != tested:
                raise RetestConflict(tested.ref, "was quarantined anew while this test ran; test it again")
            if not report.passed:
                drop_canary(connection, adapter_id, tested.version)
            status: VersionStatus = "ready" if report.passed else "quarantined"
            move_version(connection, adapter_id, tested.version, ("ready", "quarantined"), status, report)
        return replace(now, status=status, report=report)

    def delete_alias(self, tenant: str, name: str, alias: str) -> None:
        """Take an alias and its history away; the version that it named stays. Raises `AdapterNotFound`."""
        with self._database.write() as connection:
            if not remove_alias(connection, lock_adapter(connection, tenant, name), alias):
                raise AdapterNotFound(f"{tenant}/{name}@{alias}")

    def delete(self, tenant: str, name: str, version: int) -> None:
        """Retire a version: it is listed and called no more, and `purge` ends it. Its number is never used again.

        Raises `AdapterNotFound`, or `AliasInUse` while an alias names it.
        """
        with self._database.write() as connection:
            adapter_id = lock_adapter(connection, tenant, name)
            find_version(connection, tenant, name, version)
            named_by = aliases_naming(connection, adapter_id, version)
            if named_by:
                raise AliasInUse(f"{tenant}/{name}:{version}", named_by)
            _retire(connection, adapter_id, version, LISTED)

    def retired(self) -> tuple[AdapterVersion, ...]:
        """The versions of all tenants that wait for `purge`."""
        with self._database.read() as connection:
            rows = connection.execute(versions_query(("retired",)))
            return tuple(version_of(row) for row in rows)

    def purge(self, version: AdapterVersion) -> None:
        """Remove a retired version, and its bytes unless another version shares them."""
        adapter_id = select(adapters.c.id).where(adapters.c.tenant == version.tenant, adapters.c.name == version.name)
        is_version = and_(
            adapter_versions.c.adapter_id == adapter_id.scalar_subquery(),
            adapter_versions.c.version == version.version,
            adapter_versions.c.status == "retired",
        )
        with self._database.write() as connection:
            connection.execute(delete(adapter_versions).where(is_version))
        delete_unreferenced(self._database, self._blobs, version.digest)

    def expire(self, before: int) -> None:
        """Retire what was staged before this time (unix seconds): whoever tested it is gone, and told nobody yes."""
        query = versions_query(("staged",)).where(adapter_versions.c.created_at < before)
        with self._database.read() as connection:  # which takes no write lock
            left = [version_of(row) for row in connection.execute(query)]
        for version in left:
            self._retire_staged(version)

    def _require_tenant(self, tenant: str) -> None:
        query = select(tenants.c.id).where(tenants.c.id == tenant)
        with self._database.read() as connection:
            if not is_name(tenant) or connection.execute(query).one_or_none() is None:
                raise TenantNotFound(tenant)

    def _infos(self, tenant: str, name: str | None) -> tuple[AdapterInfo, ...]:
        is_wanted = adapters.c.tenant == tenant
        if name is not None:
            is_wanted = and_(is_wanted, adapters.c.name == name)
        version_query = versions_query().where(is_wanted).order_by(adapters.c.name, adapter_versions.c.version)
        alias_query = select(adapters.c.name, aliases.c.alias, aliases.c.version, *CANARY_COLUMNS).join(
            aliases, aliases.c.adapter_id == adapters.c.id
        )
        adapter_query = select(adapters.c.name, adapters.c.created_at).where(is_wanted).order_by(adapters.c.name)
        with self._database.snapshot() as connection:
            created = {row.name: row.created_at for row in connection.execute(adapter_query)}
            versions = [version_of(row) for row in connection.execute(version_query)]
            tags, tags_by_version = tags_of_adapters(connection, is_wanted), tags_of_versions(connection, is_wanted)
            named = list(connection.execute(alias_query.where(is_wanted).order_by(aliases.c.alias)))
        by_name: dict[str, list[AdapterVersion]] = {}
        for version in versions:
            by_name.setdefault(version.name, []).append(version)
        alias_maps: dict[str, dict[str, int]] = {}
        canaries: dict[str, dict[str, Canary]] = {}
        for row in named:
            alias_maps.setdefault(row.name, {})[row.alias] = row.version
            if row.canary_version is not None:
                canaries.setdefault(row.name, {})[row.alias] = Canary(row.canary_version, row.canary_percent)
        return tuple(
            AdapterInfo(
                tenant,
                adapter,
                created[adapter],
                tuple(found),
                alias_maps.get(adapter, {}),
                canaries.get(adapter, {}),
                tags.get(adapter, {}),
                tags_by_version.get(adapter, {}),
            )
            for adapter, found in by_name.items()
        )


def _retire(connection: Connection, adapter_id: int, version: int, before: Collection[str]) -> bool:
    """Retire a version whose status is one of `before`, and forget what names it; whether there was one."""
    if not move_version(connection, adapter_id, version, before, "retired"):
        return False
    for table in (alias_history, version_tags):
        is_version = and_(table.c.adapter_id == adapter_id, table.c.version == version)
        connection.execute(delete(table).where(is_version))
    return True
