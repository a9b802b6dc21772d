"""`patchbay store fsck` over a real folder: what it prints, what it removes, how it exits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from sqlalchemy import insert

from adapters_store.accounts import Accounts
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.tables import training_files
from gateway.cli import main

ORPHAN = hashlib.sha256(b"orphan").hexdigest()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A store that holds nothing but a blob that nothing names."""
    database = Database(f"sqlite:///{tmp_path / 'data' / 'patchbay.db'}")
    database.upgrade()
    Accounts(database).create_tenant("acme")
    database.dispose()
    (tmp_path / "orphan").write_bytes(b"orphan")
    BlobStore(f"file://{tmp_path / 'data' / 'blobs'}").put(ORPHAN, tmp_path / "orphan")
    return tmp_path / "data"


def lose_a_file(data: Path) -> None:
    database = Database(f"sqlite:///{data / 'patchbay.db'}")
    values = {"id": "file-1", "tenant": "acme", "filename": "x", "purpose": "fine-tune", "bytes": 1, "digest": "0" * 64}
    with database.write() as connection:
        connection.execute(insert(training_files).values(**values, status="processed", created_at=0))
    database.dispose()


def fsck(data: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["store", "fsck", "--data-dir", str(data), *options])
    return int(ended.value.code or 0)


def test_leftovers_are_told_and_removed_on_request(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fsck(data) == 0
    assert ORPHAN in capsys.readouterr().out
    assert fsck(data, "--repair") == 0
    assert "Removed." in capsys.readouterr().out
    assert fsck(data) == 0
    assert "Nothing is wrong" in capsys.readouterr().out


def test_damage_exits_with_1_and_stays_after_a_repair(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lose_a_file(data)
    assert fsck(data, "--repair", "--json") == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["num_damaged"] == 1
    assert [(f["kind"], f["removed"]) for f in answer["findings"]] == [("blob-missing", False), ("orphan-blob", True)]


def test_a_folder_without_a_database_is_refused_and_stays_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fsck(tmp_path / "nothing") == 3
    assert "There is no database" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
