"""The self-test of a version, new or tested again: a few short requests to a replica."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from adapters_store.errors import StoreError, StoreUnavailable
from adapters_store.reports import VersionReport
from adapters_store.strict_json import shown
from gateway.engine.request import AdapterRef, GenerateRequest, TokenLogprob, Usage
from gateway.engine.sampling_params import SamplingParams
from gateway.errors import AdapterNotFinite, EngineUnavailable, GatewayError, Overloaded

if TYPE_CHECKING:
    from adapters_store.golden import GoldenPrompt
    from adapters_store.manifest import AdapterManifest
    from adapters_store.versions import AdapterVersion
    from gateway.metrics import FrontDoorMetrics
    from gateway.server.router import Router

TENANT: Final = "@self-test"
"""Whose requests these are to the engine's fair shares and to metrics; no tenant can have this id."""

_PROMPT: Final = "The quick brown fox"  # less than a block of the cache: nothing of it is ever found there
_NUM_TOKENS: Final = 8
_NUM_TOP: Final = 20
_MOST_BIAS: Final = 100.0
_ROUNDING: Final = 1e-4  # nats; between batches fp32 differs by some 1e-6, and what trained at all by more than this
_RETRY_S: Final = 0.5
_NO_CHANGE: Final = "it changes nothing: its log-probabilities are the base's, as where every B is zero"
_NOT_FINITE: Final = "its logits are not finite (NaN or infinite)"


