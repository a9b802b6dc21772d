"""Every error a caller can see, and the one table that maps each to its gRPC status, HTTP status and OpenAI code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from adapters_store.errors import (
    AdapterInvalid,
    AdapterLoadFailed,
    AdapterNotFound,
    AliasInUse,
    InvalidName,
    InvalidTag,
    KeyNotFound,
    NoPreviousVersion,
    RetestConflict,
    SelfTestFailed,
    StoreError,
    StoreUnavailable,
    TenantExists,
    TenantNotFound,
    UploadTooLarge,
    VersionNotReady,
)


class GatewayError(Exception):
    """An error meant for the caller: a message that says what, why and what next, and the parameter at fault."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(GatewayError):
    """A field of the request is missing, malformed or out of range."""


class ContextLengthExceeded(GatewayError):
    """The prompt and the tokens asked for do not fit the model's context."""


class RequestTooLarge(GatewayError):
    """The body of the request passes its byte limit."""


class MethodNotAllowed(GatewayError):
    """The HTTP route exists, and not for this method."""


class AuthenticationFailed(GatewayError):
    """No key, an unknown key or a revoked key."""


class PermissionDenied(GatewayError):
    """The key is valid and may not do this."""


class NotFound(GatewayError):
    """The object does not exist, or belongs to another tenant, which looks the same."""


class ModelNotFound(NotFound):
    """No model of that name that this key may call."""


class Conflict(GatewayError):
    """The object is in a state that forbids the operation."""


class Overloaded(GatewayError):
    """The queue is full; the caller should retry after `retry_after` seconds."""

    def __init__(self, message: str, *, param: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class AdapterNotFinite(GatewayError):
    """The adapter's own numbers became NaN or infinite on this request; nobody else's did."""


class RequestCancelled(GatewayError):
    """The request ended because its caller cancelled it or went away."""


class EngineUnavailable(GatewayError):
    """No replica can take the request now."""


class InternalError(GatewayError):
    """A defect of ours; the log of this request id has the cause."""


class BaseModelUnsupported(GatewayError):
    """The folder given as the base holds a model or a format that Patchbay cannot serve."""


class ConfigInvalid(GatewayError):
    """A configuration file or flag names an unknown key or an impossible value."""


@dataclass(frozen=True, slots=True)
class WireError:
    """How one error type looks on each wire. `grpc` is the name of a `grpc.StatusCode`."""

    grpc: str
    http: int
    type: str
    code: str


_ERRORS: Final[dict[type[Exception], WireError]] = {
    InvalidRequest: WireError("INVALID_ARGUMENT", 400, "invalid_request_error", "invalid_value"),
    ContextLengthExceeded: WireError("INVALID_ARGUMENT", 400, "invalid_request_error", "context_length_exceeded"),
    RequestTooLarge: WireError("RESOURCE_EXHAUSTED", 413, "invalid_request_error", "request_too_large"),
    MethodNotAllowed: WireError("UNIMPLEMENTED", 405, "invalid_request_error", "method_not_allowed"),
    AuthenticationFailed: WireError("UNAUTHENTICATED", 401, "authentication_error", "invalid_api_key"),
    PermissionDenied: WireError("PERMISSION_DENIED", 403, "permission_error", "permission_denied"),
    ModelNotFound: WireError("NOT_FOUND", 404, "invalid_request_error", "model_not_found"),
    NotFound: WireError("NOT_FOUND", 404, "invalid_request_error", "not_found"),
    Conflict: WireError("FAILED_PRECONDITION", 409, "invalid_request_error", "conflict"),
    Overloaded: WireError("RESOURCE_EXHAUSTED", 429, "rate_limit_error", "overloaded"),
    AdapterNotFinite: WireError("FAILED_PRECONDITION", 422, "invalid_request_error", "adapter_not_finite"),
    RequestCancelled: WireError("CANCELLED", 499, "invalid_request_error", "request_cancelled"),
    EngineUnavailable: WireError("UNAVAILABLE", 503, "server_error", "engine_unavailable"),
    InternalError: WireError("INTERNAL", 500, "server_error", "internal_error"),
    BaseModelUnsupported: WireError("FAILED_PRECONDITION", 400, "invalid_request_error", "unsupported_base"),
    ConfigInvalid: WireError("INVALID_ARGUMENT", 400, "invalid_request_error", "invalid_config"),
    AdapterInvalid: WireError("INVALID_ARGUMENT", 400, "invalid_request_error", "invalid_adapter"),
    SelfTestFailed: WireError("FAILED_PRECONDITION", 422, "invalid_request_error", "self_test_failed"),
    RetestConflict: WireError("FAILED_PRECONDITION", 409, "invalid_request_error", "retest_conflict"),
    VersionNotReady: WireError("FAILED_PRECONDITION", 422, "invalid_request_error", "version_not_ready"),
    UploadTooLarge: WireError("RESOURCE_EXHAUSTED", 413, "invalid_request_error", "upload_too_large"),
    AdapterNotFound: WireError("NOT_FOUND", 404, "invalid_request_error", "model_not_found"),
    AliasInUse: WireError("FAILED_PRECONDITION", 409, "invalid_request_error", "alias_in_use"),
    NoPreviousVersion: WireError("FAILED_PRECONDITION", 409, "invalid_request_error", "no_previous_version"),
    AdapterLoadFailed: WireError("UNAVAILABLE", 503, "server_error", "adapter_load_failed"),
    InvalidName: WireError("INVALID_ARGUMENT", 400, "invalid_request_error", "invalid_name"),
    InvalidTag: WireError("INVALID_ARGUMENT", 400, "invalid_request_error", "invalid_tag"),
    TenantExists: WireError("ALREADY_EXISTS", 409, "invalid_request_error", "tenant_exists"),
    TenantNotFound: WireError("NOT_FOUND", 404, "invalid_request_error", "tenant_not_found"),
    KeyNotFound: WireError("NOT_FOUND", 404, "invalid_request_error", "key_not_found"),
    StoreUnavailable: WireError("UNAVAILABLE", 503, "server_error", "store_unavailable"),
    StoreError: WireError("INTERNAL", 500, "server_error", "store_error"),
}

_INTERNAL: Final = _ERRORS[InternalError]


def wire_error(error: BaseException) -> WireError:
    """The row of the error table for `error`: that of its nearest listed base class, else an internal error."""
    for cls in type(error).__mro__:
        if cls in _ERRORS:
            return _ERRORS[cls]
    return _INTERNAL


def public_message(error: BaseException) -> str:
    """The text that a caller may see: an unexpected error's own text stays in the log."""
    if isinstance(error, GatewayError | StoreError):
        return str(error)
    return "The server failed on this request. Retry it; if it fails again, report its request id."
