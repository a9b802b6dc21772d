"""What a failed command says and how it exits: what happened, why, and what to do next."""

from __future__ import annotations

import enum
import json
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from gateway.client import ApiError, ClientError, InvalidInput, TimedOut, Unreachable


class ExitCode(enum.IntEnum):
    """The exit codes of `patchbay`. They do not change their meaning between releases."""

    OK = 0
    UNEXPECTED = 1  # a defect, here or in the gateway
    USAGE = 2  # the command line itself is wrong
    REFUSED = 3  # the request, or a local file, is invalid or in a state that forbids it
    AUTHENTICATION = 4  # no key, a wrong key, or one that may not do this
    NOT_FOUND = 5  # no such object, or another tenant's
    UNAVAILABLE = 6  # nothing answers, too slow, or overloaded: try again later
    UNSUCCESSFUL = 7  # it ran, and did not succeed: a watched job, a check of the demo, a self-test
    INTERRUPTED = 130  # Ctrl-C


class CommandFailed(Exception):
    """A command ends with `code`; the text says what and why, `hint` what to do next."""

    def __init__(self, message: str, code: ExitCode, hint: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint


@dataclass(frozen=True)
class Failure:
    """One failed command, ready to print."""

    message: str
    exit_code: ExitCode
    hint: str | None = None
    code: str | None = None
    param: str | None = None
    request_id: str | None = None


_BY_STATUS: Final[dict[int, ExitCode]] = {
    401: ExitCode.AUTHENTICATION,
    403: ExitCode.AUTHENTICATION,
    404: ExitCode.NOT_FOUND,
    408: ExitCode.UNAVAILABLE,
    429: ExitCode.UNAVAILABLE,
    502: ExitCode.UNAVAILABLE,
    503: ExitCode.UNAVAILABLE,
    504: ExitCode.UNAVAILABLE,
}
_HINTS: Final[dict[str, str]] = {
    "invalid_api_key": "Pass --api-key or set PATCHBAY_API_KEY; `patchbay key create TENANT` makes a key.",
    "permission_denied": "Use a key that may do this: an admin's is in the server's data folder, admin.key.",
    "model_not_found": "`patchbay adapter list` shows the adapters that this key may call.",
    "self_test_failed": "No alias was moved. `patchbay adapter list NAME --json` shows the version's report.",
    "version_not_ready": "`patchbay adapter rollback NAME` points the alias back.",
    "alias_in_use": "`patchbay adapter alias` moves an alias, `patchbay adapter unalias` deletes one.",
    "overloaded": "Try again in a moment; the gateway is full.",
    "engine_unavailable": "Try again in a moment; /readyz of the gateway says when it takes requests.",
    "store_unavailable": "Try again in a moment; the gateway cannot reach its database or blob store.",
}


def describe(error: Exception) -> Failure:
    """The failure that `error` is to the person at the keyboard."""
    if isinstance(error, ApiError):
        return _describe_api(error)
    if isinstance(error, CommandFailed):
        return Failure(str(error), error.code, error.hint)
    if isinstance(error, Unreachable):
        hint = "`patchbay serve` starts a gateway here; --url or PATCHBAY_URL names another."
        return Failure(str(error), ExitCode.UNAVAILABLE, hint)
    if isinstance(error, TimedOut):
        hint = "Try again, or give it longer with --timeout."
        return Failure(str(error), ExitCode.UNAVAILABLE, hint)
    if isinstance(error, InvalidInput):
        return Failure(str(error), ExitCode.REFUSED)
    if isinstance(error, ClientError):
        return Failure(str(error), ExitCode.UNAVAILABLE)
    return _describe_other(error)


def report(failure: Failure, *, as_json: bool) -> NoReturn:
    """Print a failure to stderr (and as JSON to stdout) and exit with its code."""
    from rich.console import Console

    if as_json:
        print(json.dumps({"error": _as_json(failure)}))
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("[bold red]Error:[/]", end=" ")
    console.print(failure.message, markup=False)
    if failure.hint:
        console.print(failure.hint, markup=False)
    if failure.request_id and failure.exit_code == ExitCode.UNEXPECTED:
        console.print(f"Request id: {failure.request_id}", markup=False)
    sys.exit(failure.exit_code)


def _describe_api(error: ApiError) -> Failure:
    default = ExitCode.UNEXPECTED if error.status >= 500 else ExitCode.REFUSED
    hint = _HINTS.get(error.code or "")
    if error.retry_after is not None:
        hint = f"Try again in {error.retry_after:g} s."
    return Failure(
        error.message,
        _BY_STATUS.get(error.status, default),
        hint,
        error.code,
        error.param,
        error.request_id,
    )


def _describe_other(error: Exception) -> Failure:
    from gateway.errors import BaseModelUnsupported, ConfigInvalid, GatewayError

    if isinstance(error, BaseModelUnsupported | ConfigInvalid):
        return Failure(error.message, ExitCode.REFUSED, param=error.param)
    if isinstance(error, GatewayError):
        return Failure(error.message, ExitCode.UNEXPECTED, param=error.param)
    if os.environ.get("PATCHBAY_DEBUG"):
        traceback.print_exception(error)
    return Failure(
        f"{type(error).__name__}: {error}",
        ExitCode.UNEXPECTED,
        "This is a defect of Patchbay's. PATCHBAY_DEBUG=1 shows where it happened.",
    )


def _as_json(failure: Failure) -> dict[str, Any]:
    return {
        "message": failure.message,
        "hint": failure.hint,
        "code": failure.code,
        "param": failure.param,
        "request_id": failure.request_id,
        "exit_code": int(failure.exit_code),
    }
