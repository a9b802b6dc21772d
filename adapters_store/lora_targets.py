"""Which linears a LoRA config adapts, with what rank and scale, by peft's own matching rules.

The patterns are a tenant's regular expressions, so this runs only inside the confined validator process.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from adapters_store.base_spec import LINEARS, module_path
from adapters_store.config_schema import LoRAConfig
from adapters_store.errors import AdapterInvalid
from adapters_store.file_names import CONFIG_FILE

T = TypeVar("T")


@dataclass(frozen=True)
class LoRATarget:
    """The rank and scale (alpha / r, or alpha / sqrt(r) for rsLoRA) of one linear's delta."""

    rank: int
    scale: float


def resolve_targets(config: LoRAConfig, num_layers: int) -> dict[tuple[int, str], LoRATarget]:
    """The targets by (layer, linear). Raises `AdapterInvalid` naming the field at fault."""
    paths = {module_path(i, linear): (i, linear) for i in range(num_layers) for linear in LINEARS}
    _check_each_matches(config, paths)
    chosen = [path for path in paths if _is_target(config, path)]
    if not chosen:
        raise _refuse("target_modules", "matches no linear of the base")
    rank_of = _pattern_lookup(config.rank_pattern, "rank_pattern", config.r)
    alpha_of = _pattern_lookup(config.alpha_pattern, "alpha_pattern", config.lora_alpha)
    return {paths[path]: _target(rank_of(path), alpha_of(path), config.use_rslora) for path in chosen}


def _target(rank: int, alpha: float, use_rslora: bool) -> LoRATarget:
    return LoRATarget(rank, alpha / (math.sqrt(rank) if use_rslora else rank))


def _check_each_matches(config: LoRAConfig, paths: Iterable[str]) -> None:
    """Each listed module must name linears that Patchbay adapts: peft would adapt others as well."""
    if isinstance(config.target_modules, str):
        return
    for name in config.target_modules:
        if not any(_is_named(name, path) for path in paths):
            known = ", ".join(LINEARS)
            raise _refuse("target_modules", f"{name[:80]!r} is not a linear that can be adapted ({known})")


def _is_target(config: LoRAConfig, path: str) -> bool:
    if config.exclude_modules and _matches(config.exclude_modules, path, "exclude_modules"):
        return False
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return True
    return _matches(targets, path, "target_modules") and _is_in_layers(config, path)


def _matches(patterns: tuple[str, ...] | str, path: str, field: str) -> bool:
    if isinstance(patterns, str):
        return _compile(patterns, field).fullmatch(path) is not None
    return any(_is_named(name, path) for name in patterns)


def _is_named(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _is_in_layers(config: LoRAConfig, path: str) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == ():
        return True
    patterns = config.layers_pattern or (r"[^.]*",)
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        match = _compile(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", "layers_pattern").match(path)
        if match is not None:
            return int(match["idx"]) in ((layers,) if isinstance(layers, int) else layers)
    return False


def _pattern_lookup(patterns: Mapping[str, T], field: str, default: T) -> Callable[[str], T]:
    """A function from a module path to the value of the first pattern that matches its end."""
    compiled = [(_compile(rf"(?:.*\.)?(?:{key})$", field), value) for key, value in patterns.items()]

    def value_of(path: str) -> T:
        return next((value for pattern, value in compiled if pattern.match(path)), default)

    return value_of


def _compile(pattern: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        raise _refuse(field, "holds a text that is not a regular expression") from None


def _refuse(field: str, reason: str) -> AdapterInvalid:
    return AdapterInvalid(reason, file=CONFIG_FILE, field=field)
