"""Requests, token deltas and errors to and from the messages of protos/gateway/rpc/delivery.proto."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Final, get_args

from adapters_store import errors as store_errors
from gateway import errors
from gateway.engine.request import AdapterRef, FinishReason, GenerateRequest, TokenDelta, TokenLogprob, Usage
from gateway.engine.sampling_params import SamplingParams
from gateway.rpc import delivery_pb2 as pb

# The errors that a message alone makes again; of others, `AdapterLoadFailed` travels with its data, and a subclass that
# is not here as its nearest base.
_ERRORS: Final[dict[str, type[Exception]]] = {
    cls.__name__: cls
    for cls in (
        errors.GatewayError,
        errors.InvalidRequest,
        errors.ContextLengthExceeded,
        errors.ModelNotFound,
        errors.NotFound,
        errors.Conflict,
        errors.Overloaded,
        errors.AdapterNotFinite,
        errors.RequestCancelled,
        errors.EngineUnavailable,
        errors.InternalError,
        store_errors.StoreError,
        store_errors.StoreUnavailable,
    )
}
_FINISH_REASONS: Final[dict[str, FinishReason]] = {reason: reason for reason in get_args(FinishReason)}
_SAMPLING_FIELDS: Final = tuple(field.name for field in dataclasses.fields(SamplingParams))
_ADAPTER_FIELDS: Final = tuple(field.name for field in dataclasses.fields(AdapterRef))
_USAGE_FIELDS: Final = tuple(field.name for field in dataclasses.fields(Usage))


def encode_request(request: GenerateRequest) -> pb.Request:
    """The message of a request. Raises `InvalidRequest` for text or numbers that cannot be sent at all."""
    adapter = request.adapter
    try:
        encoded = pb.Request(
            request_id=request.request_id,
            sampling=_encode_sampling(request.sampling),
            adapter=_encode_adapter(adapter) if adapter is not None else None,
            tenant=request.tenant,
            cache_salt=request.cache_salt,
            priority=request.priority,
            tenant_weight=request.tenant_weight,
        )
        if request.messages is not None:
            encoded.messages = json.dumps([dict(message) for message in request.messages], ensure_ascii=False).encode()
        elif isinstance(request.prompt, str):
            encoded.text = request.prompt
        else:
            encoded.token_ids.ids.extend(request.prompt or ())
    except ValueError as error:  # half of a surrogate pair, or a number beyond 64 bits
        raise errors.InvalidRequest(f"The request holds a value that is out of range: {error}") from error
    return encoded


def decode_request(encoded: pb.Request) -> GenerateRequest:
    """The request that `encode_request` was given."""
    kind = encoded.WhichOneof("prompt")
    prompt: str | list[int] | None = None
    if kind != "messages":
        prompt = encoded.text if kind == "text" else list(encoded.token_ids.ids)
    return GenerateRequest(
        request_id=encoded.request_id,
        sampling=_decode_sampling(encoded.sampling),
        prompt=prompt,
        messages=json.loads(encoded.messages) if kind == "messages" else None,
        adapter=_decode_adapter(encoded.adapter) if encoded.HasField("adapter") else None,
        tenant=encoded.tenant,
        cache_salt=encoded.cache_salt,
        priority=encoded.priority,
        tenant_weight=encoded.tenant_weight,
    )


def encode_step(deltas: list[TokenDelta]) -> pb.ReplicaMessage:
    """One message with all of `deltas`."""
    message = pb.ReplicaMessage()
    add = message.step.deltas.add
    for delta in deltas:
        encoded = add(request_id=delta.request_id, index=delta.index, text=delta.text, token_ids=delta.token_ids)
        if delta.logprobs:
            encoded.logprobs.extend(_encode_logprob(logprob) for logprob in delta.logprobs)
        if delta.finish_reason is not None:
            _encode_end(delta, encoded)
    return message


def decode_delta(delta: pb.Delta) -> TokenDelta:
    """The `TokenDelta` that `encode_step` was given."""
    decoded = TokenDelta(delta.request_id, delta.index, delta.text, list(delta.token_ids))
    if delta.logprobs:
        decoded.logprobs = [_decode_logprob(logprob) for logprob in delta.logprobs]
    if delta.finish_reason:
        decoded.finish_reason = _FINISH_REASONS[delta.finish_reason]
        if delta.HasField("usage"):
            usage = delta.usage
            decoded.usage = Usage(**{name: getattr(usage, name) for name in _USAGE_FIELDS})
        if delta.HasField("error"):
            decoded.error = decode_error(delta.error)
    return decoded


def encode_error(error: BaseException) -> pb.Error:
    """The error as far as a caller may see it: one that is not of ours loses its own text."""
    if isinstance(error, store_errors.AdapterLoadFailed):
        return pb.Error(type="AdapterLoadFailed", message=error.reason, digest=error.digest)
    name = next((cls.__name__ for cls in type(error).__mro__ if _ERRORS.get(cls.__name__) is cls), None)
    return pb.Error(
        type=name or "InternalError",
        message=errors.public_message(error),
        param=getattr(error, "param", None) or "",
        retry_after=getattr(error, "retry_after", 0.0),
    )


def decode_error(error: pb.Error) -> Exception:
    """An error of the same type, text and data as the one encoded."""
    if error.type == "AdapterLoadFailed":
        return store_errors.AdapterLoadFailed(error.digest, error.message)
    cls = _ERRORS.get(error.type, errors.InternalError)
    decoded = cls(error.message)
    if isinstance(decoded, errors.GatewayError | store_errors.StoreError):
        decoded.param = error.param or None
    if isinstance(decoded, errors.Overloaded):
        decoded.retry_after = error.retry_after
    return decoded


def _encode_adapter(adapter: AdapterRef) -> pb.Adapter:
    return pb.Adapter(**{name: getattr(adapter, name) for name in _ADAPTER_FIELDS})


def _decode_adapter(encoded: pb.Adapter) -> AdapterRef:
    return AdapterRef(**{name: getattr(encoded, name) for name in _ADAPTER_FIELDS})


def _encode_sampling(sampling: SamplingParams) -> pb.Sampling:
    values = {name: getattr(sampling, name) for name in _SAMPLING_FIELDS}
    return pb.Sampling(**{name: value for name, value in values.items() if value is not None})


def _decode_sampling(encoded: pb.Sampling) -> SamplingParams:
    values: dict[str, Any] = {name: getattr(encoded, name) for name in _SAMPLING_FIELDS}
    for name in ("seed", "max_tokens", "logprobs"):
        if not encoded.HasField(name):
            values[name] = None
    for name in ("stop", "stop_token_ids"):
        values[name] = tuple(values[name])
    return SamplingParams(**values | {"logit_bias": dict(values["logit_bias"])})


def _encode_end(delta: TokenDelta, encoded: pb.Delta) -> None:
    encoded.finish_reason = delta.finish_reason or ""
    if delta.usage is not None:
        encoded.usage.CopyFrom(pb.Usage(**{name: getattr(delta.usage, name) for name in _USAGE_FIELDS}))
    if delta.error is not None:
        encoded.error.CopyFrom(encode_error(delta.error))


def _encode_logprob(logprob: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=logprob.token_id,
        token=logprob.token,
        logprob=logprob.logprob,
        top=[pb.Alternative(token_id=i, token=t, logprob=p) for i, t, p in logprob.top],
    )


def _decode_logprob(logprob: pb.TokenLogprob) -> TokenLogprob:
    top = tuple((other.token_id, other.token, other.logprob) for other in logprob.top)
    return TokenLogprob(logprob.token_id, logprob.token, logprob.logprob, top)