class SelfTest:
    """Runs versions on replicas as ordinary requests, in a share of their own beside the tenants'.

    A version passes when it changes the base's log-probabilities on a fixed prompt (one with trained tokens: on a
    prompt of these), all its logits are finite, and its greedy completions of the golden prompts begin as they should.
    timeout_s: for all of one test, waiting included.
    """

    def __init__(self, router: Router, metrics: FrontDoorMetrics, timeout_s: float) -> None:
        self._router = router
        self._metrics = metrics
        self._timeout_s = timeout_s

    async def run(self, version: AdapterVersion, golden: Sequence[GoldenPrompt] = ()) -> VersionReport:
        """Test a version. Raises `EngineUnavailable` when no replica could test it in time.

        A staged version fails where it cannot run. One that was tested before raises what keeps it from running, which
        is no verdict on it.
        """
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                report = await self._examine_when_possible(version, golden)
        except TimeoutError:
            self._metrics.self_test("unavailable", time.monotonic() - started)
            raise EngineUnavailable(
                f"No replica could test {version.ref} within {self._timeout_s:g} s; nothing was changed. Try later."
            ) from None
        seconds = time.monotonic() - started
        self._metrics.self_test("passed" if report.passed else "failed", seconds)
        if not report.passed and version.status != "quarantined":
            self._metrics.quarantined()
        return replace(report, seconds=round(seconds, 3))

    async def _examine_when_possible(self, version: AdapterVersion, golden: Sequence[GoldenPrompt]) -> VersionReport:
        while True:
            try:
                return await self._examine(version, golden)
            except (EngineUnavailable, Overloaded, StoreUnavailable):
                await asyncio.sleep(_RETRY_S)

    async def _examine(self, version: AdapterVersion, golden: Sequence[GoldenPrompt]) -> VersionReport:
        adapter = AdapterRef.of(version.ref, version.manifest)
        trained = await self._trained_tokens(version.manifest)
        runs = self._logprobs(None, trained), self._logprobs(adapter, trained)  # the base while the adapter comes in
        base, adapted = await asyncio.gather(*runs, return_exceptions=True)
        if isinstance(base, BaseException):
            raise base  # which is no fault of the adapter
        try:
            if isinstance(adapted, BaseException):
                raise adapted
            change = _largest_change(base, adapted)
            if change <= _ROUNDING:
                return _report(_NO_CHANGE, finite=True, largest_change=change)
            for number, prompt in enumerate(golden):
                said = await self._completion(prompt, adapter)
                if not said.startswith(prompt.completion):
                    reason = _not_golden(number, prompt.completion, said)
                    return _report(reason, finite=True, largest_change=change, num_golden=number)
        except (EngineUnavailable, Overloaded, StoreUnavailable):
            raise
        except AdapterNotFinite:
            return _report(_NOT_FINITE, finite=False)
        except (GatewayError, StoreError) as error:
            if version.status != "staged":
                raise
            return _report(f"it could not run: {error}")
        return _report(None, finite=True, largest_change=change, num_golden=len(golden))

    async def _trained_tokens(self, manifest: AdapterManifest) -> list[int]:
        """A prompt of the tokens that have rows of their own, as many as it has room for; empty where there are none.

        Twice, where that fits: what a prompt's first token is matters little to many bases.
        """
        ids = sorted({token_id for rows in manifest.token_rows for token_id in rows.ids or ()})
        return (2 * ids)[: (await self._router.info()).max_model_len - _NUM_TOKENS] if ids else []

    async def _logprobs(self, adapter: AdapterRef | None, trained: list[int]) -> list[TokenLogprob]:
        """Of the tokens that follow the fixed prompt; or that follow the trained tokens, and are of these."""
        request = _request(
            trained or _PROMPT,
            adapter,
            max_tokens=_NUM_TOKENS,
            logprobs=_NUM_TOP,  # by the model's own distribution, whatever the bias
            ignore_eos=True,
            logit_bias=dict.fromkeys(trained, _MOST_BIAS),
        )
        async with aclosing(self._router.generate(request)) as stream:
            return [logprob async for deltas in stream for delta in deltas for logprob in delta.logprobs]

    async def _completion(self, prompt: GoldenPrompt, adapter: AdapterRef) -> str:
        """The greedy completion, as far as it is to be compared."""
        text, cut = await self._beginning(prompt, adapter)
        if cut is not None:  # by the default length, before there was enough: ask again, now that the room is known
            room = (await self._router.info()).max_model_len - adapter.num_virtual_tokens - cut.prompt_tokens
            most = len(prompt.completion.encode()) + 1
            text, _ = await self._beginning(prompt, adapter, max_tokens=min(room, most))
        return text

    async def _beginning(self, prompt: GoldenPrompt, adapter: AdapterRef, **sampling: Any) -> tuple[str, Usage | None]:
        """Of the greedy completion as much as is to be compared; the counts where its length was cut before that."""
        text, cut = "", None
        async with aclosing(self._router.generate(_request(prompt.prompt, adapter, **sampling))) as stream:
            async for deltas in stream:
                text += "".join([delta.text for delta in deltas])
                if len(text) >= len(prompt.completion):
                    return text, None
                cut = deltas[-1].usage if deltas[-1].finish_reason == "length" else None
        return text, cut


def _request(prompt: str | Sequence[int], adapter: AdapterRef | None, **sampling: Any) -> GenerateRequest:
    name = f"selftest-{uuid.uuid4().hex}"
    params = SamplingParams(temperature=0.0, **sampling)
    return GenerateRequest(name, params, prompt=prompt, adapter=adapter, tenant=TENANT, cache_salt=name)


def _report(reason: str | None, **found: Any) -> VersionReport:
    return VersionReport(passed=reason is None, tested_at=int(time.time()), reason=reason, **found)


def _not_golden(number: int, wanted: str, said: str) -> str:
    return f"golden prompt {number + 1}: it says '{shown(said)}' where '{shown(wanted)}' was to come"


def _largest_change(base: Sequence[TokenLogprob], adapted: Sequence[TokenLogprob]) -> float:
    """The largest difference of a log-probability, in nats, as far as both said the same tokens before it."""
    largest = 0.0
    for ours, theirs in zip(base, adapted, strict=False):
        known = {token_id: logprob for token_id, _, logprob in theirs.top}
        changes = [abs(logprob - known[token_id]) for token_id, _, logprob in ours.top if token_id in known]
        largest = max(largest, abs(ours.logprob - theirs.logprob), *changes)
        if ours.token_id != theirs.token_id:
            break
    return largest
