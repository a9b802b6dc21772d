"""The other side of `sandbox`: the process that gives up its rights, then reads a tenant's bytes.

The rights go in this order: network (a namespace of its own, where the system allows it), memory, time, file size and
core dumps (rlimits), then an audit hook that ends every attempt to open files elsewhere, to connect, to start a
process or to unpickle. The hook guards Python code; the rlimits guard the native code below it as well.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from adapters_store.errors import AdapterInvalid, UploadTooLarge

_PR_SET_PDEATHSIG: Final = 1
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_FORBIDDEN: Final = (
    "socket.",
    "subprocess.",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pty.",
    "pickle.",
    "ctypes.",
    "code.",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
    "os.kill",
)

Task = Callable[[Path, dict[str, Any]], dict[str, Any]]


def main() -> None:
    """Run the task named last in argv, with no more rights than it needs: an order from stdin, the answer to stdout."""
    _end_with_parent()
    task = _load_task(sys.argv[-1])
    order = json.load(sys.stdin.buffer)
    folder = Path(order["folder"]).resolve()
    _drop_network()
    _limit(**order["limits"])
    sys.addaudithook(_guard(folder))
    sys.stdout.write(json.dumps(_run(task, folder, order["request"])))
    sys.stdout.flush()


def _load_task(name: str) -> Task:
    """Import a task with all that it needs: nothing can be imported later."""
    if name == "unpack":
        from adapters_store.archive import unpack

        return unpack
    from adapters_store.validator import validate

    return validate


def _run(task: Task, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": task(folder, request)}
    except AdapterInvalid as error:
        return {"invalid": {"reason": error.reason, "file": error.file, "field": error.field}}
    except UploadTooLarge as error:
        return {"too_large": {"what": error.what, "limit": error.limit}}
    except MemoryError:
        return {"out_of_memory": True}
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return {"disk_full": True}


def _end_with_parent() -> None:
    """Be killed when the thread that began this process is gone: nobody reads its answer, and its folder is removed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _drop_network() -> None:
    """Move to an empty network namespace; systems that do not allow it keep the audit hook alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _limit(wall_seconds: float, cpu_seconds: int, memory_bytes: int, file_bytes: int) -> None:
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_CPU, cpu_seconds)
    _set_limit(resource.RLIMIT_FSIZE, file_bytes)
    if sys.platform == "linux":  # other systems map far more address space than they use
        _set_limit(resource.RLIMIT_AS, memory_bytes)


def _set_limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _guard(folder: Path) -> Callable[[str, tuple[Any, ...]], None]:
    inside = f"{folder}{os.sep}"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and not isinstance(arguments[0], int):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not path.startswith(inside):
                raise PermissionError(f"opening {path} is not allowed here")

    return hook
