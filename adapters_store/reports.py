"""What is known of how a version behaves: kept in its row, and told to its owner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VersionReport:
    """The outcome of a version's self-test, or why it was quarantined later.

    reason: why it did not pass. tested_at: unix seconds. finite: whether all logits were, None where none were seen.
    all_tensors_used: true of every version, as uploads whose tensors are not exactly those of their configuration are
    refused. largest_change: of a log-probability in nats, beside the base's on the same tokens. num_golden: golden
    prompts, of the upload or of the call, whose completions came out.
    """

    passed: bool
    tested_at: int
    reason: str | None = None
    finite: bool | None = None
    all_tensors_used: bool = True
    largest_change: float | None = None
    num_golden: int = 0
    seconds: float | None = None

    @property
    def as_json(self) -> dict[str, Any]:
        """The fields, for a JSON column or body."""
        return dict(vars(self))
