"""Which NF4 kernel multiplies a shape, in which configuration: a small table, found by `python -m benchmarks.tune`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

_TABLE = "nf4_plans.json"


@dataclass(frozen=True)
class NarrowPlan:
    """The macros of nf4.cu; see there."""

    tokens: int
    warps: int
    depth: int
    blocks: int
    ahead: int

    def fitted(self, num_blocks: int) -> NarrowPlan:
        """The plan for a weight of so many blocks of columns, which its warps must divide among them evenly."""
        return replace(self, warps=math.gcd(self.warps, num_blocks))


@dataclass(frozen=True)
class WidePlan:
    """The macros of nf4_wide.cu, and whether thread blocks share tiles where these do not come out even; see there."""

    tokens: int
    row_groups: int
    in_groups: int
    span: int
    stages: int
    share: bool

    def fitted(self, num_blocks: int) -> WidePlan:
        """The plan for a weight of so many blocks of columns, which stages must divide evenly."""
        span = math.gcd(self.span, num_blocks)
        in_groups = math.gcd(self.in_groups, num_blocks // span)
        row_groups = self.row_groups if in_groups > 1 else 2  # registers are shared out for two warpgroups or more
        return replace(self, row_groups=row_groups, span=span, in_groups=in_groups)


Plan = NarrowPlan | WidePlan


@cache
def plan_for(num_tokens: int, out_features: int, in_features: int, capability: tuple[int, int]) -> Plan | None:
    """The plan of the nearest shape in the table; None where unpacking the weight and a dense product is faster.

    capability: of the card; one that the table lacks has the plans of the nearest older one. Rows are looked up by the
    next tabled number of them, shapes by the ratio of their sides.
    """
    table = _tabled()
    known = [major_minor for major_minor in table if major_minor <= capability]
    # Hopper's wide kernel runs on Hopper alone.
    known = [one for one in known if one[0] != 9 or capability[0] == 9]
    if not known:
        return None
    entries = table[max(known)]
    limits = sorted({entry["tokens_up_to"] for entry in entries if entry["tokens_up_to"] >= num_tokens})
    if not limits:
        return None
    near = [entry for entry in entries if entry["tokens_up_to"] == limits[0]]
    plan = _plan(min(near, key=lambda entry: _distance(entry, out_features, in_features)))
    if plan is None or (isinstance(plan, WidePlan) and out_features % 8):  # rows of y are written 16 bytes at a time
        return None
    return plan.fitted(in_features // 64)


# What the plans below share decides the order of a sum: rows of a tile, columns of a stage, warpgroups, thread blocks.
# With `span` 1 those of many rows fit too; a deeper pipeline makes up for shorter stages.
_INVARIANT_WIDE = tuple(
    WidePlan(tokens, row_groups=2, in_groups=1, span=1, stages=stages, share=True)
    for tokens, stages in ((16, 12), (32, 10), (64, 8), (128, 5), (256, 4))
)
_INVARIANT_NARROW = (8, 16, 32)


@cache
def invariant_plans(out_features: int, in_features: int, capability: tuple[int, int]) -> tuple[Plan, ...]:
    """Plans for ascending numbers of rows that give a row the same bits; none where the weight is unpacked first.

    All of them cut the inputs of a tile alike, among as many thread blocks, and add the parts in the same order. That
    holds for one tile of rows of x: more rows than the last plan takes are several products.
    """
    plan = plan_for(_INVARIANT_NARROW[-1], out_features, in_features, capability)
    if isinstance(plan, NarrowPlan):
        return tuple(replace(plan, tokens=tokens) for tokens in _INVARIANT_NARROW)
    return _INVARIANT_WIDE if plan is not None else ()


def _distance(entry: dict[str, Any], out_features: int, in_features: int) -> float:
    return abs(math.log(entry["out"] / out_features)) + abs(math.log(entry["in"] / in_features))


def _plan(entry: dict[str, Any]) -> Plan | None:
    if (narrow := entry.get("narrow")) is not None:
        return NarrowPlan(**narrow)
    if (wide := entry.get("wide")) is not None:
        return WidePlan(**wide)
    return None


@cache
def _tabled() -> dict[tuple[int, int], list[dict[str, Any]]]:
    table: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for entry in json.loads((files("lora_kernels") / _TABLE).read_text()):
        major, minor = entry["capability"]
        table.setdefault((major, minor), []).append(entry)
    return table
