"""Hot swaps under load: clients that stream answers, a swapper that moves aliases, a killer, and the book of it all.

Times are of `time.monotonic`. A name is "tenant/name", an alias "tenant/name@alias", a version or ref "tenant/name:3".
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import httpx

from tests.soak.answers import LONGEST, SHORTEST, Answers, Content
from tests.soak.fleet import Fleet
from tests.soak.serve_fleet import ServeFleet

AnyFleet = Fleet | ServeFleet
GRACE_S = 1.0  # by when a front door has noticed that a process is gone
HANG_S = 60.0
ALIASES: Mapping[str, tuple[str, ...]] = {
    "acme/support": ("default", "prod"),
    "globex/support": ("default", "prod"),
    "acme/brief": ("default",),  # which is given up and taken again
}


@dataclass
class Span:
    """That something may have been so from `since` to `until`. sure: from when on it was so for certain."""

    value: str | None
    since: float
    sure: float
    until: float = inf

    def touches(self, begin: float, end: float) -> bool:
        return self.since <= end and begin <= self.until

    def covers(self, begin: float, end: float) -> bool:
        return self.sure <= begin and end <= self.until


_NEVER: Set[str | None] = frozenset()
_NOT_NAMED: Set[str | None] = frozenset((None,))


@dataclass
class Kill:
    """back: when all was whole again."""

    what: str
    at: float
    back: float = inf


@dataclass
class Answer:
    """One request and how it ended: "done", "left" by the client, "cut" off, "truncated", "hung", or an error's code.

    decided: when its version was certainly chosen. cached: prompt tokens that the prefix cache had.
    """

    asked: str
    prompt: int
    max_tokens: int
    started: float = field(default_factory=time.monotonic)
    decided: float = inf
    ended: float = inf
    models: set[str] = field(default_factory=set)
    text: str = ""
    reason: str | None = None
    cached: int = 0
    end: str = "truncated"


class Book:
    """What is known of versions and aliases, and every answer. base: the base's name."""

    def __init__(self, answers: Answers, base: str) -> None:
        self.base = base
        self.contents: dict[str, Content] = {}
        self.kills: list[Kill] = []
        self.answers: list[Answer] = []
        self.num_swaps = 0
        self.num_done = 0
        self._expected = answers
        self._named: dict[str, list[Span]] = {
            f"{name}@{alias}": [Span(None, 0.0, 0.0)] for name, aliases in ALIASES.items() for alias in aliases
        }
        self._refused: dict[str, list[Span]] = {}

    def observe(self, ready: set[str], known: Iterable[str], named: Mapping[str, set[str]], since: float) -> None:
        """What holds now. Whatever is not as it was before has changed after `since`.

        ready: of the `known` versions those that are served. named: the versions behind each alias.
        """
        now = time.monotonic()
        for ref in known:
            _become(self._refused.setdefault(ref, []), _NEVER if ref in ready else _NOT_NAMED, since, now)
        for alias, refs in named.items():
            self.num_swaps += _become(self._named[alias], refs or _NOT_NAMED, since, now)

    def refs(self) -> list[str]:
        """All versions ever, also those that are refused."""
        return list(self._refused)

    def is_refused(self, ref: str) -> bool:
        return any(span.until == inf for span in self._refused[ref])

    def problems(self) -> list[str]:
        """What must not have happened."""
        judged = ((answer, self._problem(answer)) for answer in self.answers)
        return [f"{problem}: {answer}" for answer, problem in judged if problem is not None]

    def _problem(self, answer: Answer) -> str | None:
        if answer.ended - answer.started > HANG_S:
            return "it hung"
        if len(answer.models) > 1:
            return "more than one version in one answer"
        if answer.models and (wrong := self._wrong(answer, *answer.models)):
            return wrong
        match answer.end:
            case "done" | "left":
                return None
            case "cut":
                return None if self._excused(answer, "door") else "cut off without a kill"
            case "engine_unavailable":
                return None if self._excused(answer, "door", "replica") else "no replica, without a kill"
            case "model_not_found" | "version_not_ready":
                return None if self._may_be_refused(answer) else "refused, though it was there"
            case _:
                return "it ended as nothing may"

    def _wrong(self, answer: Answer, model: str) -> str | None:
        content = self.contents.get(model) if model != self.base else self._expected.base
        if content is None:
            return "a version that nobody made"
        if "@" in answer.asked:
            spans = [span for span in self._named[answer.asked] if span.value == model]
            if not any(span.touches(answer.started, answer.decided) for span in spans):
                return "a version that the alias did not name"
        elif answer.asked != model:
            return "another version than was asked for"
        if any(span.covers(answer.started, answer.decided) for span in self._refused.get(model, ())):
            return "a version that was deleted or quarantined"
        wanted = self._expected.text(content.tokens[answer.prompt][: answer.max_tokens])
        if answer.end == "done":
            return None if (answer.text, answer.reason) == (wanted, "length") else f"not {wanted!r}"
        return None if wanted.startswith(answer.text) else f"not a part of {wanted!r}"

    def _excused(self, answer: Answer, *kinds: str) -> bool:
        """Whether a kill explains it: of what it ran on, or of a door that came up again and was not ready yet."""
        for kill in self.kills:
            until = max(kill.at + GRACE_S, kill.back if kill.what.startswith("door") else 0.0)
            if kill.what.startswith(kinds) and kill.at <= answer.ended and answer.started <= until:
                return True
        return False

    def _may_be_refused(self, answer: Answer) -> bool:
        spans = self._named.get(answer.asked) or self._refused.get(answer.asked, [])
        return any(span.value is None and span.touches(answer.started, answer.decided) for span in spans)

    def tally(self) -> str:
        """The run in a line."""
        ends = Counter(answer.end for answer in self.answers)
        kills = Counter(kill.what.partition("-")[0] for kill in self.kills)
        cached = sum(answer.cached for answer in self.answers)
        return (
            f"{len(self.answers)} requests {dict(ends)}, {self.num_swaps} swaps, {len(self.contents)} versions, "
            f"kills {dict(kills)}, {cached} prompt tokens from the prefix cache"
        )


