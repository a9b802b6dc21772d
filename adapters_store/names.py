"""Names of tenants, adapters and aliases, and the references that a request's `model` field may hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from adapters_store.errors import AdapterNotFound, InvalidName

_NAME: Final = r"[a-z0-9][a-z0-9._-]{0,62}"
_ID: Final = r"[A-Za-z0-9_-]{1,64}"
_REFERENCE: Final = re.compile(
    rf"(?P<tenant>{_NAME})/(?P<name>{_NAME})(?::(?P<version>[1-9][0-9]{{0,8}})|@(?P<alias>{_NAME}))?",
    re.ASCII,
)

DEFAULT_ALIAS: Final = "default"


@dataclass(frozen=True)
class AdapterRef:
    """A parsed reference: exactly one of `version` and `alias` is set."""

    tenant: str
    name: str
    version: int | None
    alias: str | None

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Parse `tenant/name`, `tenant/name:3` or `tenant/name@alias`. Raises `AdapterNotFound` otherwise."""
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise AdapterNotFound(text)
        version = int(match["version"]) if match["version"] else None
        alias = None if version else match["alias"] or DEFAULT_ALIAS
        return cls(match["tenant"], match["name"], version, alias)


def is_name(text: str) -> bool:
    """Whether a text may name a tenant, an adapter or an alias. No database is asked for others: some refuse NUL."""
    return re.fullmatch(_NAME, text, re.ASCII) is not None


def is_id(text: str) -> bool:
    """Whether a text may be the id of a file, a job or a key, for databases as `is_name`."""
    return re.fullmatch(_ID, text, re.ASCII) is not None


def check_name(what: str, name: str) -> None:
    """Raise `InvalidName` unless `name` may name a tenant, an adapter or an alias."""
    if not is_name(name):
        raise InvalidName(what, name)
