"""The gRPC service patchbay.v1.Inference."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final

from gateway.engine.request import TokenDelta, TokenLogprob, Usage
from gateway.engine.sampling_params import SamplingParams
from gateway.errors import InvalidRequest
from gateway.rpc import patchbay_pb2 as pb
from gateway.rpc import patchbay_pb2_grpc as pb_grpc
from gateway.server.context import ServerContext
from gateway.server.grpc_calls import Call
from gateway.server.inference import Choice, Generation, InferenceService

_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_FINISH: Final = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
}
_SCALARS: Final = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "n", "max_tokens", "min_tokens", "ignore_eos", "logprobs", "skip_special_tokens"),
    "num_speculative_tokens",
)


class InferenceServicer(pb_grpc.InferenceServicer):
    """Each method gets a `Call` from the guard in place of grpc's context."""

    def __init__(self, context: ServerContext) -> None:
        self._inference = InferenceService(context)

    async def Generate(self, request: pb.GenerateRequest, call: Call) -> pb.Completion:  # noqa: N802
        """Continue a prompt."""
        return await _answer(await self._generate(request, call))

    async def GenerateStream(  # noqa: N802
        self, request: pb.GenerateRequest, call: Call
    ) -> AsyncGenerator[pb.CompletionChunk, None]:
        """Continue a prompt, step by step."""
        async with aclosing(_chunks(await self._generate(request, call))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def Chat(self, request: pb.ChatRequest, call: Call) -> pb.Completion:  # noqa: N802
        """Answer a conversation."""
        return await _answer(await self._chat(request, call))

    async def ChatStream(  # noqa: N802
        self, request: pb.ChatRequest, call: Call
    ) -> AsyncGenerator[pb.CompletionChunk, None]:
        """Answer a conversation, step by step."""
        async with aclosing(_chunks(await self._chat(request, call))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _generate(self, request: pb.GenerateRequest, call: Call) -> Generation:
        _require_model(request.model)
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequest("the prompt is missing: give text or token_ids", param="prompt")
        prompt = request.text if kind == "text" else list(request.token_ids.ids)
        sampling = _sampling_params(request.sampling)
        call_id = f"cmpl-{call.id}"
        return await self._inference.complete(
            call_id, call.principal, request.model, [prompt], sampling, request.priority, request.user or None
        )

    async def _chat(self, request: pb.ChatRequest, call: Call) -> Generation:
        _require_model(request.model)
        messages = _messages(request.messages)
        sampling = _sampling_params(request.sampling)
        call_id = f"chatcmpl-{call.id}"
        return await self._inference.chat(
            call_id, call.principal, request.model, messages, sampling, request.priority, request.user or None
        )


async def _answer(generation: Generation) -> pb.Completion:
    choices = await generation.answer()
    return pb.Completion(
        id=generation.id,
        created=generation.created,
        model=generation.model,
        choices=[_choice(index, choice) for index, choice in enumerate(choices)],
        usage=_usage(generation.usage),
    )


async def _chunks(generation: Generation) -> AsyncGenerator[pb.CompletionChunk, None]:
    async with aclosing(generation.deltas()) as stream:
        async for deltas in stream:
            chunk = pb.CompletionChunk(
                id=generation.id,
                created=generation.created,
                model=generation.model,
                choices=[_delta(delta) for delta in deltas],
            )
            if any(delta.usage is not None for delta in deltas):
                chunk.usage.CopyFrom(_usage(generation.usage))
            yield chunk


def _choice(index: int, choice: Choice) -> pb.Choice:
    return pb.Choice(
        index=index,
        text=choice.text,
        token_ids=choice.token_ids,
        finish_reason=_FINISH[choice.finish_reason],
        logprobs=[_logprob(logprob) for logprob in choice.logprobs],
    )


def _delta(delta: TokenDelta) -> pb.Choice:
    return pb.Choice(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=_FINISH[delta.finish_reason],
        logprobs=[_logprob(logprob) for logprob in delta.logprobs],
    )


def _logprob(logprob: TokenLogprob) -> pb.TokenLogprob:
    top = [pb.TopLogprob(token_id=token, token=text, logprob=value) for token, text, value in logprob.top]
    return pb.TokenLogprob(token_id=logprob.token_id, token=logprob.token, logprob=logprob.logprob, top=top)


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        accepted_prediction_tokens=usage.accepted_tokens,
        rejected_prediction_tokens=usage.rejected_tokens,
    )


def _sampling_params(params: pb.SamplingParams) -> SamplingParams:
    given = {name: getattr(params, name) for name in _SCALARS if params.HasField(name)}
    return SamplingParams(
        stop=tuple(params.stop),
        stop_token_ids=tuple(params.stop_token_ids),
        logit_bias=dict(params.logit_bias),
        **given,
    )


def _messages(messages: Sequence[pb.Message]) -> list[dict[str, str]]:
    if not messages:
        raise InvalidRequest("there must be at least one message", param="messages")
    for position, message in enumerate(messages):
        if message.role not in _ROLES:
            raise InvalidRequest(
                f"the role must be system, user or assistant, not {message.role[:40]!r}",
                param=f"messages[{position}].role",
            )
    return [{"role": _ROLES[message.role], "content": message.content} for message in messages]


def _require_model(model: str) -> None:
    if not model:
        raise InvalidRequest("the model is missing: name an adapter or the base", param="model")
