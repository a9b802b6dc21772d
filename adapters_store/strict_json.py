"""JSON from a tenant: one object, no duplicate keys, no NaN, nothing after it."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from adapters_store.errors import AdapterInvalid


def parse_object(data: bytes, file: str) -> dict[str, Any]:
    """Parse one JSON object. Raises `AdapterInvalid` naming `file`."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise AdapterInvalid("the text is not UTF-8", file=file) from None
    except RecursionError:
        raise AdapterInvalid("the JSON is nested too deeply", file=file) from None
    except ValueError as error:
        raise AdapterInvalid(f"the text is not valid JSON ({error})", file=file) from None
    if not isinstance(value, dict):
        raise AdapterInvalid("the JSON must be an object", file=file)
    return value


def shown(name: str) -> str:
    """A tenant's text made safe for an error message or a log: printable ASCII, at most 120 characters."""
    text = ascii(name)[1:-1]
    return text if len(text) <= 120 else f"{text[:117]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(duplicate)} appears twice")
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")
