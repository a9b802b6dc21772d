"""Keys: shown once, stored hashed, revoked at once; every failure looks and costs the same."""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
from pathlib import Path

import pytest

from adapters_store.accounts import Accounts, Principal
from adapters_store.database import Database
from adapters_store.errors import InvalidName, KeyNotFound, TenantExists, TenantNotFound


@pytest.fixture
def accounts(database: Database) -> Accounts:
    accounts = Accounts(database)
    accounts.create_tenant("acme", max_rank=32)
    return accounts


def test_a_key_authenticates_its_tenant(accounts: Accounts) -> None:
    key = accounts.create_key("acme")
    assert accounts.authenticate(key) == Principal("acme", "tenant", 32, key[3:11])


def test_an_admin_key_has_no_tenant(accounts: Accounts) -> None:
    principal = accounts.authenticate(accounts.create_key(None, "admin"))
    assert principal is not None
    assert (principal.tenant, principal.role) == (None, "admin")


def test_a_revoked_key_fails_from_the_next_call_on(accounts: Accounts) -> None:
    key = accounts.create_key("acme")
    kept = accounts.create_key("acme")
    accounts.revoke_key(key[3:11])
    accounts.revoke_key(key[3:11])
    assert accounts.authenticate(key) is None
    assert accounts.authenticate(kept) is not None


def test_revocation_reaches_other_processes_at_once(accounts: Accounts, database: Database) -> None:
    key = accounts.create_key("acme")
    another = Accounts(Database(database.url))
    assert another.authenticate(key) is not None
    accounts.revoke_key(key[3:11])
    assert another.authenticate(key) is None


def test_wrong_keys_fail(accounts: Accounts) -> None:
    key = accounts.create_key("acme")
    swapped = key[:-1] + ("a" if key[-1] != "a" else "b")
    near = [swapped, key[:-1], key + "a", key.upper(), f" {key}", f"{key}\n", key.replace("pb_", "pb-")]
    for wrong in [*near, "", "pb_", "pb_--------_" + "a" * 43, "sk-abc", "\u0660" * 55, "'; DROP TABLE api_keys; --"]:
        assert accounts.authenticate(wrong) is None


def test_the_key_itself_is_stored_nowhere(sqlite: Database) -> None:
    accounts = Accounts(sqlite)
    accounts.create_tenant("acme")
    key = accounts.create_key("acme")
    path = Path(sqlite.url.removeprefix("sqlite:///"))
    sqlite.dispose()
    sqlite3.connect(path).execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
    stored = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert key[12:].encode() not in stored
    assert hashlib.sha256(key.encode()).hexdigest().encode() in stored


def test_every_answer_costs_one_hash_and_one_constant_time_comparison(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, revoked = accounts.create_key("acme"), accounts.create_key("acme")
    accounts.revoke_key(revoked[3:11])
    calls: list[int] = []
    compare = hmac.compare_digest

    def counted(a: str, b: str) -> bool:
        calls.append(len(a))
        assert len(a) == len(b)
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    for attempt in (key, revoked, key[:-1] + "!", "pb_aaaaaaaa_" + "a" * 43, "nonsense"):
        accounts.authenticate(attempt)
    assert calls == [64] * 5


def test_keys_are_unlike_each_other(accounts: Accounts) -> None:
    keys = {accounts.create_key("acme") for _ in range(50)}
    assert len({key[3:11] for key in keys}) == 50
    assert len({key[12:] for key in keys}) == 50


def test_the_first_admin_key_is_made_once(accounts: Accounts) -> None:
    key = accounts.create_first_admin_key()
    assert key is not None
    assert accounts.create_first_admin_key() is None
    accounts.revoke_key(key[3:11])
    assert accounts.create_first_admin_key() is not None


def test_keys_are_listed_without_their_text(accounts: Accounts) -> None:
    accounts.create_tenant("globex")
    first, second = accounts.create_key("acme"), accounts.create_key("globex")
    accounts.revoke_key(first[3:11])
    assert {key.id for key in accounts.list_keys()} == {first[3:11], second[3:11]}
    (listed,) = accounts.list_keys("acme")
    assert listed.revoked_at is not None


def test_tenants(accounts: Accounts) -> None:
    with pytest.raises(TenantExists):
        accounts.create_tenant("acme")
    with pytest.raises(InvalidName):
        accounts.create_tenant("Acme Inc")
    assert [(tenant.id, tenant.max_rank) for tenant in accounts.list_tenants()] == [("acme", 32)]
    assert accounts.get_tenant("acme").max_rank == 32
    for unknown in ("globex", "a\0b"):
        with pytest.raises(TenantNotFound):
            accounts.get_tenant(unknown)


@pytest.mark.parametrize(
    ("tenant", "role"), [("globex", "tenant"), ("a\0b", "tenant"), (None, "tenant"), ("acme", "admin")]
)
def test_a_key_needs_a_tenant_that_exists_and_an_admin_key_none(
    accounts: Accounts, tenant: str | None, role: str
) -> None:
    with pytest.raises(TenantNotFound):
        accounts.create_key(tenant, role)  # type: ignore[arg-type]
    assert accounts.list_keys() == []


@pytest.mark.parametrize("key_id", ["aaaaaaaa", "a\0aaaaaa"])
def test_revoking_an_unknown_key_says_so(accounts: Accounts, key_id: str) -> None:
    with pytest.raises(KeyNotFound):
        accounts.revoke_key(key_id)
