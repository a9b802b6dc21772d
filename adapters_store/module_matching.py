"""Which modules a config's fields choose, by peft's own matching rules.

The patterns are a tenant's regular expressions, so this runs only inside the confined validator process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeVar

from adapters_store.errors import AdapterInvalid
from adapters_store.file_names import CONFIG_FILE

T = TypeVar("T")
Patterns = tuple[str, ...] | str
Layers = tuple[int, ...] | int


def choose(
    paths: Collection[str],
    targets: Patterns,
    *,
    exclude: Patterns | None = None,
    layers: Layers | None = None,
    layers_pattern: Patterns | None = None,
    what: str = "linear",
) -> list[str]:
    """Those of `paths` that `target_modules` and the fields beside it choose; `what`: what they lead to.

    Raises `AdapterInvalid` naming the field: for a broken pattern, when nothing is chosen, and for a listed name that
    is none of `paths`, as peft would adapt others as well.
    """
    if not isinstance(targets, str):
        for name in targets:
            if not any(is_named(name, path) for path in paths):
                known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
                raise refuse("target_modules", f"{name[:80]!r} is not a {what} that can be adapted ({known})")
    chosen = [
        path
        for path in paths
        if not (exclude and _matches(exclude, path, "exclude_modules"))
        and _is_target(targets, path, layers, layers_pattern)
    ]
    if not chosen:
        raise refuse("target_modules", f"matches no {what} of the base")
    return chosen


def pattern_lookup(patterns: Mapping[str, T], field: str, default: T) -> Callable[[str], T]:
    """A function from a module path to the value of the first pattern that matches its end."""
    compiled = [(compile_pattern(rf"(?:.*\.)?(?:{key})$", field), value) for key, value in patterns.items()]

    def value_of(path: str) -> T:
        return next((value for pattern, value in compiled if pattern.match(path)), default)

    return value_of


def compile_pattern(pattern: str, field: str) -> re.Pattern[str]:
    """A tenant's regular expression. Raises `AdapterInvalid` naming the field."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        raise refuse(field, "holds a text that is not a regular expression") from None


def is_named(name: str, path: str) -> bool:
    """Whether the last parts of a path are `name`."""
    return path == name or path.endswith(f".{name}")


def refuse(field: str, reason: str) -> AdapterInvalid:
    """The error that names a field of the config."""
    return AdapterInvalid(reason, file=CONFIG_FILE, field=field)


def _is_target(targets: Patterns, path: str, layers: Layers | None, layers_pattern: Patterns | None) -> bool:
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or _matches(targets, path, "target_modules")
    if path in targets:  # peft asks a module that is named by its whole path for no layer
        return True
    return _matches(targets, path, "target_modules") and _is_in_layers(path, layers, layers_pattern)


def _matches(patterns: Patterns, path: str, field: str) -> bool:
    if isinstance(patterns, str):
        return compile_pattern(patterns, field).fullmatch(path) is not None
    return any(is_named(name, path) for name in patterns)


def _is_in_layers(path: str, layers: Layers | None, layers_pattern: Patterns | None) -> bool:
    if layers is None or layers == ():
        return True
    patterns: Iterable[str] = (layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern or (r"[^.]*",)
    for pattern in patterns:
        match = compile_pattern(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", "layers_pattern").match(path)
        if match is not None:  # without an index, where one side of a "|" in the pattern did: peft then takes no module
            index = match["idx"]
            return index is not None and int(index) in ((layers,) if isinstance(layers, int) else layers)
    return False
