"""`StoreCheck`: each damage is found and named, what nobody names is removed, and a sound store is left alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, insert, text, update

from adapters_store.accounts import Accounts
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.fsck import Finding, StoreCheck
from adapters_store.golden import GoldenPrompt
from adapters_store.registry import AdapterRegistry
from adapters_store.reports import VersionReport
from adapters_store.tables import adapter_versions, adapters, alias_history, aliases, training_files
from adapters_store.tags import AdapterTags
from adapters_store.upload import StagedAdapter, Staging
from adapters_store.versions import AdapterVersion


@pytest.fixture
def check(
    database: Database, registry: AdapterRegistry, blobs: BlobStore, staged: StagedAdapter, tmp_path: Path
) -> StoreCheck:
    """Of a store with two versions of acme/support that share their bytes."""
    Accounts(database).create_tenant("acme")
    for _ in range(2):
        registry.publish("acme", "support", staged)
    return StoreCheck(database, blobs, tmp_path / "staging")


def found(check: StoreCheck) -> list[tuple[str, str]]:
    return [(finding.kind, finding.subject) for finding in check.findings()]


def blob_path(blobs: BlobStore, staged: StagedAdapter) -> Path:
    return blobs.local_path(staged.manifest.digest)


def test_a_sound_store_has_no_findings_and_is_read_whole(check: StoreCheck, staged: StagedAdapter) -> None:
    read: list[int] = []
    assert list(check.findings(read.append)) == []
    assert sum(read) == staged.manifest.size_bytes  # the shared blob once


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda path: path.unlink(), "blob-missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "blob-damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "blob-damaged"),
        (lambda path: path.write_bytes(b""), "blob-damaged"),
    ],
)
def test_bytes_that_are_gone_or_changed_are_named_for_each_version(
    check: StoreCheck, blobs: BlobStore, staged: StagedAdapter, spoil: Callable[[Path], Any], kind: str
) -> None:
    spoil(blob_path(blobs, staged))
    findings = list(check.findings())
    assert {(finding.kind, finding.subject) for finding in findings} == {(kind, f"acme/support:{n}") for n in (1, 2)}
    assert all(staged.manifest.digest in finding.problem and finding.advice for finding in findings)
    assert not any(map(check.repair, findings)), "repair touches nothing that is named"
    blobs.put(staged.manifest.digest, staged.path)  # as the advice says
    assert found(check) == []


def set_manifest(connection: Connection, staged: StagedAdapter, **changes: Any) -> None:
    manifest = {**staged.manifest.model_dump(mode="json"), **changes}
    connection.execute(update(adapter_versions).where(adapter_versions.c.version == 2).values(manifest=manifest))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"size_bytes": 1}, "size"),
        ({"digest": "0" * 64}, "digest"),
        ({"base_fingerprint": "0" * 64}, "spec"),
        ({"deltas": 3}, "cannot be read"),
    ],
)
def test_a_manifest_that_differs_from_its_bytes_is_named(
    check: StoreCheck, database: Database, staged: StagedAdapter, change: dict[str, Any], word: str
) -> None:
    with database.write() as connection:
        set_manifest(connection, staged, **change)
    (finding,) = check.findings()
    assert (finding.kind, finding.subject) == ("manifest", "acme/support:2")
    assert word in finding.problem


@pytest.mark.parametrize("damaged", ['[{"prompt": "a"}]', "3"])
def test_golden_prompts_that_cannot_be_read_are_named(
    check: StoreCheck, registry: AdapterRegistry, database: Database, staged: StagedAdapter, damaged: str
) -> None:
    for _ in range(2):
        golden = (GoldenPrompt(prompt="2 + 2 =", completion=" 4"),)
        registry.publish("acme", "support", replace(staged, golden=golden))
    assert found(check) == []
    with database.write() as connection:
        is_last = adapter_versions.c.version == 4
        connection.execute(update(adapter_versions).where(is_last).values(golden=json.loads(damaged)))
    assert found(check) == [("golden-prompts", "acme/support:4")]


def test_names_of_versions_that_do_not_exist_are_named(check: StoreCheck, database: Database) -> None:
    with database.write() as connection:
        connection.execute(insert(aliases).values(adapter_id=1, alias="prod", version=9, updated_at=0))
        connection.execute(insert(alias_history).values(adapter_id=1, alias="old", version=8, created_at=0))
        connection.execute(update(adapters).values(last_version=1))
    assert sorted(found(check)) == [
        ("dangling-name", "acme/support@old"),
        ("dangling-name", "acme/support@prod"),
        ("version-number", "acme/support"),
    ]


def test_the_bytes_of_training_files_are_checked_too(check: StoreCheck, database: Database) -> None:
    values = {"tenant": "acme", "filename": "x", "purpose": "fine-tune", "bytes": 1, "digest": "0" * 64}
    with database.write() as connection:
        connection.execute(insert(training_files).values(id="file-1", status="processed", created_at=0, **values))
        connection.execute(insert(training_files).values(id="file-2", status="uploaded", created_at=0, **values))
    assert sorted(found(check)) == [("blob-missing", "file-1"), ("unfinished-file", "file-2")]
    assert [check.repair(finding) for finding in check.findings() if finding.is_leftover] == [True]
    assert found(check) == [("blob-missing", "file-1")]


def test_leftovers_are_found_and_repair_removes_them_alone(
    check: StoreCheck, blobs: BlobStore, staged: StagedAdapter, other: StagedAdapter, tmp_path: Path
) -> None:
    blobs.put(other.manifest.digest, other.path)
    part = blob_path(blobs, staged).with_name(".tmp-killed")
    part.touch()
    with Staging(tmp_path / "staging"):  # one that runs
        killed = tmp_path / "staging" / "0123456789abcdef"
        killed.mkdir()
        killed.with_suffix(".lock").touch()
        findings = list(check.findings())
        assert {finding.kind for finding in findings} == {"orphan-blob", "unfinished-blob", "abandoned-upload"}
        assert all(finding.is_leftover and check.repair(finding) for finding in findings)
        assert found(check) == []
        assert len(list((tmp_path / "staging").iterdir())) == 2
    assert list(blobs.digests()) == [staged.manifest.digest]


def test_what_came_to_be_named_is_not_removed(
    check: StoreCheck, blobs: BlobStore, registry: AdapterRegistry, other: StagedAdapter
) -> None:
    blobs.put(other.manifest.digest, other.path)
    (orphan,) = check.findings()
    registry.publish("acme", "support", other)
    assert not check.repair(orphan)
    assert found(check) == []


def test_a_version_deleted_while_it_is_checked_is_no_damage(
    check: StoreCheck, registry: AdapterRegistry, other: StagedAdapter
) -> None:
    registry.publish("acme", "support", other, alias="canary")
    registry.set_alias("acme", "support", "canary", 1)
    findings: list[Finding] = []

    def delete_it(_: int) -> None:  # told of the first blob's bytes, it takes the other's version away
        if not findings:
            findings.append(Finding("", "", "", ""))
            registry.delete("acme", "support", 3)

    assert list(check.findings(delete_it)) == []


def test_the_tags_of_a_version_that_never_came_to_be_ready_are_no_damage(
    check: StoreCheck, registry: AdapterRegistry, database: Database, staged: StagedAdapter
) -> None:
    def tag(version: AdapterVersion) -> None:
        AdapterTags(database).set("acme", "support", "a", "b", version.version)

    def give_up(version: AdapterVersion) -> VersionReport:
        tag(version)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        registry.publish("acme", "support", staged, test=give_up)
    assert found(check) == []
    left = registry._stage("acme", "support", staged)
    tag(left)
    registry.expire(before=left.created_at + 1)
    registry.purge(left)
    assert found(check) == []


def test_a_damaged_database_file_is_named(sqlite: Database, blobs: BlobStore, tmp_path: Path) -> None:
    with sqlite.write() as connection:
        connection.execute(text("PRAGMA defer_foreign_keys = ON"))
    path = Path(sqlite.engine.url.database or "")
    sqlite.dispose()
    page = 4096
    with path.open("r+b") as file:  # an inner page of the file
        file.seek(5 * page)
        file.write(os.urandom(page))
    (first, *_) = StoreCheck(sqlite, blobs, tmp_path / "staging").findings()
    assert first.kind == "database"


def test_an_older_schema_is_named_and_nothing_else_is_looked_at(tmp_path: Path, blobs: BlobStore) -> None:
    database = Database(f"sqlite:///{tmp_path / 'empty.db'}")
    (finding,) = StoreCheck(database, blobs, tmp_path / "staging").findings()
    assert (finding.kind, finding.is_leftover) == ("database", False)
    assert "serve" in finding.advice
    json.dumps(finding.to_json())
    database.dispose()
