"""One JSON line a case, printed and appended to `benchmarks/results/<subject>.jsonl`."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_recorded: list[dict[str, Any]] = []


def machine() -> str:
    """What the figures were measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}".replace("NVIDIA ", "")
    return f"{torch.get_num_threads()} CPU cores"


def commit() -> str:
    """The commit that is checked out, with "+" when files differ from it.

    A copy without its history is told by `PATCHBAY_COMMIT`; else it is "unknown".
    """
    if told := os.environ.get("PATCHBAY_COMMIT"):
        return told
    try:
        head = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip()


def record(
    subject: str,
    case: str,
    metric: str,
    value: float,
    unit: str,
    *,
    target: float | None = None,
    floor: float | None = None,
    system: str = "patchbay",
    note: str = "",
) -> None:
    """Append one measurement. `value` is a median unless the note says otherwise; `system` names a peer."""
    line: dict[str, Any] = {
        "subject": subject,
        "case": case,
        "metric": metric,
        "value": round(value, 4),
        "unit": unit,
        "floor": floor,
        "target": target,
        "system": system,
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "note": note,
    }
    _recorded.append(line)
    text = json.dumps(line)
    print(text, flush=True)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{subject}.jsonl").open("a") as file:
        file.write(text + "\n")


def recorded() -> list[dict[str, Any]]:
    """The lines of this run."""
    return list(_recorded)
