"""Versions and aliases: numbering, isolation between tenants, rollback, deletion, concurrency."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event

from adapters_store.accounts import Accounts
from adapters_store.aliases import Canary
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.errors import (
    AdapterNotFound,
    AliasInUse,
    InvalidName,
    NoPreviousVersion,
    TenantNotFound,
)
from adapters_store.names import AdapterRef
from adapters_store.registry import AdapterRegistry
from adapters_store.reports import VersionReport
from adapters_store.upload import StagedAdapter
from adapters_store.versions import AdapterVersion


@pytest.fixture(autouse=True)
def _tenants(database: Database) -> None:
    for tenant in ("acme", "globex"):
        Accounts(database).create_tenant(tenant)


def purge(registry: AdapterRegistry) -> None:
    for version in registry.retired():
        registry.purge(version)


def test_a_published_version_resolves_by_all_its_names(registry: AdapterRegistry, staged: StagedAdapter) -> None:
    created = registry.publish("acme", "support", staged)
    registry.set_alias("acme", "support", "prod", 1)
    assert created.ref == "acme/support:1"
    for ref in ("acme/support", "acme/support:1", "acme/support@default", "acme/support@prod"):
        assert registry.resolve("acme", ref) == created


def test_publishing_moves_only_the_alias_it_names(
    registry: AdapterRegistry, staged: StagedAdapter, other: StagedAdapter
) -> None:
    registry.publish("acme", "support", staged)
    registry.publish("acme", "support", other, alias="canary")
    assert registry.get("acme", "support").aliases == {"canary": 2, "default": 1}
    assert registry.resolve("acme", "acme/support@canary").digest == other.manifest.digest


def test_equal_content_is_a_new_version_that_shares_the_blob(
    registry: AdapterRegistry, blobs: BlobStore, staged: StagedAdapter
) -> None:
    first = registry.publish("acme", "support", staged)
    second = registry.publish("globex", "theirs", staged)
    third = registry.publish("acme", "support", staged)
    assert (first.version, second.version, third.version) == (1, 1, 2)
    assert len(list(blobs.digests())) == 1


@pytest.mark.parametrize("ref", ["acme/support", "acme/support:1", "acme/support@default"])
def test_a_foreign_adapter_looks_like_an_absent_one(registry: AdapterRegistry, staged: StagedAdapter, ref: str) -> None:
    registry.publish("acme", "support", staged)
    with pytest.raises(AdapterNotFound) as foreign:
        registry.resolve("globex", ref)
    absent_ref = ref.replace("support", "absence")
    with pytest.raises(AdapterNotFound) as absent:
        registry.resolve("globex", absent_ref)
    assert str(foreign.value).replace(ref, "") == str(absent.value).replace(absent_ref, "")
    assert registry.list("globex") == ()


def test_no_operation_reaches_another_tenants_adapter(registry: AdapterRegistry, staged: StagedAdapter) -> None:
    registry.publish("acme", "support", staged)
    for call in (
        lambda: registry.get("globex", "support"),
        lambda: registry.set_alias("globex", "support", "prod", 1),
        lambda: registry.rollback("globex", "support"),
        lambda: registry.delete("globex", "support", 1),
    ):
        with pytest.raises(AdapterNotFound):
            call()
    assert registry.get("acme", "support").aliases == {"default": 1}


@pytest.mark.parametrize(
    "ref",
    ["", "acme", "acme/", "/support", "acme/support:", "acme/support:0", "acme/support:01", "acme/support:-1",
     "acme/support:9999999999", "acme/support@", "acme/support@prod:1", "acme/a/b", "ACME/support", "acme/support ",
     "acme/support\n", "acme/suppor\u0442", "acme/%", "acme/support' OR '1'='1"],
)  # fmt: skip
def test_what_is_not_a_reference_is_not_found(registry: AdapterRegistry, staged: StagedAdapter, ref: str) -> None:
    registry.publish("acme", "support", staged)
    with pytest.raises(AdapterNotFound):
        registry.resolve("acme", ref)


def test_references_parse() -> None:
    assert AdapterRef.parse("a/b") == AdapterRef("a", "b", None, "default")
    assert AdapterRef.parse("a/b.c-1:12") == AdapterRef("a", "b.c-1", 12, None)
    assert AdapterRef.parse("a/b@prod") == AdapterRef("a", "b", None, "prod")


@pytest.mark.parametrize("name", ["", "Support", "-a", ".a", "a/b", "a:b", "a@b", "a b", "x" * 64, "\u0430", "a\n"])
def test_invalid_names_are_refused(registry: AdapterRegistry, staged: StagedAdapter, name: str) -> None:
    with pytest.raises(InvalidName):
        registry.publish("acme", name, staged)
    with pytest.raises(InvalidName):
        registry.publish("acme", "support", staged, alias=name)
    assert registry.list("acme") == ()


@pytest.mark.parametrize("name", ["\0", "a\0b"])
def test_a_name_that_a_database_refuses_is_not_found(
    registry: AdapterRegistry, staged: StagedAdapter, name: str
) -> None:
    registry.publish("acme", "support", staged)
    for tenant, own in (("acme", name), (name, "support")):
        for call in (
            lambda tenant=tenant, own=own: registry.get(tenant, own),
            lambda tenant=tenant, own=own: registry.set_alias(tenant, own, "prod", 1),
            lambda tenant=tenant, own=own: registry.rollback(tenant, own),
            lambda tenant=tenant, own=own: registry.delete_alias(tenant, own, "default"),
            lambda tenant=tenant, own=own: registry.delete(tenant, own, 1),
        ):
            with pytest.raises(AdapterNotFound):
                call()
    for of_alias in (registry.rollback, registry.delete_alias):
        with pytest.raises(AdapterNotFound):
            of_alias("acme", "support", name)
    with pytest.raises(TenantNotFound):
        registry.publish(name, "support", staged)


def test_an_unknown_tenant_cannot_publish(registry: AdapterRegistry, blobs: BlobStore, staged: StagedAdapter) -> None:
    with pytest.raises(TenantNotFound):
        registry.publish("initech", "support", staged)
    assert list(blobs.digests()) == []


@pytest.mark.parametrize("version", [0, -1, 2, 2**31, 2**70])
def test_an_alias_cannot_name_an_absent_version(registry: AdapterRegistry, staged: StagedAdapter, version: int) -> None:
    registry.publish("acme", "support", staged)
    with pytest.raises(AdapterNotFound):
        registry.set_alias("acme", "support", "default", version)
    assert registry.get("acme", "support").aliases == {"default": 1}


def test_rollback_goes_back_step_by_step(registry: AdapterRegistry, staged: StagedAdapter) -> None:
    for _ in range(3):
        registry.publish("acme", "support", staged)
    assert registry.rollback("acme", "support").version == 2
    assert registry.rollback("acme", "support").version == 1
    with pytest.raises(NoPreviousVersion):
        registry.rollback("acme", "support")
    registry.set_alias("acme", "support", "default", 3)
    assert registry.rollback("acme", "support").version == 1


def test_setting_an_alias_twice_to_one_version_is_one_step(registry: AdapterRegistry, staged: StagedAdapter) -> None:
    registry.publish("acme", "support", staged)
    registry.publish("acme", "support", staged)
    registry.set_alias("acme", "support", "default", 2)
    assert registry.rollback("acme", "support").version == 1


def test_rollback_of_an_absent_alias_is_not_found(registry: AdapterRegistry, staged: StagedAdapter) -> None:
    registry.publish("acme", "support", staged)
    with pytest.raises(AdapterNotFound):
        registry.rollback("acme", "support", "prod")


def test_an_aliased_version_cannot_be_deleted(registry: AdapterRegistry, staged: StagedAdapter) -> None:
    registry.publish("acme", "support", staged)
    registry.set_alias("acme", "support", "prod", 1)
    with pytest.raises(AliasInUse) as caught:
        registry.delete("acme", "support", 1)
    assert caught.value.aliases == ["default", "prod"]
    assert registry.resolve("acme", "acme/support").version == 1


def test_a_deleted_version_is_gone_with_its_bytes_and_its_number_stays_used(
    registry: AdapterRegistry, blobs: BlobStore, staged: StagedAdapter, other: StagedAdapter
) -> None:
    registry.publish("acme", "support", staged)
    registry.publish("acme", "support", other)
    registry.rollback("acme", "support")
    registry.delete("acme", "support", 2)
    with pytest.raises(AdapterNotFound):
        registry.resolve("acme", "acme/support:2")
    assert [version.version for version in registry.get("acme", "support").versions] == [1]
    assert blobs.exists(other.manifest.digest), "a request may still run with it"
    purge(registry)
    assert list(blobs.digests()) == [staged.manifest.digest]
    assert registry.publish("acme", "support", other).version == 3


def test_rollback_passes_over_a_deleted_version(registry: AdapterRegistry, staged: StagedAdapter) -> None:
    for _ in range(3):
        registry.publish("acme", "support", staged)
    registry.delete("acme", "support", 2)
    assert registry.rollback("acme", "support").version == 1


def test_deleting_keeps_bytes_that_another_version_shares(
    registry: AdapterRegistry, blobs: BlobStore, staged: StagedAdapter
) -> None:
    registry.publish("acme", "support", staged)
    registry.publish("acme", "support", staged)
    registry.delete("acme", "support", 1)
    purge(registry)
    assert blobs.local_path(registry.resolve("acme", "acme/support").digest).exists()


def test_concurrent_publishes_get_distinct_versions(registry: AdapterRegistry, staged: StagedAdapter) -> None:
    with ThreadPoolExecutor(8) as pool:
        published = list(pool.map(lambda _: registry.publish("acme", "support", staged), range(24)))
    assert sorted(version.version for version in published) == list(range(1, 25))
    info = registry.get("acme", "support")
    assert [version.version for version in info.versions] == list(range(1, 25))
    assert info.aliases == {"default": 24}


def test_a_version_that_is_ready_after_a_later_one_leaves_the_alias_there(
    registry: AdapterRegistry, staged: StagedAdapter
) -> None:
    def overtaken(version: AdapterVersion) -> VersionReport:
        registry.publish("acme", "support", staged)
        return VersionReport(passed=True, tested_at=0)

    assert registry.publish("acme", "support", staged, test=overtaken).version == 1
    info = registry.get("acme", "support")
    assert (info.aliases, [version.status for version in info.versions]) == ({"default": 2}, ["ready", "ready"])


def test_a_version_that_is_ready_after_a_later_ones_canary_leaves_the_canary(
    registry: AdapterRegistry, staged: StagedAdapter
) -> None:
    def overtaken(version: AdapterVersion) -> VersionReport:
        registry.publish("acme", "support", staged, alias="next")
        registry.set_alias("acme", "support", "default", 1, Canary(3, 10))
        return VersionReport(passed=True, tested_at=0)

    registry.publish("acme", "support", staged)
    assert registry.publish("acme", "support", staged, test=overtaken).version == 2
    info = registry.get("acme", "support")
    assert (info.aliases["default"], info.canaries["default"]) == (1, Canary(3, 10))


def test_publishing_and_deleting_one_blob_at_once_never_loses_it(
    registry: AdapterRegistry, blobs: BlobStore, staged: StagedAdapter, other: StagedAdapter
) -> None:
    def come_and_go(tenant: str) -> None:
        registry.publish(tenant, "support", other)
        for _ in range(8):
            version = registry.publish(tenant, "support", staged)
            assert blobs.local_path(version.digest).exists()
            registry.set_alias(tenant, "support", "default", 1)
            registry.delete(tenant, "support", version.version)
            purge(registry)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(come_and_go, ["acme", "globex"]))
    assert list(blobs.digests()) == [other.manifest.digest]


def _publish_often(url: str, blob_url: str, staged: StagedAdapter, tenant: str) -> list[int]:
    database = Database(url)
    registry = AdapterRegistry(database, BlobStore(blob_url))
    published = [registry.publish(tenant, "support", staged).version for _ in range(10)]
    database.dispose()
    return published


def test_processes_that_publish_at_once_get_distinct_versions(
    registry: AdapterRegistry, database: Database, blobs: BlobStore, staged: StagedAdapter
) -> None:
    url = database.engine.url.render_as_string(hide_password=False)
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(_publish_often, url, blobs.url, staged, "acme") for _ in range(3)]
        published = [version for each in running for version in each.result()]
    assert sorted(published) == list(range(1, 31))
    info = registry.get("acme", "support")
    assert [version.version for version in info.versions] == list(range(1, 31))
    assert info.aliases == {"default": 30}


def test_the_error_of_an_aliased_version_names_every_alias(registry: AdapterRegistry, staged: StagedAdapter) -> None:
    registry.publish("acme", "support", staged, alias="champion")
    assert registry.resolve("acme", "acme/support@champion").version == 1
    registry.set_alias("acme", "support", "prod", 1)
    with pytest.raises(AliasInUse, match=r"acme/support:1 is named by @champion, @prod\."):
        registry.delete("acme", "support", 1)


def test_a_deleted_alias_cannot_be_rolled_back_to_what_it_named(
    registry: AdapterRegistry, staged: StagedAdapter
) -> None:
    for _ in range(2):
        registry.publish("acme", "support", staged)
    registry.delete_alias("acme", "support", "default")
    with pytest.raises(AdapterNotFound):
        registry.rollback("acme", "support")
    registry.set_alias("acme", "support", "default", 2)
    with pytest.raises(NoPreviousVersion):
        registry.rollback("acme", "support")


def test_a_deleted_alias_names_nothing_and_its_version_stays(registry: AdapterRegistry, staged: StagedAdapter) -> None:
    registry.publish("acme", "support", staged)
    registry.delete_alias("acme", "support", "default")
    with pytest.raises(AdapterNotFound):
        registry.resolve("acme", "acme/support")
    assert registry.resolve("acme", "acme/support:1").version == 1
    with pytest.raises(AdapterNotFound):
        registry.delete_alias("acme", "support", "default")
    registry.delete("acme", "support", 1)


@pytest.mark.parametrize("name", ["support", "other"])  # a version of an adapter that is listed, or of a new one
@pytest.mark.parametrize("read", [2, 3, 4, 5])  # of those that a list takes
def test_what_is_published_while_a_list_is_read_is_in_it_whole_or_not_at_all(
    registry: AdapterRegistry, database: Database, staged: StagedAdapter, name: str, read: int
) -> None:
    registry.publish("acme", "support", staged)
    num_reads = 0

    def publish_between(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        nonlocal num_reads
        if statement.startswith("SELECT"):
            num_reads += 1
            if num_reads == read:
                registry.publish("acme", name, staged)

    before = registry.list("acme")
    event.listen(database.engine, "before_cursor_execute", publish_between)
    try:
        seen = registry.list("acme")
    finally:
        event.remove(database.engine, "before_cursor_execute", publish_between)
    assert num_reads > read, "nothing was published meanwhile"
    assert seen == before
    assert len(registry.get("acme", name).versions) == (2 if name == "support" else 1)
