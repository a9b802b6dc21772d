"""Where one request's deltas wait for its consumer, and how waiting deltas are merged."""

from __future__ import annotations

import asyncio

from gateway.engine.request import TokenDelta
from gateway.errors import EngineUnavailable


def merge_delta(earlier: TokenDelta, later: TokenDelta) -> None:
    """Append `later` to `earlier`, a delta of the same sequence: the consumer sees one chunk instead of two."""
    earlier.text += later.text
    earlier.token_ids += later.token_ids
    earlier.logprobs += later.logprobs
    earlier.finish_reason = later.finish_reason
    earlier.usage = later.usage
    earlier.error = later.error


class Mailbox:
    """One request's deltas on their way to its consumer, on one event loop.

    Waiting deltas of a sequence are merged, so a slow consumer costs at most one delta a sequence, however far behind.
    The mailbox ends once: when all `num_sequences` have finished, or with the first error.
    """

    def __init__(self, request_id: str, num_sequences: int) -> None:
        self.request_id = request_id
        self._unfinished = num_sequences
        self._pending: dict[int, TokenDelta] = {}
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def finished(self) -> bool:
        """Whether every sequence has come to its own end."""
        return self._unfinished == 0

    @property
    def ended(self) -> bool:
        """Whether nothing more will come than what waits now."""
        return self._unfinished == 0 or self._error is not None

    def put(self, delta: TokenDelta) -> None:
        """Add what one step made. After the end nothing is added."""
        if self.ended:
            return
        if delta.error is not None:
            self.fail(delta.error)
        elif delta.finish_reason == "cancelled":
            # Its consumer still waits, so it was the replica that gave it up.
            self.fail(EngineUnavailable("The replica stopped before the request was done. Send it again."))
        else:
            self._add(delta)

    def fail(self, error: BaseException) -> None:
        """End with `error`, which `take` raises after what waits; nothing happens when the end has come already."""
        if not self.ended:
            self._error = error
            self._wake()

    async def take(self) -> list[TokenDelta]:
        """Wait for deltas and take all that wait, at most one a sequence; empty after the last one.

        Raises what ended the request early. One consumer at a time.
        """
        if not self._pending and not self.ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if not self._pending and self._error is not None:
            raise self._error
        deltas = list(self._pending.values())
        self._pending.clear()
        return deltas

    def _add(self, delta: TokenDelta) -> None:
        earlier = self._pending.get(delta.index)
        if earlier is None:
            self._pending[delta.index] = delta
        else:
            merge_delta(earlier, delta)
        if delta.finish_reason is not None:
            self._unfinished -= 1
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
