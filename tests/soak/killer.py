"""Kills a fleet's processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from random import Random

from tests.soak.book import Book, Kill
from tests.soak.fleet import Fleet
from tests.soak.serve_fleet import ServeFleet


class Killer:
    """Kills processes at random, and has them come again."""

    def __init__(self, book: Book, fleet: Fleet | ServeFleet, pauses: Sequence[float], rng: Random) -> None:
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
