"""The schema: migrations make exactly the tables that the code declares, whoever runs them and how often."""

from __future__ import annotations

import socket
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, insert, select
from sqlalchemy.exc import IntegrityError

from adapters_store import database as database_module
from adapters_store.accounts import Accounts
from adapters_store.database import Database
from adapters_store.errors import StoreUnavailable
from adapters_store.tables import adapters, metadata, tenants


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database without tables."""
    if request.param == "postgresql":
        yield request.getfixturevalue("postgresql")
        return
    database = Database(f"sqlite:///{tmp_path / 'new' / 'patchbay.db'}")
    yield database
    database.dispose()


def test_migrations_make_the_declared_tables(empty: Database) -> None:
    empty.upgrade()
    with empty.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_upgrading_again_changes_nothing(empty: Database) -> None:
    empty.upgrade()
    Accounts(empty).create_tenant("acme")
    empty.upgrade()
    assert [tenant.id for tenant in Accounts(empty).list_tenants()] == ["acme"]


def test_several_processes_may_upgrade_at_once(empty: Database) -> None:
    databases = [Database(empty.engine.url.render_as_string(hide_password=False)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Database.upgrade, databases))
    for database in databases:
        database.dispose()
    assert Accounts(empty).list_tenants() == []


def test_a_file_that_another_writes_in_its_old_journal_mode_is_waited_for(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "old.db", isolation_level=None)) as other, ThreadPoolExecutor(1) as pool:
        other.execute("CREATE TABLE old (x)")
        other.execute("BEGIN IMMEDIATE")  # from here on WAL mode is refused at once
        opening = pool.submit(_journal_mode, Database(f"sqlite:///{tmp_path}/old.db"))
        time.sleep(0.1)
        assert not opening.done()
        other.execute("COMMIT")
        assert opening.result(timeout=10) == "wal"


def _journal_mode(database: Database) -> str:
    with database.read() as connection:
        mode = str(connection.exec_driver_sql("PRAGMA journal_mode").scalar_one())
    database.dispose()
    return mode


def test_foreign_keys_are_enforced(database: Database) -> None:
    values = {"tenant": "nobody", "name": "x", "last_version": 0, "created_at": 0}
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(insert(adapters).values(values))


def test_no_errors_text_has_what_was_to_be_written(database: Database) -> None:
    values = {"tenant": "nobody", "name": "a tenant's text", "last_version": 0, "created_at": 0}
    with pytest.raises(IntegrityError) as caught, database.write() as connection:
        connection.execute(insert(adapters).values(values))
    assert "a tenant's text" not in str(caught.value)


def test_a_write_that_raises_leaves_nothing(database: Database) -> None:
    def fail() -> None:
        with database.write() as connection:
            connection.execute(insert(tenants).values(id="acme", created_at=0))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with database.read() as connection:
        assert connection.execute(select(tenants)).all() == []


def test_commits_are_durable_and_readers_do_not_wait(sqlite: Database) -> None:
    with sqlite.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL
    with sqlite.write() as writer, sqlite.read() as reader:
        writer.execute(insert(tenants).values(id="acme", created_at=0))
        assert reader.execute(select(tenants)).all() == []


def test_a_database_that_cannot_be_opened_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(StoreUnavailable):
        Database(f"sqlite:///{tmp_path / 'folder.db'}").upgrade()


def test_a_postgresql_server_that_does_not_answer_is_unavailable_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(database_module._POSTGRESQL_OPTIONS, "connect_timeout", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        database = Database(f"postgresql+psycopg://someone@127.0.0.1:{silent.getsockname()[1]}/patchbay")
        with pytest.raises(StoreUnavailable, match="does not answer"), database.read():
            pass
    database.dispose()


def test_a_database_whose_connections_are_all_in_use_is_unavailable(database: Database) -> None:
    database.dispose()
    database.engine = create_engine(database.engine.url, pool_size=1, max_overflow=0, pool_timeout=0.01)
    for use in (database.read, database.snapshot, database.write):
        with database.read(), pytest.raises(StoreUnavailable, match="in use"), use():
            pass
    database.dispose()


def test_a_snapshot_sees_nothing_that_is_written_after_its_first_read(database: Database) -> None:
    accounts, query = Accounts(database), select(tenants.c.id)
    with database.snapshot() as connection:
        assert connection.execute(query).all() == []
        accounts.create_tenant("acme")
        assert connection.execute(query).all() == []
    with database.snapshot() as connection:
        assert connection.execute(query).all() == [("acme",)]
