"""Fine-tune jobs, their events and their states, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from gateway.errors import InvalidRequest
from gateway.trainer.hyperparameters import Hyperparameters, PeftOptions

JobStatus = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
EventLevel = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics"]

FINAL_STATUSES: Final = frozenset(("succeeded", "failed", "cancelled"))
_EVENT_PREFIX: Final = "ftevent-"
_EVENT_DIGITS: Final = 24
_MAX_EVENT: Final = 2**31 - 1  # of the database's column


@dataclass(frozen=True)
class FineTuningRequest:
    """What a tenant asks for. `suffix` is the name of the adapter to make; None lets Patchbay choose one."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    peft: PeftOptions = field(default_factory=PeftOptions)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class JobError:
    """Why a job failed. `param` names the request field at fault, if one is."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class FineTuningJob:
    """One job. Times are unix seconds. hyperparameters hold "auto" until the job runs, then the values used.

    fine_tuned_model: "tenant/name:version" once succeeded. claimed_by, heartbeat_at: the worker on it and its last
    sign of life.
    """

    id: str
    tenant: str
    model: str
    suffix: str | None
    training_file: str
    validation_file: str | None
    seed: int
    hyperparameters: Hyperparameters
    peft: PeftOptions
    metadata: Mapping[str, str]
    status: JobStatus
    error: JobError | None
    fine_tuned_model: str | None
    trained_tokens: int | None
    created_at: int
    started_at: int | None
    finished_at: int | None
    cancel_requested: bool
    claimed_by: str | None
    heartbeat_at: int | None

    @property
    def finished(self) -> bool:
        """Whether the job has reached its end, whichever."""
        return self.status in FINAL_STATUSES

    @property
    def method(self) -> dict[str, Any]:
        """OpenAI's `method` object."""
        return {"type": "supervised", "supervised": {"hyperparameters": self.hyperparameters.model_dump()}}

    @property
    def adapter_name(self) -> str:
        """The adapter that the job publishes under: the suffix, else a name of its own."""
        return self.suffix or f"ft-{self.id.removeprefix('ftjob-').lower()}"


@dataclass(frozen=True)
class FineTuningEvent:
    """One line of a job's log. Numbers grow with time over all jobs; `data` holds a step's metrics."""

    number: int
    job_id: str
    created_at: int
    level: EventLevel
    type: EventType
    message: str
    data: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The event's public id, "ftevent-…"."""
        return f"{_EVENT_PREFIX}{self.number:0{_EVENT_DIGITS}d}"


def event_number(event_id: str) -> int:
    """The number in a public event id. Raises `InvalidRequest`."""
    digits = event_id.removeprefix(_EVENT_PREFIX)
    is_number = digits.isascii() and digits.isdigit() and len(digits) <= _EVENT_DIGITS
    if not event_id.startswith(_EVENT_PREFIX) or not is_number or int(digits) > _MAX_EVENT:
        raise InvalidRequest(f"{event_id[:80]!r} is not an event id (ftevent-…).", param="after")
    return int(digits)
