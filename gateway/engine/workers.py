"""The other ranks of an engine, as rank 0 sees them: started, told of each step, watched and ended."""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final

import torch

from adapters_store.blobs import BlobStore
from adapters_store.host_cache import AdapterReader
from adapters_store.shard import Shard
from adapters_store.slots import AdapterSlots
from adapters_store.weights import AdapterWeights
from gateway.config import EngineConfig
from gateway.engine.memory_plan import MemoryPlan
from gateway.engine.mirror import Announcer
from gateway.engine.pending import PendingTokens
from gateway.engine.scheduler_output import SchedulerOutput
from gateway.engine.worker import Failed, ReadAhead, serve, share_reader
from gateway.errors import ConfigInvalid, InternalError
from gateway.layers.tensor_parallel import TensorParallel
from gateway.models.loader import LoadedModel, resolve_device

logger = logging.getLogger(__name__)

STEP_S: Final = 300.0  # a step that takes longer never ends; in a first one kernels are compiled
_LOOK_S: Final = 3.0


class Workers:
    """Ranks 1.. of an engine, each a process that ends with this one; `ranks` is the way to them on the device.

    A thread watches them. When one has failed, `failure` says so, the others are ended, and what waits for them on the
    device is given up. Raises `ConfigInvalid` when there are too few GPUs, `InternalError` when a rank fails.
    """

    def __init__(self, config: EngineConfig, blobs: BlobStore) -> None:
        kind, size = resolve_device(config.device).type, config.tensor_parallel_size
        _check_config(config, kind)
        self.failure: InternalError | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="patchbay-ranks-")
        self._sending = threading.Lock()  # threads that read adapters send too
        self._failed = threading.Event()
        self._closed = False
        self._num_under_way = 0  # steps
        self._moved_at = 0.0
        self._announcer = Announcer()
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection[Any, Any]] = []
        try:
            for rank in range(1, size):
                self._start(Shard(rank, size), config, blobs)
            self._answers()
            self.ranks = TensorParallel.join(Shard(0, size), kind, self._folder.name)
        except BaseException:
            self._kill()
            raise

    def agree(self, plan: MemoryPlan) -> MemoryPlan:
        """What fits on every rank, `plan` being rank 0's; waits until all have loaded their share of the base.

        They make caches and record graphs then, as rank 0 must, and are watched.
        """
        smallest = MemoryPlan.smallest([plan, *self._answers()])
        self._send(smallest)
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        return smallest

    def reader(self, model: LoadedModel, dtype: torch.dtype) -> AdapterReader:
        """What reads rank 0's share of an adapter for pages in `dtype`; the others begin to read theirs then."""
        read_mine = share_reader(model, self.ranks.shard, dtype)

        def read(blobs: BlobStore, digest: str) -> AdapterWeights:
            with suppress(OSError):  # a rank that is gone fails the step, not the adapter
                self._send(ReadAhead(digest))
            return read_mine(blobs, digest)

        return read

    def announce(self, output: SchedulerOutput, pending: PendingTokens | None, slots: AdapterSlots) -> None:
        """Tell them of the step that rank 0 runs next, with its adapters in `slots`. Raises `failure`."""
        self._check()
        self._num_under_way += 1
        self._moved_at = time.monotonic()
        self._send(self._announcer.news(output, pending, slots))
        if pending is not None:
            self.ranks.broadcast(pending.token_ids)

    def land(self) -> None:
        """To be called when a step's results are there: what was given up has results too. Raises `failure`."""
        self._check()
        self._num_under_way -= 1
        self._moved_at = time.monotonic()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raises `failure` for what breaks here when a rank is gone.

        What breaks off a step here leaves the others in an exchange of it, so that they are ended.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, RuntimeError | OSError) and self._failed.wait(_LOOK_S) and self.failure is not None:
                raise self.failure from error
            if self._num_under_way and self.failure is None:
                self.failure = InternalError(
                    f"A step of all ranks was broken off by {type(error).__name__}; the engine must be started again."
                )
                self._kill()
            raise

    def close(self) -> None:
        """End them. The graphs that exchanges were recorded in are dropped before."""
        if self._closed:
            return
        self._closed = True
        self._kill()
        if self.failure is None:
            giving_up = threading.Thread(target=self.ranks.abort, name="ranks-abort", daemon=True)
            giving_up.start()
            giving_up.join(_LOOK_S)
        self._folder.cleanup()

    def _start(self, shard: Shard, config: EngineConfig, blobs: BlobStore) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        args = (shard, config, blobs, self._folder.name, theirs)
        process = context.Process(target=serve, args=args, name=f"rank-{shard.rank}", daemon=True)
        process.start()
        theirs.close()  # the worker has the only one, so that `ours` says when it is gone
        self._processes.append(process)
        self._connections.append(ours)

    def _send(self, message: object) -> None:
        data = ForkingPickler.dumps(message)
        with self._sending:
            for connection in self._connections:
                connection.send_bytes(data)

    def _answers(self) -> list[Any]:
        """The next message of each. Raises `InternalError` for one that has failed."""
        answers = []
        for rank, connection in enumerate(self._connections, 1):
            message = _receive(connection)
            if isinstance(message, Failed):
                raise self._error(rank, message)
            answers.append(message)
        return answers

    def _watch(self) -> None:
        """A worker says nothing more while all is well."""
        while not (readable := wait(self._connections, _LOOK_S)):
            if self._num_under_way and time.monotonic() - self._moved_at > STEP_S:
                break
        if self._closed:
            return
        for rank, connection in enumerate(self._connections, 1):
            if connection in readable and self.failure is None:
                self.failure = self._error(rank, _receive(connection))
        self.failure = self.failure or InternalError(f"The engine's ranks have not ended a step in {STEP_S:.0f} s.")
        self._failed.set()
        self._kill()
        self.ranks.abort()

    def _error(self, rank: int, last_word: Failed) -> InternalError:
        logger.error("rank %d of the engine %s\n%s", rank, last_word.reason, last_word.trace)
        return InternalError(f"Rank {rank} of the engine {last_word.reason}; the engine must be started again.")

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _receive(connection: Connection[Any, Any]) -> Any:
    """The worker's next message; if it has ended without one, that it has."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        return Failed("has ended", "")


def _check_config(config: EngineConfig, kind: str) -> None:
    size = config.tensor_parallel_size
    if config.batch_invariant:
        raise ConfigInvalid(
            "engine.batch_invariant is of one GPU: the order of a sum over several depends on the batch; set "
            "engine.tensor_parallel_size to 1.",
            param="engine.batch_invariant",
        )
    if kind == "cuda" and torch.cuda.device_count() < size:
        raise ConfigInvalid(
            f"engine.tensor_parallel_size {size} needs as many GPUs; this process sees {torch.cuda.device_count()}.",
            param="engine.tensor_parallel_size",
        )
