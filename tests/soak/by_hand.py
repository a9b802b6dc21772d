"""An engine whose steps the test takes itself."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from itertools import count
from random import Random

from gateway.engine.llm_engine import LLMEngine
from gateway.engine.request import FinishReason
from gateway.engine.stats import StepOutput
from gateway.errors import GatewayError
from tests.soak.fault import Fault, fail_next_step
from tests.soak.ledger import Ledger
from tests.soak.run import Run, check_idle
from tests.soak.traffic import Call, may_fail, random_config

MOST_OPEN = 24
MOST_IDLE = 5000  # turns that run nothing: much longer than any adapter takes to load


class ByHand:
    """One engine stepped by this thread, until it is idle or killed."""

    def __init__(self, run: Run, rng: Random) -> None:
        self.config = random_config(rng, run.world, run.device)
        self.ledger = Ledger()
        self._run = run
        self._rng = rng
        self._ready = threading.Event()
        self._engine = LLMEngine(self.config, run.world.blobs, self._ready.set)
        self._calls: dict[str, Call] = {}
        self._leaving: dict[str, int] = {}  # turns until each caller goes away

    def serve(self, calls: list[Call], num_turns: int | None) -> bool:
        """Serve calls, which come by chance, to their ends, or for so many turns. Returns whether all ended."""
        coming, idle = deque(calls), 0
        for turn in count():
            if not coming and not self._engine.has_work:
                check_idle(self._engine)
                return True
            if turn == num_turns:
                return False
            while coming and len(self.ledger.open) < MOST_OPEN and self._rng.random() < 0.5:
                self._submit(coming.popleft())
            self._let_go()
            idle = 0 if self._step() else idle + 1
            assert idle < MOST_IDLE, "nothing runs any more"
        raise AssertionError

    def kill(self) -> list[Call]:
        """End everything in flight, by a failing step or without. Returns the calls that were not done."""
        reason: FinishReason = self._rng.choice(["cancelled", "error"])
        if self._rng.random() < 0.3:
            fail_next_step(self._engine)
            with suppress(Fault):
                while self._engine.has_work:
                    self._step()
            del self._engine.runner.execute  # the instance's: the class has its own
        lost = [self._calls[name] for name in self.ledger.open]
        self.ledger.doom(reason)
        error = Fault() if reason == "error" else None
        self.ledger.take(self._engine.abort_all(reason, error))
        assert not self._engine.abort_all("error", Fault()).deltas
        self.ledger.revive()
        check_idle(self._engine)
        return lost

    def close(self) -> None:
        """Stop the engine, and hold what it gave against what it should."""
        self._engine.close()
        assert not self.ledger.open
        self._run.finish_life(self._engine, self.ledger)
        self._run.check_sample(self._rng, self.config, self.ledger)

    def _submit(self, call: Call) -> None:
        request = call.request
        try:
            prompt = self._engine.encode(request)
        except GatewayError:
            self._run.seen["refused"] += 1
            return
        self.ledger.accept(request, len(prompt), may_fail(self._run.world, self.config, request))
        self._engine.add(request, prompt)
        self._calls[request.request_id] = call
        if call.goes is not None:
            self._leaving[request.request_id] = call.goes

    def _let_go(self) -> None:
        """Cancel what callers have left, some of it already ended."""
        for name in [name for name, turns in self._leaving.items() if turns == 0]:
            del self._leaving[name]
            self.ledger.cancel(name)
            output = StepOutput()
            self._engine.cancel(name, output)
            self.ledger.take(output)
        self._leaving = {name: turns - 1 for name, turns in self._leaving.items()}

    def _step(self) -> bool:
        """One turn. Returns whether anything ran or ended."""
        if self._rng.random() < 0.02:
            self._run.world.toggle()
        self._ready.clear()
        output = self._engine.step()
        self.ledger.take(output)
        self._engine.blocks.check_integrity()
        self._engine.residency.check_integrity()
        assert self._engine.num_unfinished == len(self.ledger.open)
        if output.num_tokens == 0 and self._engine.has_work:
            self._ready.wait(self._engine.poll_interval)
        return bool(output.num_tokens or output.deltas)
