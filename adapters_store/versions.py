"""Versions as rows: read, numbered, added, and moved from one status to another, within a caller's transaction."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import Connection, Row, Select, and_, insert, select, update
from sqlalchemy.exc import IntegrityError

from adapters_store.errors import AdapterNotFound, TenantNotFound, VersionNotReady
from adapters_store.golden import GoldenPrompt
from adapters_store.manifest import AdapterManifest
from adapters_store.names import is_name
from adapters_store.reports import VersionReport
from adapters_store.tables import adapter_versions, adapters

_MAX_VERSION: Final = 2**31 - 1

VersionStatus = Literal["staged", "ready", "quarantined", "retired"]
"""staged: stored, its self-test under way. ready: may be named by aliases and called. quarantined: kept for its owner
to look at, and not called. retired: deleted by its owner; its bytes go once no request runs with it."""

LISTED: Final = ("staged", "ready", "quarantined")


@dataclass(frozen=True)
class AdapterVersion:
    """One version, immutable but for its status and report.

    digest: names its blob. rank: its largest. created_at: unix seconds. report: of its self-test, or why it was
    quarantined later; None where it was published without a test.
    """

    tenant: str
    name: str
    version: int
    digest: str
    rank: int
    manifest: AdapterManifest
    created_at: int
    status: VersionStatus = "ready"
    report: VersionReport | None = None

    @property
    def ref(self) -> str:
        """The reference that always means this version, such as `acme/support:3`."""
        return f"{self.tenant}/{self.name}:{self.version}"


def versions_query(statuses: Collection[str] = LISTED) -> Select[Any]:
    """Adapters joined with their versions of these statuses; `version_of` reads a row."""
    query = select(
        adapters.c.tenant,
        adapters.c.name,
        adapter_versions.c.version,
        adapter_versions.c.digest,
        adapter_versions.c.rank,
        adapter_versions.c.manifest,
        adapter_versions.c.created_at,
        adapter_versions.c.status,
        adapter_versions.c.report,
    ).join_from(adapters, adapter_versions, adapter_versions.c.adapter_id == adapters.c.id)
    return query.where(adapter_versions.c.status.in_(statuses))


def version_of(row: Row[Any]) -> AdapterVersion:
    """Of a row of `versions_query`."""
    manifest = AdapterManifest.model_validate(row.manifest)
    report = VersionReport(**row.report) if row.report is not None else None
    return AdapterVersion(
        row.tenant, row.name, row.version, row.digest, row.rank, manifest, row.created_at, row.status, report
    )


def ready_version(row: Row[Any]) -> AdapterVersion:
    """The row's version. Raises `VersionNotReady` where it may not be called."""
    version = version_of(row)
    if version.status != "ready":
        raise VersionNotReady(version.ref, version.status, version.report)
    return version


def next_version(connection: Connection, tenant: str, name: str, now: int) -> tuple[int, int]:
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


def insert_version(
    connection: Connection, adapter_id: int, version: AdapterVersion, golden: Sequence[GoldenPrompt]
) -> None:
    """Add one whose number `next_version` gave, with the golden prompts of its upload."""
    values = {
        "adapter_id": adapter_id,
        "version": version.version,
        "digest": version.digest,
        "rank": version.rank,
        "manifest": version.manifest.model_dump(mode="json"),
        "created_at": version.created_at,
        "status": version.status,
        "golden": [prompt.model_dump() for prompt in golden] or None,
    }
    connection.execute(insert(adapter_versions).values(values))


def move_version(
    connection: Connection,
    adapter_id: int,
    version: int,
    before: Collection[str],
    status: VersionStatus,
    report: VersionReport | None = None,
) -> bool:
    """Give a version another status, and a report where there is one; whether its status was one of `before`."""
    is_version = and_(adapter_versions.c.adapter_id == adapter_id, adapter_versions.c.version == version)
    values: dict[str, Any] = {"status": status}
    if report is not None:
        values["report"] = report.as_json
    statement = update(adapter_versions).where(is_version, adapter_versions.c.status.in_(before)).values(values)
    return connection.execute(statement).rowcount == 1


def lock_adapter(connection: Connection, tenant: str, name: str) -> int:
    """The adapter's id; holds its row until the commit, so that it does not go away. Raises `AdapterNotFound`."""
    if not (is_name(tenant) and is_name(name)):
        raise AdapterNotFound(f"{tenant}/{name}")
    query = select(adapters.c.id).where(adapters.c.tenant == tenant, adapters.c.name == name)
    adapter_id: int | None = connection.execute(query.with_for_update()).scalar_one_or_none()
    if adapter_id is None:
        raise AdapterNotFound(f"{tenant}/{name}")
    return adapter_id


def find_version(connection: Connection, tenant: str, name: str, version: int) -> Row[Any]:
    """One that is listed. Raises `AdapterNotFound`."""
    ref = f"{tenant}/{name}:{version}"
    if not 0 < version <= _MAX_VERSION:
        raise AdapterNotFound(ref)
    query = versions_query().where(
        adapters.c.tenant == tenant, adapters.c.name == name, adapter_versions.c.version == version
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        raise AdapterNotFound(ref)
    return row