def _become(spans: list[Span], values: Set[str | None], since: float, now: float) -> bool:
    """Let exactly these values hold from now on; whether that is new."""
    live = {span.value: span for span in spans if span.until == inf}
    for value in live.keys() - values:
        live[value].until = now
    spans.extend(Span(value, since, now) for value in values - live.keys())
    return live.keys() != values


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


class Adapter:
    """One adapter as the gateway tells of it."""

    def __init__(self, name: str, body: Mapping[str, Any] | None) -> None:
        body = body or {"versions": [], "aliases": {}, "canaries": {}}
        self.name = name
        self.versions = {version["version"]: version for version in body["versions"]}
        self.own: dict[str, int] = body["aliases"]
        self.canaries: dict[str, int] = {alias: canary["version"] for alias, canary in body["canaries"].items()}

    def ready(self) -> list[int]:
        return [number for number, version in self.versions.items() if version["status"] == "ready"]

    def unnamed(self, status: str) -> list[int]:
        """The versions of this status that no alias names."""
        named = {*self.own.values(), *self.canaries.values()}
        return [n for n, version in self.versions.items() if version["status"] == status and n not in named]

    def named(self) -> dict[str, set[str]]:
        """Alias -> versions behind it."""
        numbers = {
            alias: {self.own[alias], self.canaries.get(alias, self.own[alias])} if alias in self.own else set()
            for alias in ALIASES[self.name]
        }
        return {f"{self.name}@{alias}": {f"{self.name}:{n}" for n in found} for alias, found in numbers.items()}


class Refused(Exception):
    """A call of the swapper's ended with an error: its code."""


