"""Tenants and their API keys: made once, stored hashed, revocable at once."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import time
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from sqlalchemy import Connection, Row, Select, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from adapters_store.database import Database
from adapters_store.errors import KeyNotFound, TenantExists, TenantNotFound
from adapters_store.names import check_name, is_id, is_name
from adapters_store.tables import api_keys, tenants

Role = Literal["tenant", "admin"]

_BASE62: Final = string.digits + string.ascii_letters
_KEY: Final = re.compile(r"pb_([0-9A-Za-z]{8})_([0-9A-Za-z]{43})", re.ASCII)
_NO_ID: Final = "-" * 8
_NO_HASH: Final = "0" * 64


@dataclass(frozen=True)
class Tenant:
    """One customer. `max_rank` is its largest adapter rank; None takes the deployment's default."""

    id: str
    max_rank: int | None
    created_at: int


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key after it was made; `tenant` is None for an admin key. Times in unix seconds."""

    id: str
    tenant: str | None
    role: Role
    created_at: int
    revoked_at: int | None


@dataclass(frozen=True)
class Principal:
    """Who makes a call. An admin has no tenant."""

    tenant: str | None
    role: Role
    max_rank: int | None
    key_id: str


class Accounts:
    """Tenants and keys in the metadata database. Every method may raise `StoreUnavailable`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create_tenant(self, tenant: str, max_rank: int | None = None) -> Tenant:
        """Add a tenant. Raises `InvalidName` or `TenantExists`."""
        check_name("tenant", tenant)
        created = Tenant(tenant, max_rank, int(time.time()))
        values = {"id": tenant, "max_rank": max_rank, "created_at": created.created_at}
        try:
            with self._database.write() as connection:
                connection.execute(insert(tenants).values(values))
        except IntegrityError:
            raise TenantExists(tenant) from None
        return created

    def list_tenants(self) -> list[Tenant]:
        """All tenants, by id."""
        with self._database.read() as connection:
            return [Tenant(*row) for row in connection.execute(select(tenants).order_by(tenants.c.id))]

    def get_tenant(self, tenant: str) -> Tenant:
        """One tenant. Raises `TenantNotFound`."""
        if not is_name(tenant):
            raise TenantNotFound(tenant)
        with self._database.read() as connection:
            row = connection.execute(select(tenants).where(tenants.c.id == tenant)).one_or_none()
        if row is None:
            raise TenantNotFound(tenant)
        return Tenant(*row)

    def create_key(self, tenant: str | None, role: Role = "tenant") -> str:
        """Make a key and return its text, which is stored nowhere. Raises `TenantNotFound`.

        An admin key has no tenant; a tenant's key must name one.
        """
        if (tenant is None) != (role == "admin") or not (tenant is None or is_name(tenant)):
            raise TenantNotFound(tenant or "")
        try:
            with self._database.write() as connection:
                return _insert_key(connection, tenant, role)
        except IntegrityError:
            raise TenantNotFound(tenant or "") from None

    def create_first_admin_key(self) -> str | None:
        """Make an admin key when no live one exists, else return None; several processes may ask at once."""
        with self._database.write() as connection:
            self._database.lock(connection, "first admin key")
            if connection.execute(_live_admin_keys()).scalar_one():
                return None
            return _insert_key(connection, None, "admin")

    def list_keys(self, tenant: str | None = None) -> list[ApiKey]:
        """Keys, oldest first, revoked ones too: of one tenant, or all."""
        query = select(*_KEY_COLUMNS).order_by(api_keys.c.created_at, api_keys.c.id)
        if tenant is not None:
            query = query.where(api_keys.c.tenant == tenant)
        with self._database.read() as connection:
            return [ApiKey(*row) for row in connection.execute(query)]

    def revoke_key(self, key_id: str) -> None:
        """Make a key useless from the next call on; revoking twice is harmless. Raises `KeyNotFound`."""
        if not is_id(key_id):
            raise KeyNotFound(key_id)
        revoked_at = func.coalesce(api_keys.c.revoked_at, int(time.time()))
        statement = update(api_keys).where(api_keys.c.id == key_id).values(revoked_at=revoked_at)
        with self._database.write() as connection:
            if connection.execute(statement).rowcount == 0:
                raise KeyNotFound(key_id)

    def authenticate(self, key: str) -> Principal | None:
        """Who owns a key, or None for one that is unknown, malformed or revoked.

        Every case does the same work: one query, one hash, one constant-time comparison.
        """
        match = _KEY.fullmatch(key)
        row = self._find_key(match[1] if match else _NO_ID)
        same = hmac.compare_digest(_hash(key if match else _NO_ID), row.hash if row else _NO_HASH)
        if row is None or not same or row.revoked_at is not None:
            return None
        return Principal(row.tenant, cast("Role", row.role), row.max_rank, row.id)

    def _find_key(self, key_id: str) -> Row[Any] | None:
        query = (
            select(api_keys, tenants.c.max_rank)
            .join(tenants, tenants.c.id == api_keys.c.tenant, isouter=True)
            .where(api_keys.c.id == key_id)
        )
        with self._database.read() as connection:
            return connection.execute(query).one_or_none()


_KEY_COLUMNS: Final = (
    api_keys.c.id,
    api_keys.c.tenant,
    api_keys.c.role,
    api_keys.c.created_at,
    api_keys.c.revoked_at,
)


def _live_admin_keys() -> Select[Any]:
    live = (api_keys.c.role == "admin") & api_keys.c.revoked_at.is_(None)
    return select(func.count()).select_from(api_keys).where(live)


def _insert_key(connection: Connection, tenant: str | None, role: Role) -> str:
    key_id, secret = _random(8), _random(43)
    key = f"pb_{key_id}_{secret}"
    values = {
        "id": key_id,
        "tenant": tenant,
        "role": role,
        "hash": _hash(key),
        "created_at": int(time.time()),
    }
    connection.execute(insert(api_keys).values(values))
    return key


def _random(length: int) -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(length))


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
