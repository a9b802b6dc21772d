"""Names of tenants, adapters and aliases, and the references that a request's `model` field may hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from adapters_store.errors import AdapterNotFound, InvalidName

_NAME: Final = r"[a-z0-9][a-z0-9._-]{0,62}"
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


def check_name(what: str, name: str) -> None:
    """Raise `InvalidName` unless `name` may name a tenant, an adapter or an alias."""
    if re.fullmatch(_NAME, name, re.ASCII) is None:
        raise InvalidName(what, name)
