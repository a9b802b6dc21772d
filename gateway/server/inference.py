"""Generation for both wires: from a caller's wish to engine requests, and from token deltas to one answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gateway.engine.request import AdapterRef, FinishReason, GenerateRequest, TokenDelta, TokenLogprob, Usage
from gateway.engine.sampling_params import SamplingParams
from gateway.errors import AdapterNotFinite, EngineUnavailable, InvalidRequest
from gateway.server.adapters import quarantine
from gateway.server.auth import ADMIN_SALT
from gateway.server.models import ModelService

if TYPE_CHECKING:
    from adapters_store.accounts import Principal
    from gateway.config import LimitsConfig
    from gateway.server.context import ServerContext


@dataclass(slots=True)
class Choice:
    """One finished completion."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason


@dataclass(slots=True)
class Generation:
    """One call under way: what is asked of the engine, and what comes back.

    model: the resolved version, "tenant/name:3", or the base. created: unix seconds. requests: one for each prompt;
    completion i of prompt p has index p * n + i. usage: of all prompts together, whole once `deltas` has ended.
    """

    id: str
    model: str
    created: int
    requests: Sequence[GenerateRequest]
    context: ServerContext
    usage: Usage = field(default_factory=lambda: Usage(0, 0))

    @property
    def num_choices(self) -> int:
        """Completions of all prompts together."""
        return len(self.requests) * self.requests[0].sampling.n

    async def deltas(self) -> AsyncGenerator[list[TokenDelta], None]:
        """The new tokens as they come. Closing it cancels the call; an error of the engine is raised."""
        source = self._one(0) if len(self.requests) == 1 else self._merged()
        async with aclosing(source):
            async for deltas in source:
                yield deltas

    async def answer(self) -> list[Choice]:
        """All choices, by index, once the last has finished. Cancelling the await cancels the call."""
        texts: list[list[str]] = [[] for _ in range(self.num_choices)]
        choices = [Choice("", [], [], "stop") for _ in texts]
        async with aclosing(self.deltas()) as stream:
            async for deltas in stream:
                for delta in deltas:
                    texts[delta.index].append(delta.text)
                    _extend(choices[delta.index], delta)
        for choice, parts in zip(choices, texts, strict=True):
            choice.text = "".join(parts)
        return choices

    async def _one(self, position: int) -> AsyncGenerator[list[TokenDelta], None]:
        request = self.requests[position]
        try:
            async with aclosing(self.context.router.generate(request)) as stream:
                async for deltas in stream:
                    for delta in deltas:
                        delta.index += position * request.sampling.n
                        if delta.usage is not None:
                            self.usage = _sum(self.usage, delta.usage)
                    yield deltas
        except AdapterNotFinite as error:
            assert request.adapter is not None
            await quarantine(self.context, request.adapter.name, error)
            raise

    async def _merged(self) -> AsyncGenerator[list[TokenDelta], None]:
        # A queue of one: a slow reader holds the pumps back, and the router merges what they have not taken.
        queue: asyncio.Queue[list[TokenDelta] | Exception | None] = asyncio.Queue(maxsize=1)
        pumps = [asyncio.create_task(self._pump(i, queue)) for i in range(len(self.requests))]
        try:
            live = len(pumps)
            while live:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    live -= 1
                else:
                    yield item
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, position: int, queue: asyncio.Queue[list[TokenDelta] | Exception | None]) -> None:
        try:
            async with aclosing(self._one(position)) as stream:
                async for deltas in stream:
                    await queue.put(deltas)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)


