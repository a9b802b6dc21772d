"""Tags of adapters and versions (MLflow's): texts under keys, which may change while versions do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, func, insert, select, update

from adapters_store.database import Database
from adapters_store.errors import InvalidTag
from adapters_store.tables import adapter_tags, adapters, version_tags
from adapters_store.versions import find_version, lock_adapter

MAX_KEY: Final = 250
MAX_VALUE: Final = 5000
MAX_TAGS: Final = 100

Tags = Mapping[str, str]


class AdapterTags:
    """Sets and deletes tags, of an adapter or of one of its versions. Every method may raise `StoreUnavailable`.

    The registry's `list` and `get` show them.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def set(self, tenant: str, name: str, key: str, value: str, version: int | None = None) -> None:
        """Put `value` under `key`, whatever was there. Raises `InvalidTag` or `AdapterNotFound`."""
        _check(key, value)
        with self._database.write() as connection:
            table, owner = _find_owner(connection, tenant, name, version)
            is_tag = and_(_is(table, owner), table.c.key == key)
            if connection.execute(update(table).where(is_tag).values(value=value)).rowcount:
                return
            count = select(func.count()).select_from(table).where(_is(table, owner))
            if connection.execute(count).scalar_one() >= MAX_TAGS:
                raise InvalidTag(f"it has {MAX_TAGS} tags already; delete one first", "key")
            connection.execute(insert(table).values(**owner, key=key, value=value))

    def delete(self, tenant: str, name: str, key: str, version: int | None = None) -> None:
        """Remove a tag; one that is absent is no error. Raises `AdapterNotFound`."""
        with self._database.write() as connection:
            table, owner = _find_owner(connection, tenant, name, version)
            if _is_key(key):
                connection.execute(delete(table).where(_is(table, owner), table.c.key == key))


def tags_of_adapters(connection: Connection, is_wanted: ColumnElement[bool]) -> dict[str, dict[str, str]]:
    """Tags by the adapters' names, of a tenant's adapters that `is_wanted` picks."""
    query = _joined(adapter_tags, adapters.c.name).where(is_wanted)
    tags: dict[str, dict[str, str]] = {}
    for row in connection.execute(query):
        tags.setdefault(row.name, {})[row.key] = row.value
    return tags


def tags_of_versions(connection: Connection, is_wanted: ColumnElement[bool]) -> dict[str, dict[int, dict[str, str]]]:
    """Tags by the adapters' names and the versions, of a tenant's adapters that `is_wanted` picks."""
    query = _joined(version_tags, adapters.c.name, version_tags.c.version).where(is_wanted)
    tags: dict[str, dict[int, dict[str, str]]] = {}
    for row in connection.execute(query):
        tags.setdefault(row.name, {}).setdefault(row.version, {})[row.key] = row.value
    return tags


def _joined(table: Table, *columns: Any) -> Any:
    query = select(*columns, table.c.key, table.c.value).join_from(table, adapters, adapters.c.id == table.c.adapter_id)
    return query.order_by(table.c.key)


def _find_owner(connection: Connection, tenant: str, name: str, version: int | None) -> tuple[Table, dict[str, int]]:
    """The table, and the values that stand for the adapter or version, whose row is locked: it does not go away."""
    adapter_id = lock_adapter(connection, tenant, name)
    if version is None:
        return adapter_tags, {"adapter_id": adapter_id}
    find_version(connection, tenant, name, version)
    return version_tags, {"adapter_id": adapter_id, "version": version}


def _is(table: Table, owner: Mapping[str, int]) -> ColumnElement[bool]:
    return and_(*(table.c[column] == value for column, value in owner.items()))


def _is_key(text: str) -> bool:
    return 0 < len(text) <= MAX_KEY and text.isprintable()


def _check(key: str, value: str) -> None:
    if not _is_key(key):
        raise InvalidTag(f"a key has 1 to {MAX_KEY} printable characters", "key")
    if len(value) > MAX_VALUE or "\0" in value:
        raise InvalidTag(f"a value has at most {MAX_VALUE:,} characters, none of them NUL", "value")
