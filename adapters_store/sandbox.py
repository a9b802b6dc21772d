"""Runs a task on a tenant's bytes in a process of its own: no network, bounded memory, time and disk."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from adapters_store.errors import AdapterInvalid, StoreError, UploadTooLarge

_log = logging.getLogger(__name__)

_BOOT: Final = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from adapters_store.confined import main; main()"
)
_ENVIRONMENT: Final = {"LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class SandboxLimits:
    """What one task may use. Seconds, and bytes; `file_bytes` limits each file that it writes."""

    wall_seconds: float = 120.0
    cpu_seconds: int = 60
    memory_bytes: int = 1 << 30
    file_bytes: int = 4 << 30


def run_confined(task: str, folder: Path, request: dict[str, Any], limits: SandboxLimits) -> dict[str, Any]:
    """Run `task` ("unpack" or "validate") on `folder` and return its answer.

    Raises `AdapterInvalid` or `UploadTooLarge` as the task does, `AdapterInvalid` when it passes its limits, and
    `StoreError` when the process itself fails.
    """
    order = {"task": task, "folder": str(folder), "request": request, "limits": asdict(limits)}
    path = json.dumps([entry for entry in sys.path if entry])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _BOOT, path],
            input=json.dumps(order).encode(),
            capture_output=True,
            timeout=limits.wall_seconds,
            env=_ENVIRONMENT,
            cwd=folder,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise AdapterInvalid(_over_limits(task)) from None
    except OSError as error:
        raise StoreError(f"the adapter validator could not be started: {error}") from error
    if done.returncode < 0:  # killed: by its CPU limit, or in native code that ran into a limit
        raise AdapterInvalid(_over_limits(task))
    return _answer(task, done)


def _answer(task: str, done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        _log.error(
            "the %s process failed (%d): %s",
            task,
            done.returncode,
            done.stderr[-4000:].decode(errors="replace"),
        )
        raise StoreError("the adapter validator failed; its log has the cause") from None
    if "too_large" in answer:
        raise UploadTooLarge(**answer["too_large"])
    if "out_of_memory" in answer:
        raise AdapterInvalid(_over_limits(task))
    if "invalid" in answer:
        raise AdapterInvalid(**answer["invalid"])
    result: dict[str, Any] = answer["result"]
    return result


def _over_limits(task: str) -> str:
    action = "unpacking the archive" if task == "unpack" else "validating the adapter"
    return f"{action} took more time or memory than allowed"