class Swapper:
    """Changes one adapter after the other; after each change it looks what holds, and tells the book.

    A call that a kill cut off is done or not done; what was acknowledged must be there. The last two contents are of
    the adapter "brief" alone, one at a time, so that their bytes go when it is deleted. waits_for_purge: the share of
    such deletions that it waits for.
    """

    def __init__(
        self,
        book: Book,
        answers: Answers,
        fleet: AnyFleet,
        broken: Path,
        rng: Random,
        *,
        waits_for_purge: float,
    ) -> None:
        self._book = book
        self._fleet = fleet
        self._contents, self._spare = answers.contents[:-2], answers.contents[-2:]
        self._broken = broken
        self._rng = rng
        self._waits_for_purge = waits_for_purge
        self._digests: dict[str, Content] = {}
        self.done: Counter[str] = Counter()

    async def prepare(self) -> None:
        """Publish every content once, before any kill: from then on a digest tells what a version is."""
        async with self._client() as http:
            for name, aliases in ALIASES.items():
                contents = self._spare if name == "acme/brief" else self._contents
                for content, alias in zip(contents, aliases * len(contents), strict=False):
                    since = time.monotonic()
                    version = await self._publish(http, name, content, alias)
                    self._digests[version["digest"]] = content
                    await self.look(http, name, since)

    async def run(self, is_over: Callable[[], bool]) -> None:
        """Change until it is over."""
        async with self._client() as http:
            while not is_over():
                name = self._rng.choice(list(ALIASES))
                change, since = self._draw(name), time.monotonic()
                before = await self.look(http, name, since)
                since = time.monotonic()
                try:
                    await change(http, before)
                    self.done[change.__name__] += 1
                except (httpx.TransportError, Refused) as error:
                    self._check_excused(error, since)
                    self.done["failed"] += 1
                await self.look(http, name, since)

    async def look(self, http: httpx.AsyncClient, name: str, since: float) -> Adapter:
        """What holds of an adapter now, for the book too."""
        adapter = Adapter(name, await self._read(http, name))
        for number, version in adapter.versions.items():
            content = self._digests.get(version["digest"], _NOTHING)
            assert self._book.contents.setdefault(f"{name}:{number}", content) is content, "a version has changed"
        listed = {f"{name}:{number}" for number, v in adapter.versions.items() if v["status"] != "staged"}
        known = {ref for ref in self._book.refs() if ref.startswith(f"{name}:")} | listed
        self._book.observe({f"{name}:{n}" for n in adapter.ready()}, known, adapter.named(), since)
        return adapter

    def _draw(self, name: str) -> Callable[[httpx.AsyncClient, Adapter], Awaitable[None]]:
        if name == "acme/brief":
            return self._rng.choice([self.recycle, self.upload, self.flip])
        weights = {
            self.upload: 4,
            self.flip: 6,
            self.split: 4,
            self.roll_back: 3,
            self.delete: 4,
            self.quarantine: 1,
            self.heal: 1,
            self.test_again: 1,
            self.upload_broken: 1,
        }
        return self._rng.choices(list(weights), list(weights.values()))[0]

    async def upload(self, http: httpx.AsyncClient, adapter: Adapter) -> None:
        contents = self._spare if adapter.name == "acme/brief" else self._contents
        content, alias = self._rng.choice(contents), self._rng.choice(ALIASES[adapter.name])
        version = await self._publish(http, adapter.name, content, alias)
        after = Adapter(adapter.name, await self._read(http, adapter.name))
        assert after.own[alias] == version["version"], "an upload that was acknowledged is not there"

    async def flip(self, http: httpx.AsyncClient, adapter: Adapter) -> None:
        if ready := adapter.ready():
            await self._point(http, adapter, {"version": self._rng.choice(ready)})

    async def split(self, http: httpx.AsyncClient, adapter: Adapter) -> None:
        if len(ready := adapter.ready()) > 1:
            own, canary = self._rng.sample(ready, 2)
            split = {"version": canary, "percent": self._rng.randint(1, 100)}
            await self._point(http, adapter, {"version": own, "canary": split})

    async def roll_back(self, http: httpx.AsyncClient, adapter: Adapter) -> None:
        alias = self._rng.choice(list(adapter.own))
        with suppress(NothingBefore):
            await self._call(http, "POST", f"{adapter.name}/rollback", json={"alias": alias})

    async def delete(self, http: httpx.AsyncClient, adapter: Adapter) -> None:
        for number in adapter.unnamed("ready")[2:]:
            await self._call(http, "DELETE", f"{adapter.name}/versions/{number}")

    async def quarantine(self, http: httpx.AsyncClient, adapter: Adapter) -> None:
        """By a golden prompt that cannot come out."""
        for number in adapter.unnamed("ready")[:1]:
            golden = [{"prompt": "the quick", "completion": "\u2603"}]
            tested = await self._call(http, "POST", f"{adapter.name}/versions/{number}/test", json={"golden": golden})
            assert tested["status"] == "quarantined"

    async def heal(self, http: httpx.AsyncClient, adapter: Adapter) -> None:
        """Only what is sound passes."""
        for number in adapter.unnamed("quarantined")[:1]:
            tested = await self._call(http, "POST", f"{adapter.name}/versions/{number}/test", json={})
            is_sound = tested["digest"] in self._digests
            assert tested["status"] == ("ready" if is_sound else "quarantined")

    async def test_again(self, http: httpx.AsyncClient, adapter: Adapter) -> None:
        """What serves, while it serves."""
        number = self._rng.choice(list(adapter.own.values()))
        tested = await self._call(http, "POST", f"{adapter.name}/versions/{number}/test", json={})
        assert tested["status"] == "ready"

    async def upload_broken(self, http: httpx.AsyncClient, adapter: Adapter) -> None:
        with suppress(SelfTestDidFail):
            await self._publish(http, adapter.name, Content("broken", self._broken), "default")
            raise AssertionError("a broken version was published")

    async def recycle(self, http: httpx.AsyncClient, adapter: Adapter) -> None:
        """Give the name up with all its versions; what takes it next is another content."""
        had = [adapter.versions[number]["digest"] for number in adapter.own.values()]
        if adapter.own:
            since = time.monotonic()
            await self._call(http, "POST", "/v1/unload_lora_adapter", json={"lora_name": adapter.name})
            await self.look(http, adapter.name, since)
        for number in adapter.versions:
            await self._call(http, "DELETE", f"{adapter.name}/versions/{number}")
        if self._rng.random() < self._waits_for_purge:
            await self._wait_purged({version["digest"] for version in adapter.versions.values()})
            self.done["purged"] += 1
        others = [content for content in self._spare if content not in map(self._digests.get, had)]
        await self._publish(http, adapter.name, others[0], "default")

    async def _wait_purged(self, digests: set[str]) -> None:
        deadline = time.monotonic() + HANG_S
        while any(self._fleet.blob(digest).exists() for digest in digests):
            assert time.monotonic() < deadline, "what was deleted is not purged"
            await asyncio.sleep(0.1)

    async def _point(self, http: httpx.AsyncClient, adapter: Adapter, body: Mapping[str, Any]) -> None:
        alias = self._rng.choice(ALIASES[adapter.name])
        answer = await self._call(http, "PUT", f"{adapter.name}/aliases/{alias}", json=body)
        assert answer["aliases"][alias] == body["version"]

    async def _publish(self, http: httpx.AsyncClient, name: str, content: Content, alias: str) -> dict[str, Any]:
        assert content.folder is not None
        files = [("files", (path.name, path.read_bytes())) for path in sorted(content.folder.iterdir())]
        form = {"name": name, "alias": alias}
        version: dict[str, Any] = await self._call(http, "POST", "/v1/adapters", data=form, files=files)
        return version

    async def _read(self, http: httpx.AsyncClient, name: str) -> dict[str, Any] | None:
        """Asked until a front door answers."""
        deadline = time.monotonic() + HANG_S
        while True:
            with suppress(httpx.TransportError):
                response = await http.get(f"/v1/adapters/{name}")
                if response.status_code == 404:
                    return None
                response.raise_for_status()
                body: dict[str, Any] = response.json()
                return body
            assert time.monotonic() < deadline, "no front door answers"
            await asyncio.sleep(0.02)

    async def _call(self, http: httpx.AsyncClient, method: str, path: str, **content: Any) -> Any:
        response = await http.request(method, path if path.startswith("/") else f"/v1/adapters/{path}", **content)
        if response.is_success:
            return response.json() if response.headers["content-type"] == "application/json" else None
        error = response.json()["error"]
        raise _ERRORS.get(error["code"], Refused)(f"{error['code']}: {error['message']}")

    def _check_excused(self, error: Exception, since: float) -> None:
        """A change may fail because of a kill, and of nothing else."""
        kinds: tuple[str, ...] = ("door",)
        if isinstance(error, Refused):
            excuses = {"engine_unavailable": ("door",), "invalid_adapter": ("validator",)}
            kinds = excuses.get(str(error).partition(":")[0], ())
        now = time.monotonic()
        kills = [kill for kill in self._book.kills if kill.what.startswith(kinds)]
        assert any(kill.at <= now and since <= max(kill.back, kill.at + GRACE_S) for kill in kills), error

    def _client(self) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self._fleet.admin}"}
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.AsyncClient(
            base_url=self._fleet.url, headers=headers, limits=limits, timeout=HANG_S, trust_env=False
        )


