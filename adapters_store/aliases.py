"""Aliases as rows: the version that each names, its canary, and what it named before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, insert, or_, select, update

from adapters_store.names import AdapterRef, is_name
from adapters_store.tables import adapter_versions, alias_history, aliases


@dataclass(frozen=True)
class Canary:
    """A second version behind an alias: it takes `percent` (1 to 100) of who asks for the alias."""

    version: int
    percent: int


CANARY_COLUMNS: Final = (aliases.c.canary_version, aliases.c.canary_percent)


def is_named(version: ColumnElement[int] | int) -> ColumnElement[bool]:
    """Whether an alias names the version, itself or as its canary."""
    return or_(aliases.c.version == version, aliases.c.canary_version == version)


def side_of(rows: Sequence[Row[Any]], alias: AdapterRef, caller: str | None) -> Row[Any]:
    """Of the versions behind an alias the one for this caller: always the same as long as the canary is.

    A larger share takes in others and keeps those that it has.
    """
    wanted, canary, percent = rows[0].named, rows[0].canary_version, rows[0].canary_percent
    if caller is not None and canary is not None:
        text = f"{alias.tenant}/{alias.name}@{alias.alias}:{canary}/{caller}"
        if int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100 < percent:
            wanted = canary
    return next(row for row in rows if row.version == wanted)


def point_alias(
    connection: Connection, adapter_id: int, alias: str, version: int, now: int, canary: Canary | None = None
) -> None:
    """Set an alias and remember it in the history."""
    set_alias(connection, adapter_id, alias, version, now, canary)
    values = {"adapter_id": adapter_id, "alias": alias, "version": version, "created_at": now}
    connection.execute(insert(alias_history).values(values))


def set_alias(
    connection: Connection, adapter_id: int, alias: str, version: int, now: int, canary: Canary | None = None
) -> None:
    """Point an alias, new or not, at a version and at a canary or none; the history is left alone."""
    is_alias = and_(aliases.c.adapter_id == adapter_id, aliases.c.alias == alias)
    values: dict[str, Any] = {
        "version": version,
        "canary_version": canary.version if canary is not None else None,
        "canary_percent": canary.percent if canary is not None else None,
        "updated_at": now,
    }
    if connection.execute(update(aliases).where(is_alias).values(values)).rowcount == 0:
        connection.execute(insert(aliases).values(adapter_id=adapter_id, alias=alias, **values))


def history_of(connection: Connection, adapter_id: int, alias: str) -> list[Row[Any]]:
    """What the alias named, newest first, with the versions' statuses."""
    if not is_name(alias):
        return []
    is_alias = and_(alias_history.c.adapter_id == adapter_id, alias_history.c.alias == alias)
    is_version = and_(
        adapter_versions.c.adapter_id == alias_history.c.adapter_id,
        adapter_versions.c.version == alias_history.c.version,
    )
    query = select(alias_history.c.id, alias_history.c.version, adapter_versions.c.status)
    query = query.join_from(alias_history, adapter_versions, is_version).where(is_alias)
    return list(connection.execute(query.order_by(alias_history.c.id.desc())))


def unwind_alias(connection: Connection, adapter_id: int, alias: str, to: Row[Any], now: int) -> None:
    """Take the history back to the row `to`, so that the next rollback goes further."""
    is_newer = and_(
        alias_history.c.adapter_id == adapter_id, alias_history.c.alias == alias, alias_history.c.id > to.id
    )
    connection.execute(delete(alias_history).where(is_newer))
    set_alias(connection, adapter_id, alias, to.version, now)


def remove_alias(connection: Connection, adapter_id: int, alias: str) -> bool:
    """Forget an alias and what it named before; whether there was one."""
    if not is_name(alias):
        return False
    removed = [
        connection.execute(delete(table).where(table.c.adapter_id == adapter_id, table.c.alias == alias)).rowcount
        for table in (alias_history, aliases)
    ]
    return removed[-1] == 1


def names_newer(connection: Connection, adapter_id: int, alias: str, version: int) -> bool:
    """Whether the alias names a version above this one, itself or as its canary."""
    is_alias = and_(aliases.c.adapter_id == adapter_id, aliases.c.alias == alias)
    is_newer = or_(aliases.c.version > version, aliases.c.canary_version > version)
    return connection.execute(select(aliases.c.version).where(is_alias, is_newer)).one_or_none() is not None


def has_canary(connection: Connection, adapter_id: int, alias: str) -> bool:
    """Whether part of the alias's requests go to a canary."""
    is_alias = and_(aliases.c.adapter_id == adapter_id, aliases.c.alias == alias)
    return connection.execute(select(aliases.c.canary_version).where(is_alias)).scalar_one_or_none() is not None


def drop_canary(connection: Connection, adapter_id: int, version: int) -> None:
    """Take the version away from every alias of which it is the canary."""
    is_canary = and_(aliases.c.adapter_id == adapter_id, aliases.c.canary_version == version)
    connection.execute(update(aliases).where(is_canary).values(canary_version=None, canary_percent=None))


def aliases_naming(connection: Connection, adapter_id: int, version: int) -> list[str]:
    """The aliases that name a version, itself or as their canary."""
    query = select(aliases.c.alias).where(aliases.c.adapter_id == adapter_id, is_named(version))
    return list(connection.scalars(query.order_by(aliases.c.alias)))
