"""Changes versions and aliases under load."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import httpx

from tests.soak.answers import Answers, Content
from tests.soak.book import ALIASES, GRACE_S, HANG_S, Book
from tests.soak.fleet import Fleet
from tests.soak.serve_fleet import ServeFleet


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
        fleet: Fleet | ServeFleet,
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
