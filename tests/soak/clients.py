"""Clients that stream answers, each into the book."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import httpx

from tests.soak.answers import LONGEST, SHORTEST, Answers
from tests.soak.book import ALIASES, HANG_S, Answer, Book


class Clients:
    """Streams over HTTP, each on a connection of its own, so that any front door may have it."""

    def __init__(self, book: Book, answers: Answers, url: str, keys: Mapping[str, str], rng: Random) -> None:
        self._book = book
        self._prompts = answers.prompts
        self._url = url
        self._keys = keys
        self._rng = rng

    async def run(self, is_over: Callable[[], bool], concurrency: int) -> None:
        """Ask until it is over."""
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self._url, limits=limits, timeout=HANG_S, trust_env=False) as http:

            async def client() -> None:
                while not is_over():
                    await self.ask(http, *self._choose())

            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(client())

    async def ask(self, http: httpx.AsyncClient, asked: str, key: str) -> Answer:
        """One request to its end, which goes into the book."""
        rng = self._rng
        answer = Answer(asked, rng.randrange(len(self._prompts)), rng.choice((SHORTEST, 2 * SHORTEST, LONGEST)))
        self._book.answers.append(answer)
        body = {
            "model": asked.removesuffix("@default"),
            "prompt": self._prompts[answer.prompt],
            "max_tokens": answer.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        leaves_after = rng.randint(1, 8) if rng.random() < 0.05 else None
        try:
            await self._stream(http, body, key, answer, leaves_after)
        except httpx.TimeoutException:
            answer.end = "hung"
        except httpx.TransportError:
            answer.end = "cut"
        answer.ended = time.monotonic()
        answer.decided = min(answer.decided, answer.ended)
        self._book.num_done += answer.end == "done"
        if answer.end == "engine_unavailable":
            await asyncio.sleep(0.05)
        return answer

    async def _stream(
        self, http: httpx.AsyncClient, body: Any, key: str, answer: Answer, leaves_after: int | None
    ) -> None:
        headers, count = {"authorization": f"Bearer {key}"}, 0
        async with http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            answer.decided = time.monotonic()
            if response.status_code != 200:
                answer.end = json.loads(await response.aread())["error"]["code"]
                return
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    _take(answer, line.removeprefix("data: "))
                    count += 1
                    if count == leaves_after and answer.end == "truncated":
                        answer.end = "left"
                        return

    def _choose(self) -> tuple[str, str]:
        """What to ask for, and by whose key."""
        rng, kind = self._rng, self._rng.random()
        if kind < 0.1:
            return self._book.base, rng.choice(list(self._keys.values()))
        refs = self._book.refs()
        if kind < 0.3 and refs:
            asked = rng.choice([ref for ref in refs if not self._book.is_refused(ref)] or refs)
            asked = rng.choice(refs) if rng.random() < 0.1 else asked
        else:
            name = rng.choice(list(ALIASES))
            asked = f"{name}@{rng.choice(ALIASES[name])}"
        return asked, self._keys[asked.partition("/")[0]]


def _take(answer: Answer, data: str) -> None:
    """One event of a stream."""
    if data == "[DONE]":
        if answer.end == "truncated" and answer.reason is not None:
            answer.end = "done"
        return
    chunk = json.loads(data)
    if "error" in chunk:
        answer.end = chunk["error"]["code"]
        return
    answer.models.add(chunk["model"])
    for choice in chunk["choices"]:
        answer.text += choice["text"]
        answer.reason = choice["finish_reason"] or answer.reason
    if chunk.get("usage"):
        answer.cached = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]
