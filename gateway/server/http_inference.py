"""OpenAI's routes for models and completions."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gateway.engine.request import TokenDelta
from gateway.errors import EngineUnavailable, wire_error
from gateway.server import openai_replies
from gateway.server.context import ServerContext
from gateway.server.http_routes import Caller, PolicyRoute, error_body, unless_gone
from gateway.server.inference import Generation, InferenceService
from gateway.server.models import ModelCard, ModelService
from gateway.server.openai_replies import ChatChunks, CompletionChunks
from gateway.server.openai_schema import ChatCompletionRequest, CompletionRequest
from gateway.server.sse import EventStream

logger = logging.getLogger(__name__)


def inference_routes(context: ServerContext) -> APIRouter:
    """/v1/models, /v1/completions and /v1/chat/completions."""
    router = APIRouter(route_class=PolicyRoute)
    inference = InferenceService(context)
    models = ModelService(context)
    started = int(time.time())

    @router.get("/v1/models")
    async def list_models(caller: Caller) -> Response:
        cards = await models.list(caller)
        return JSONResponse({"object": "list", "data": [_model_body(card, started) for card in cards]})

    @router.get("/v1/models/{model:path}")
    async def get_model(model: str, caller: Caller) -> Response:
        return JSONResponse(_model_body(await models.get(caller, model), started))

    @router.post("/v1/completions")
    async def create_completion(body: CompletionRequest, request: Request, caller: Caller) -> Response:
        sampling = body.to_sampling_params()
        call_id = f"cmpl-{request.state.call_id}"
        generation = await inference.complete(
            call_id, caller, body.model, body.prompt, sampling, body.priority or 0, body.caller
        )
        if body.stream:
            return await _stream(request, generation, CompletionChunks(generation, include_usage=body.include_usage))
        choices = await unless_gone(request.receive, generation.answer())
        return JSONResponse(openai_replies.completion_body(generation, choices))

    @router.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatCompletionRequest, request: Request, caller: Caller) -> Response:
        sampling = body.to_sampling_params()
        messages = [message.to_template() for message in body.messages]
        call_id = f"chatcmpl-{request.state.call_id}"
        generation = await inference.chat(
            call_id, caller, body.model, messages, sampling, body.priority or 0, body.caller
        )
        if body.stream:
            return await _stream(request, generation, ChatChunks(generation, include_usage=body.include_usage))
        choices = await unless_gone(request.receive, generation.answer())
        return JSONResponse(openai_replies.chat_body(generation, choices))

    return router


async def _stream(request: Request, generation: Generation, chunks: ChatChunks | CompletionChunks) -> Response:
    """The stream, once its first tokens are there: what fails before them is still a status of its own."""
    deltas = generation.deltas()
    first = await unless_gone(request.receive, anext(deltas))
    return EventStream(_events(first, deltas, chunks, request.state.request_id))


async def _events(
    first: list[TokenDelta],
    deltas: AsyncGenerator[list[TokenDelta], None],
    chunks: ChatChunks | CompletionChunks,
    request_id: str,
) -> AsyncGenerator[bytes, None]:
    async with aclosing(deltas):
        try:
            yield chunks.encode(first)
            async for more in deltas:
                yield chunks.encode(more)
            yield chunks.end()
        except Exception as error:
            if wire_error(error).http >= 500 and not isinstance(error, EngineUnavailable):
                logger.error("request %s failed in its stream", request_id, exc_info=error)
            yield openai_replies.event(error_body(error)) + openai_replies.DONE


def _model_body(card: ModelCard, started: int) -> dict[str, Any]:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created_at or started,
        "owned_by": card.tenant or "patchbay",
        "root": card.root,
        "parent": card.parent,
        "max_model_len": card.max_model_len,
    }
