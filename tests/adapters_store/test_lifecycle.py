"""A version's way from staged to purged, and the split of an alias between two versions."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, select

from adapters_store.accounts import Accounts
from adapters_store.aliases import Canary
from adapters_store.base_spec import BaseSpec
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.errors import (
    AdapterInvalid,
    AdapterNotFound,
    AliasInUse,
    NoPreviousVersion,
    RetestConflict,
    SelfTestFailed,
    StoreUnavailable,
    VersionNotReady,
)
from adapters_store.golden import GoldenPrompt
from adapters_store.registry import AdapterRegistry
from adapters_store.reports import VersionReport
from adapters_store.tables import adapter_versions
from adapters_store.upload import StagedAdapter, Staging
from adapters_store.versions import AdapterVersion

from .conftest import stage

PASSED = VersionReport(passed=True, tested_at=1, finite=True, largest_change=0.5)
BAD = VersionReport(passed=False, tested_at=1, reason="its logits are not finite", finite=False)


@pytest.fixture(autouse=True)
def _tenant(database: Database) -> None:
    Accounts(database).create_tenant("acme")


def test_while_it_is_tested_a_version_is_seen_and_not_called(registry: AdapterRegistry, staged: StagedAdapter) -> None:
    registry.publish("acme", "support", staged)

    def test(version: AdapterVersion) -> VersionReport:
        assert registry.resolve("acme", "acme/support").version == 1
        assert [v.status for v in registry.get("acme", "support").versions] == ["ready", "staged"]
        with pytest.raises(VersionNotReady, match="staged"):
            registry.resolve("acme", version.ref)
        with pytest.raises(VersionNotReady, match="staged"):
            registry.set_alias("acme", "support", "other", 2)
        return PASSED

    published = registry.publish("acme", "support", staged, test=test)
    assert (published.status, published.report) == ("ready", PASSED)
    assert registry.resolve("acme", "acme/support") == published


def test_what_fails_its_self_test_is_quarantined_with_the_report_and_moves_no_alias(
    registry: AdapterRegistry, blobs: BlobStore, staged: StagedAdapter, other: StagedAdapter
) -> None:
    registry.publish("acme", "support", staged)
    with pytest.raises(SelfTestFailed, match=r"acme/support:2 .* not finite") as caught:
        registry.publish("acme", "support", other, test=lambda _: BAD)
    assert caught.value.report == BAD
    info = registry.get("acme", "support")
    assert info.aliases == {"default": 1}
    assert [(v.status, v.report) for v in info.versions] == [("ready", None), ("quarantined", BAD)]
    assert blobs.exists(other.manifest.digest)
    with pytest.raises(VersionNotReady, match=r"quarantined \(its logits are not finite\)"):
        registry.resolve("acme", "acme/support:2")
    registry.delete("acme", "support", 2)
    assert len(registry.get("acme", "support").versions) == 1


@pytest.mark.parametrize("fails_in", ["test", "also"])
def test_of_a_publish_that_raises_nothing_is_left(
    registry: AdapterRegistry, blobs: BlobStore, staged: StagedAdapter, other: StagedAdapter, fails_in: str
) -> None:
    registry.publish("acme", "support", staged)

    def test(version: AdapterVersion) -> VersionReport:
        if fails_in == "test":
            raise StoreUnavailable("no replica")
        return PASSED

    def also(connection: Connection, version: AdapterVersion) -> None:
        raise StoreUnavailable("not now")

    with pytest.raises(StoreUnavailable):
        registry.publish("acme", "support", other, also=also, test=test)
    info = registry.get("acme", "support")
    assert (info.aliases, [v.version for v in info.versions], registry.retired()) == ({"default": 1}, [1], ())
    assert list(blobs.digests()) == [staged.manifest.digest]


def test_what_a_killed_gateway_left_staged_expires(
    registry: AdapterRegistry, blobs: BlobStore, staged: StagedAdapter
) -> None:
    left = registry._stage("acme", "support", staged)
    registry.expire(before=left.created_at)
    assert registry.get("acme", "support").versions == (left,), "its test may still run"
    registry.expire(before=left.created_at + 1)
    with pytest.raises(AdapterNotFound):
        registry.get("acme", "support")
    assert [version.ref for version in registry.retired()] == [left.ref]
    with pytest.raises(AdapterNotFound):  # its tester was slow, not gone
        registry._release(left, "default", PASSED, None)
    registry.purge(left)
    assert list(blobs.digests()) == []


def test_purging_touches_nothing_that_is_not_retired(
    registry: AdapterRegistry, blobs: BlobStore, staged: StagedAdapter
) -> None:
    version = registry.publish("acme", "support", staged)
    registry.purge(version)
    assert registry.resolve("acme", "acme/support") == version
    assert blobs.exists(version.digest)


def test_a_quarantined_version_keeps_its_alias_for_its_owner_to_roll_back(
    registry: AdapterRegistry, staged: StagedAdapter
) -> None:
    for _ in range(3):
        registry.publish("acme", "support", staged)
    assert registry.quarantine("acme/support:3", BAD)
    assert not registry.quarantine("acme/support:3", BAD), "once"
    with pytest.raises(VersionNotReady, match="roll the alias back"):
        registry.resolve("acme", "acme/support")
    assert registry.resolve("acme", "acme/support:2").version == 2
    assert registry.rollback("acme", "support").version == 2


def test_rollback_passes_over_what_is_quarantined(registry: AdapterRegistry, staged: StagedAdapter) -> None:
    for _ in range(3):
        registry.publish("acme", "support", staged)
    registry.quarantine("acme/support:2", BAD)
    assert registry.rollback("acme", "support").version == 1
    registry.quarantine("acme/support:1", BAD)
    registry.set_alias("acme", "support", "default", 3)
    with pytest.raises(NoPreviousVersion):
        registry.rollback("acme", "support")


@pytest.fixture
def split(registry: AdapterRegistry, staged: StagedAdapter) -> AdapterRegistry:
    """acme/support, whose default alias names version 2 with version 3 as a canary for 20 %."""
    for _ in range(3):
        registry.publish("acme", "support", staged)
    registry.set_alias("acme", "support", "default", 2, Canary(3, 20))
    return registry


def sides(registry: AdapterRegistry, callers: int = 50) -> dict[str, int]:
    """The version that each caller gets."""
    names = [f"user-{i}" for i in range(callers)]
    return {name: registry.resolve("acme", "acme/support", name).version for name in names}


def test_a_canary_gets_its_share_and_callers_stay_on_their_side(split: AdapterRegistry) -> None:
    assert split.get("acme", "support").canaries == {"default": Canary(3, 20)}
    first = sides(split, 1000)
    assert set(first.values()) == {2, 3}
    assert Counter(first.values())[3] / len(first) == pytest.approx(0.2, abs=0.05)
    assert sides(split, 1000) == first
    split.set_alias("acme", "support", "default", 2, Canary(3, 40))
    more = sides(split, 1000)
    assert all(more[name] == 3 for name, version in first.items() if version == 3)
    assert split.resolve("acme", "acme/support").version == 2, "without a caller the alias's own"


def test_all_may_get_the_canary_and_promoting_it_ends_the_split(split: AdapterRegistry) -> None:
    split.set_alias("acme", "support", "default", 2, Canary(3, 100))
    assert set(sides(split).values()) == {3}
    split.set_alias("acme", "support", "default", 3)
    assert split.get("acme", "support").canaries == {}
    assert set(sides(split).values()) == {3}


def test_rollback_drops_the_canary_first(split: AdapterRegistry) -> None:
    assert split.rollback("acme", "support").version == 2
    assert split.get("acme", "support").canaries == {}
    assert set(sides(split).values()) == {2}
    assert [split.rollback("acme", "support").version for _ in range(3)] == [3, 2, 1]


def test_a_canary_cannot_be_deleted_and_the_error_names_the_alias(split: AdapterRegistry) -> None:
    for version in (2, 3):
        with pytest.raises(AliasInUse, match="@default"):
            split.delete("acme", "support", version)
    split.rollback("acme", "support")
    split.delete("acme", "support", 3)


def test_a_quarantined_canary_is_dropped_at_once(split: AdapterRegistry) -> None:
    split.quarantine("acme/support:3", BAD)
    assert split.get("acme", "support").canaries == {}
    assert set(sides(split).values()) == {2}
    with pytest.raises(VersionNotReady):
        split.set_alias("acme", "support", "default", 2, Canary(3, 10))


AGAIN = VersionReport(passed=True, tested_at=2, finite=True, largest_change=0.7, num_golden=1)
WORSE = VersionReport(passed=False, tested_at=2, reason="golden prompt 1", finite=True)


def test_a_quarantined_version_that_passes_again_is_ready_and_no_alias_moves(
    registry: AdapterRegistry, staged: StagedAdapter, other: StagedAdapter
) -> None:
    registry.publish("acme", "support", staged)
    with pytest.raises(SelfTestFailed):
        registry.publish("acme", "support", other, test=lambda _: BAD)
    tested = registry.testable("acme", "support", 2)
    assert (tested.status, tested.report) == ("quarantined", BAD)
    recorded = registry.record_test(tested, AGAIN)
    assert (recorded.status, recorded.report) == ("ready", AGAIN)
    assert registry.resolve("acme", "acme/support:2") == recorded
    assert registry.get("acme", "support").aliases == {"default": 1}


def test_an_alias_that_names_a_quarantined_version_serves_it_once_it_passes(
    registry: AdapterRegistry, staged: StagedAdapter
) -> None:
    registry.publish("acme", "support", staged)
    registry.quarantine("acme/support:1", BAD)
    registry.record_test(registry.testable("acme", "support", 1), AGAIN)
    assert registry.resolve("acme", "acme/support").version == 1


def test_a_ready_version_that_fails_again_is_quarantined_and_dropped_as_a_canary(split: AdapterRegistry) -> None:
    for version in (2, 3):
        assert split.record_test(split.testable("acme", "support", version), WORSE).status == "quarantined"
    info = split.get("acme", "support")
    assert (info.aliases, info.canaries) == ({"default": 2}, {}), "the alias is left to its owner"
    assert [(v.status, v.report) for v in info.versions[1:]] == [("quarantined", WORSE)] * 2
    with pytest.raises(VersionNotReady, match="golden prompt 1"):
        split.resolve("acme", "acme/support")


def test_a_test_replaces_the_report_where_the_status_stays(registry: AdapterRegistry, staged: StagedAdapter) -> None:
    registry.publish("acme", "support", staged)
    assert registry.record_test(registry.testable("acme", "support", 1), AGAIN).status == "ready"
    assert registry.resolve("acme", "acme/support").report == AGAIN
    registry.quarantine("acme/support:1", BAD)
    assert registry.record_test(registry.testable("acme", "support", 1), WORSE).status == "quarantined"
    assert registry.get("acme", "support").versions[0].report == WORSE


def test_passing_does_not_lift_a_quarantine_that_came_while_the_test_ran(
    registry: AdapterRegistry, staged: StagedAdapter
) -> None:
    registry.publish("acme", "support", staged)
    while_ready = registry.testable("acme", "support", 1)
    registry.quarantine("acme/support:1", BAD)
    with pytest.raises(RetestConflict, match="quarantined anew"):
        registry.record_test(while_ready, AGAIN)
    while_bad = registry.testable("acme", "support", 1)
    registry.record_test(registry.testable("acme", "support", 1), WORSE)
    with pytest.raises(RetestConflict, match="quarantined anew"):
        registry.record_test(while_bad, AGAIN)
    assert registry.get("acme", "support").versions[0].report == WORSE


def test_of_two_tests_at_once_both_that_pass_count_and_so_does_one_that_fails(
    registry: AdapterRegistry, staged: StagedAdapter
) -> None:
    registry.publish("acme", "support", staged)
    registry.quarantine("acme/support:1", BAD)
    first, second, third = (registry.testable("acme", "support", 1) for _ in range(3))
    assert registry.record_test(first, PASSED).status == "ready"
    assert registry.record_test(second, AGAIN).report == AGAIN
    assert registry.record_test(third, WORSE).status == "quarantined"


def test_what_was_deleted_while_it_was_tested_stays_deleted(registry: AdapterRegistry, staged: StagedAdapter) -> None:
    for _ in range(2):
        registry.publish("acme", "support", staged)
    tested = registry.testable("acme", "support", 1)
    registry.delete("acme", "support", 1)
    for report in (AGAIN, WORSE):
        with pytest.raises(AdapterNotFound, match="acme/support:1"):
            registry.record_test(tested, report)
    assert [version.report for version in registry.retired()] == [None]


def test_only_what_is_listed_and_not_staged_is_tested_again(registry: AdapterRegistry, staged: StagedAdapter) -> None:
    for _ in range(2):
        registry.publish("acme", "support", staged)
    registry.delete("acme", "support", 1)
    for version in (0, 1, 9, 1 << 40):
        with pytest.raises(AdapterNotFound, match=f"acme/support:{version}"):
            registry.testable("acme", "support", version)
    with pytest.raises(AdapterNotFound, match="'acme/absent'"):
        registry.testable("acme", "absent", 1)
    left = registry._stage("acme", "support", staged)
    with pytest.raises(RetestConflict, match="being tested by its upload"):
        registry.testable("acme", "support", left.version)


def test_publishing_to_an_alias_drops_its_canary(split: AdapterRegistry, staged: StagedAdapter) -> None:
    split.publish("acme", "support", staged)
    assert set(sides(split).values()) == {4}


def test_golden_prompts_come_with_the_upload(staging: Staging, adapter: Path, base: BaseSpec) -> None:
    (adapter / "golden.json").write_text('[{"prompt": "2 + 2 =", "completion": " 4"}]')
    staged = stage(staging, adapter, base)
    assert staged.golden == (GoldenPrompt(prompt="2 + 2 =", completion=" 4"),)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{", None),
        ("{}", None),
        ('[{"prompt": "a"}]', "0.completion"),
        ('[{"prompt": "a", "completion": 4}]', "0.completion"),
        ('[{"prompt": "a", "completion": ""}]', "0.completion"),
        ('[{"prompt": "a", "completion": "b", "url": "x"}]', "0.url"),
        ("[" * 100_000, None),
        ("[" + ", ".join(['{"prompt": "a", "completion": "b"}'] * 17) + "]", None),
    ],
)
def test_bad_golden_prompts_are_refused_by_field(
    staging: Staging, adapter: Path, base: BaseSpec, text: str, field: str | None
) -> None:
    (adapter / "golden.json").write_text(text)
    with pytest.raises(AdapterInvalid) as caught:
        stage(staging, adapter, base)
    assert (caught.value.file, caught.value.field) == ("golden.json", field)


PROMPTS = (
    GoldenPrompt(prompt="2 + 2 =", completion=" 4"),
    GoldenPrompt(prompt="'\0 \u2603 \U0001f600\n" + 8000 * "x", completion='"'),
)


def test_golden_prompts_are_kept_with_their_version_and_not_in_its_bytes(
    registry: AdapterRegistry, blobs: BlobStore, staged: StagedAdapter
) -> None:
    uploads = PROMPTS, (), PROMPTS[:1]
    kept = [registry.publish("acme", "support", replace(staged, golden=golden)) for golden in uploads]
    assert tuple(map(registry.golden, kept)) == uploads
    assert list(blobs.digests()) == [staged.manifest.digest]
    assert registry.get("acme", "support").versions == tuple(kept)


def test_a_version_that_is_quarantined_or_tested_again_keeps_its_golden_prompts(
    registry: AdapterRegistry, staged: StagedAdapter
) -> None:
    with pytest.raises(SelfTestFailed):
        registry.publish("acme", "support", replace(staged, golden=PROMPTS), test=lambda _: BAD)
    for report in (AGAIN, WORSE):
        registry.record_test(registry.testable("acme", "support", 1), report)
        assert registry.golden(registry.testable("acme", "support", 1)) == PROMPTS


def test_golden_prompts_go_with_their_version(
    registry: AdapterRegistry, database: Database, staged: StagedAdapter
) -> None:
    for golden in (PROMPTS, ()):
        registry.publish("acme", "support", replace(staged, golden=golden))
    deleted = registry.testable("acme", "support", 1)
    registry.delete("acme", "support", 1)
    assert registry.golden(deleted) == ()
    registry.purge(deleted)
    with database.read() as connection:
        assert connection.execute(select(adapter_versions.c.golden)).scalars().all() == [None]


def downgrade(database: Database, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", "adapters_store:migrations")
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def test_versions_of_the_first_schema_are_ready_in_the_second(
    sqlite: Database, blobs: BlobStore, staged: StagedAdapter
) -> None:
    registry = AdapterRegistry(sqlite, blobs)
    Accounts(sqlite).create_tenant("initech")
    registry.publish("initech", "support", staged)
    downgrade(sqlite, "0001")
    sqlite.upgrade()
    assert registry.resolve("initech", "initech/support").status == "ready"


def test_versions_of_a_schema_without_golden_prompts_have_none(
    registry: AdapterRegistry, database: Database, staged: StagedAdapter
) -> None:
    before = registry.publish("acme", "support", replace(staged, golden=PROMPTS))
    downgrade(database, "0003")
    database.upgrade()
    assert (registry.resolve("acme", "acme/support"), registry.golden(before)) == (before, ())
    after = registry.publish("acme", "support", replace(staged, golden=PROMPTS))
    assert registry.golden(after) == PROMPTS