class NothingBefore(Refused):
    """There is nothing to roll back to."""


class SelfTestDidFail(Refused):
    """A version did not pass its self-test."""


_ERRORS = {"no_previous_version": NothingBefore, "self_test_failed": SelfTestDidFail}
_NOTHING = Content("broken", None)  # which answers nothing


class Killer:
    """Kills processes at random, and has them come again."""

    def __init__(self, book: Book, fleet: AnyFleet, pauses: Sequence[float], rng: Random) -> None:
        self._book = book
        self._fleet = fleet
        self._pauses = pauses
        self._rng = rng

    async def run(self, is_over: Callable[[], bool]) -> None:
        """Kill until it is over. Something of each kind is always there."""
        rng, first = self._rng, iter(("replica", "door"))
        while not is_over():
            await asyncio.sleep(rng.uniform(*self._pauses))
            kind = next(first, None) or rng.choices(("replica", "door", "validator"), (5, 2, 2))[0]
            if kind == "validator":
                await self._kill_validator()
            else:
                await self._kill(rng.choice(self._fleet.replicas if kind == "replica" else self._fleet.doors))

    async def _kill(self, name: str) -> None:
        kill = Kill(name, time.monotonic())
        self._book.kills.append(kill)
        self._fleet.kill(name)
        await asyncio.sleep(self._rng.uniform(0.0, 0.5))
        self._fleet.start(name)
        await self._fleet.wait_whole()
        kill.back = time.monotonic()

    async def _kill_validator(self) -> None:
        for _ in range(50):
            at = time.monotonic()
            if self._fleet.kill_validator():
                self._book.kills.append(Kill("validator", at, at))
                return
            await asyncio.sleep(0.02)
