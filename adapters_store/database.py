"""The metadata database: SQLite embedded, PostgreSQL for a cluster, both through SQLAlchemy."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DatabaseError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from adapters_store.errors import StoreUnavailable

_SQLITE_TIMEOUT_SECONDS = 30.0
_POSTGRESQL_OPTIONS = {  # libpq's: a server that is gone is noticed after seconds, not the system's quarter of an hour
    "connect_timeout": 10,  # s
    "keepalives_idle": 10,  # s
    "keepalives_interval": 5,  # s
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,  # ms
}
_WRITES = "patchbay_writes"


class Database:
    """One metadata database, named by an SQLAlchemy URL. Safe to use from any thread.

    A SQLite file is opened in WAL mode with full fsync; its folder is made when absent. A PostgreSQL server that does
    not answer a connection within 10 s, or is gone for 30, is unavailable; the URL's own options come first. No error's
    text has the values that were to be written, which are a tenant's.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine: Engine = _create_engine(url)

    def upgrade(self) -> None:
        """Bring the schema to the newest migration, in one transaction; several processes may do so at once.

        Raises `StoreUnavailable`.
        """
        config = _migrations()
        with self.write() as connection:
            self.lock(connection, "migrations")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the database itself, each with what to do about it. Raises `StoreUnavailable`."""
        with self.read() as connection:
            found, newest = MigrationContext.configure(connection).get_current_revision(), _newest_revision()
            if found != newest:
                advice = "`patchbay serve` brings an older one up to date; a newer one needs a newer Patchbay."
                return [(f"its schema is of revision {found}; this Patchbay has {newest}", advice)]
            if connection.dialect.name != "sqlite":
                return []
            texts = _check_sqlite(connection)
        return [(text, "Restore the database from a backup.") for text in texts if text != "ok"]

    @property
    def shown_url(self) -> str:
        """The URL without its password."""
        return self.engine.url.render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection for queries that change nothing. Raises `StoreUnavailable`."""
        with _unavailable(), self.engine.connect() as connection:
            if connection.dialect.name == "postgresql":  # where a transaction of reads promises no more than each read
                connection.execution_options(isolation_level="AUTOCOMMIT")  # and costs two more round trips
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """As `read`, for queries that must agree: all see what was committed before the first. Raises as it does."""
        with _unavailable(), self.engine.connect() as connection:
            if connection.dialect.name == "postgresql":  # SQLite's transactions always do so
                connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction: committed when the block ends, rolled back when it raises.

        Raises `StoreUnavailable`.
        SQLite takes its one write lock at the start, so a transaction never fails half way for being late.
        """
        with (
            _unavailable(),
            self.engine.connect().execution_options(**{_WRITES: True}) as connection,
            connection.begin(),
        ):
            yield connection

    def lock(self, connection: Connection, name: str) -> None:
        """Hold the lock `name` against others until this transaction ends (SQLite's write lock covers all)."""
        if connection.dialect.name == "postgresql":
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})

    def dispose(self) -> None:
        """Close all idle connections."""
        self.engine.dispose()


def _check_sqlite(connection: Connection) -> list[str]:
    checks = ("PRAGMA integrity_check", "PRAGMA foreign_key_check")
    try:
        return [" ".join(map(str, row)) for check in checks for row in connection.exec_driver_sql(check)]
    except OperationalError:
        raise
    except DatabaseError as error:
        return [str(error.orig)]


def _migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", "adapters_store:migrations")
    return config


def _newest_revision() -> str | None:
    return ScriptDirectory.from_config(_migrations()).get_current_head()


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError) as error:
        raise StoreUnavailable(f"the metadata database does not answer: {error.orig}") from error
    except PoolTimeoutError as error:
        raise StoreUnavailable("the metadata database does not answer: all connections to it are in use") from error


def _create_engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        libpq = parsed.get_driver_name().startswith("psycopg")
        options = {name: value for name, value in _POSTGRESQL_OPTIONS.items() if libpq and name not in parsed.query}
        return create_engine(parsed, pool_pre_ping=True, hide_parameters=True, connect_args=options)
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, connect_args={"timeout": _SQLITE_TIMEOUT_SECONDS}, hide_parameters=True)
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins no transactions by itself; `_begin_sqlite` does
    _use_wal(connection)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _use_wal(connection: sqlite3.Connection) -> None:
    """Set WAL mode, which the file keeps. SQLite refuses at once, not after its timeout, where others set it too."""
    gives_up_at = time.monotonic() + _SQLITE_TIMEOUT_SECONDS
    while True:
        try:
            return connection.execute("PRAGMA journal_mode=WAL").close()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > gives_up_at:
                raise
        time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
