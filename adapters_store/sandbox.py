"""Runs a task on a tenant's bytes in a process of its own: no network, bounded memory, time and disk."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from adapters_store.errors import AdapterInvalid, DiskFull, StoreError, UploadTooLarge

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


class ConfinedProcess:
    """A process that has imported all that `task` ("unpack" or "validate") needs, and waits for its order.

    Used once, and best begun before its order is known, as importing takes a while. It is killed when the thread that
    began it ends. Raises `StoreError` when it cannot be started.
    """

    def __init__(self, task: str, folder: Path) -> None:
        self._task = task
        self._folder = folder
        path = json.dumps([entry for entry in sys.path if entry])
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOT, path, task],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_ENVIRONMENT,
                cwd=folder,
                start_new_session=True,
            )
        except OSError as error:
            raise StoreError(f"the adapter validator could not be started: {error}") from error

    def run(self, request: dict[str, Any], limits: SandboxLimits) -> dict[str, Any]:
        """Do the task on the folder, and return its answer.

        Raises `AdapterInvalid` or `UploadTooLarge` as the task does, `AdapterInvalid` when it passes its limits,
        `DiskFull`, and `StoreError` when the process itself fails.
        """
        order = {"folder": str(self._folder), "request": request, "limits": asdict(limits)}
        try:
            stdout, stderr = self._process.communicate(json.dumps(order).encode(), limits.wall_seconds)
        except subprocess.TimeoutExpired:
            raise AdapterInvalid(_over_limits(self._task)) from None
        finally:
            self.kill()
        if self._process.returncode < 0:  # killed: by its CPU limit, or in native code that ran into a limit
            raise AdapterInvalid(_over_limits(self._task))
        return self._answer(stdout, stderr)

    def kill(self) -> None:
        """End it, whatever it does; harmless when it has ended."""
        self._process.kill()
        self._process.communicate()

    def _answer(self, stdout: bytes, stderr: bytes) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(stdout)
        except ValueError:
            code, last_words = self._process.returncode, stderr[-4000:].decode(errors="replace")
            _log.error("the %s process failed (%d): %s", self._task, code, last_words)
            raise StoreError("the adapter validator failed; its log has the cause") from None
        if "too_large" in answer:
            raise UploadTooLarge(**answer["too_large"])
        if "out_of_memory" in answer:
            raise AdapterInvalid(_over_limits(self._task))
        if "disk_full" in answer:
            raise DiskFull
        if "invalid" in answer:
            raise AdapterInvalid(**answer["invalid"])
        result: dict[str, Any] = answer["result"]
        return result


def _over_limits(task: str) -> str:
    action = "unpacking the archive" if task == "unpack" else "validating the adapter"
    return f"{action} took more time or memory than allowed"