class InferenceService:
    """Turns calls of either wire into generations."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._models = ModelService(context)

    async def complete(
        self,
        call_id: str,
        principal: Principal,
        model: str,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams,
        priority: int = 0,
        user: str | None = None,
    ) -> Generation:
        """A generation that continues each of `prompts`.

        user: whose requests all go to one side of an alias with a canary; without it each goes by itself. Raises
        `InvalidRequest`, `ModelNotFound`, and `VersionNotReady` for a version that is quarantined or still tested.
        """
        most = self._context.config.limits.max_prompts
        if len(prompts) > most:
            raise InvalidRequest(f"at most {most} prompts fit one request, not {len(prompts)}", param="prompt")
        bodies: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
        return await self._generation(call_id, principal, model, bodies, sampling, priority, user)

    async def chat(
        self,
        call_id: str,
        principal: Principal,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        sampling: SamplingParams,
        priority: int = 0,
        user: str | None = None,
    ) -> Generation:
        """A generation that answers `messages`; otherwise as `complete`."""
        return await self._generation(call_id, principal, model, [{"messages": messages}], sampling, priority, user)

    async def _generation(
        self,
        call_id: str,
        principal: Principal,
        model: str,
        bodies: Sequence[Mapping[str, Any]],
        sampling: SamplingParams,
        priority: int,
        user: str | None,
    ) -> Generation:
        self._check_ready()
        limits, tenant = self._context.config.limits, principal.tenant or ""
        check_limits(sampling, limits)
        if principal.tenant is not None:
            check_priority(priority, limits)
        served, adapter = await self._resolve(principal, model, user or call_id)
        requests = [
            GenerateRequest(
                request_id=call_id if len(bodies) == 1 else f"{call_id}-{position}",
                sampling=sampling,
                adapter=adapter,
                tenant=tenant,
                cache_salt=tenant or ADMIN_SALT,
                priority=priority,
                tenant_weight=limits.tenant_weights.get(tenant, 1.0),
                **body,
            )
            for position, body in enumerate(bodies)
        ]
        return Generation(call_id, served, int(time.time()), requests, self._context)

    async def _resolve(self, principal: Principal, model: str, caller: str) -> tuple[str, AdapterRef | None]:
        base = (await self._context.router.info()).model_name
        if model == base:
            return base, None
        version = await self._models.resolve(principal, model, caller)
        return version.ref, AdapterRef.of(version.ref, version.manifest)

    def _check_ready(self) -> None:
        reason = self._context.readiness.reason
        if reason is not None:
            raise EngineUnavailable(f"No requests are taken here now: {reason}. Retry in a few seconds.")


def check_limits(sampling: SamplingParams, limits: LimitsConfig) -> None:
    """Raises `InvalidRequest` naming the field that passes a cap."""
    _at_most("n", sampling.n, limits.max_n)
    _at_most("logprobs", sampling.logprobs or 0, limits.max_logprobs)
    _at_most("stop", len(sampling.stop), limits.max_stop, "entries")
    _at_most("stop", max(map(len, sampling.stop), default=0), limits.max_stop_chars, "characters each")
    _at_most("stop_token_ids", len(sampling.stop_token_ids), limits.max_stop, "entries")
    _at_most("logit_bias", len(sampling.logit_bias), limits.max_logit_bias, "entries")


def check_priority(priority: int, limits: LimitsConfig) -> None:
    """Raises `InvalidRequest` when a tenant asks to run earlier than the operator lets it."""
    if priority < -limits.max_priority_boost:
        raise InvalidRequest(
            f"priority may be no lower than {-limits.max_priority_boost} here, not {priority}: lower runs earlier, and "
            "the operator says how far a tenant may go (limits.max_priority_boost)",
            param="priority",
        )


def _at_most(name: str, value: int, limit: int, unit: str = "") -> None:
    if value > limit:
        raise InvalidRequest(f"{name} may be at most {limit}{unit and ' ' + unit}, not {value}", param=name)


def _extend(choice: Choice, delta: TokenDelta) -> None:
    choice.token_ids += delta.token_ids
    choice.logprobs += delta.logprobs
    if delta.finish_reason is not None:
        choice.finish_reason = delta.finish_reason


def _sum(a: Usage, b: Usage) -> Usage:
    return Usage(
        a.prompt_tokens + b.prompt_tokens,
        a.completion_tokens + b.completion_tokens,
        a.cached_tokens + b.cached_tokens,
        a.accepted_tokens + b.accepted_tokens,
        a.rejected_tokens + b.rejected_tokens,
    )
