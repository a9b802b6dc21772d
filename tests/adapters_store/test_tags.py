"""Tags: texts on adapters and versions that change while versions do not, within a tenant and within limits."""

from __future__ import annotations

from functools import partial

import pytest
from sqlalchemy import select

from adapters_store.accounts import Accounts
from adapters_store.database import Database
from adapters_store.errors import AdapterNotFound, InvalidTag
from adapters_store.registry import AdapterRegistry
from adapters_store.tables import version_tags
from adapters_store.tags import MAX_KEY, MAX_TAGS, MAX_VALUE, AdapterTags
from adapters_store.upload import StagedAdapter


@pytest.fixture
def tags(database: Database, registry: AdapterRegistry, staged: StagedAdapter) -> AdapterTags:
    """Of a store that has acme/support with two versions, and a second tenant."""
    for tenant in ("acme", "globex"):
        Accounts(database).create_tenant(tenant)
    for _ in range(2):
        registry.publish("acme", "support", staged)
    return AdapterTags(database)


def test_tags_of_the_adapter_and_of_versions_are_shown_apart(tags: AdapterTags, registry: AdapterRegistry) -> None:
    tags.set("acme", "support", "team", "north")
    tags.set("acme", "support", "eval/score", "0.91", version=1)
    tags.set("acme", "support", "team", "south")
    tags.set("acme", "support", "note", "", version=2)
    for info in (registry.get("acme", "support"), *registry.list("acme")):
        assert info.tags == {"team": "south"}
        assert info.version_tags == {1: {"eval/score": "0.91"}, 2: {"note": ""}}


def test_a_deleted_tag_is_gone_and_deleting_twice_is_harmless(tags: AdapterTags, registry: AdapterRegistry) -> None:
    for version in (None, 1):
        tags.set("acme", "support", "a", "1", version)
        tags.delete("acme", "support", "a", version)
        tags.delete("acme", "support", "a", version)
    info = registry.get("acme", "support")
    assert (info.tags, info.version_tags) == ({}, {})


def test_deleting_what_can_be_no_key_is_harmless_too(tags: AdapterTags) -> None:
    for version in (None, 1):
        tags.delete("acme", "support", "\0", version)
    with pytest.raises(AdapterNotFound):
        tags.delete("acme", "a\0b", "a")


def test_a_deleted_versions_tags_go_with_it(tags: AdapterTags, registry: AdapterRegistry, database: Database) -> None:
    tags.set("acme", "support", "a", "1", version=1)
    registry.delete("acme", "support", 1)
    with database.read() as connection:
        assert connection.execute(select(version_tags)).all() == []


def test_a_deleted_version_cannot_be_tagged_before_its_purge(tags: AdapterTags, registry: AdapterRegistry) -> None:
    registry.delete("acme", "support", 1)
    for change in (partial(tags.set, value="1"), tags.delete):
        with pytest.raises(AdapterNotFound):
            change("acme", "support", "a", version=1)


@pytest.mark.parametrize(("tenant", "name", "version"), [("globex", "support", None), ("acme", "other", None),
    ("acme", "support", 3), ("acme", "support", 0), ("acme", "support", 2**40)])  # fmt: skip
def test_what_does_not_exist_or_is_anothers_cannot_be_tagged(
    tags: AdapterTags, tenant: str, name: str, version: int | None
) -> None:
    with pytest.raises(AdapterNotFound):
        tags.set(tenant, name, "a", "1", version)
    with pytest.raises(AdapterNotFound):
        tags.delete(tenant, name, "a", version)


@pytest.mark.parametrize(
    ("key", "value"), [("", "x"), ("k" * (MAX_KEY + 1), "x"), ("a\nb", "x"), ("k", "v" * (MAX_VALUE + 1)), ("k", "\0")]
)
def test_a_tag_over_its_limits_is_refused(tags: AdapterTags, key: str, value: str) -> None:
    with pytest.raises(InvalidTag) as caught:
        tags.set("acme", "support", key, value)
    assert caught.value.param == ("value" if key == "k" else "key")


def test_there_may_be_so_many_tags_and_no_more(tags: AdapterTags, registry: AdapterRegistry) -> None:
    for number in range(MAX_TAGS):
        tags.set("acme", "support", f"k{number}", "v")
    with pytest.raises(InvalidTag, match="delete one first"):
        tags.set("acme", "support", "one more", "v")
    tags.set("acme", "support", "k0", "changed")
    assert registry.get("acme", "support").tags["k0"] == "changed"
