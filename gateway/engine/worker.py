"""The process of a rank that has no scheduler: it builds its share of the base and runs the steps it is told of."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final, NoReturn

import torch

from adapters_store.blobs import BlobStore
from adapters_store.errors import StoreError
from adapters_store.host_cache import AdapterReader, HostCache
from adapters_store.lora_layout import LoRALayout
from adapters_store.page_copier import PageCopy
from adapters_store.page_image import PageImage
from adapters_store.shard import Shard, read_share
from adapters_store.slots import AdapterSlots
from gateway.config import EngineConfig
from gateway.engine.interpreter import favour_steps
from gateway.engine.memory_plan import MemoryPlan
from gateway.engine.mirror import Mirror, StepNews
from gateway.engine.model_runner import ModelRunner
from gateway.engine.pending import PendingTokens
from gateway.layers.tensor_parallel import TensorParallel
from gateway.models.loader import LoadedModel, load_model, resolve_device

logger = logging.getLogger(__name__)

_READ_S: Final = 60.0  # of a step, in which everybody waits; one that takes 300 s is given up
_PAUSE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class ReadAhead:
    """Rank 0 reads this adapter; a step may need it soon."""

    digest: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A worker's last word: "Rank 1 `reason`"."""

    reason: str
    trace: str


def serve(shard: Shard, config: EngineConfig, blobs: BlobStore, folder: str, rank_0: Connection[Any, Any]) -> NoReturn:
    """Run a rank until it is killed, or rank 0's process ends in whatever way.

    Sent up: None when it can meet the others in `folder`, its `MemoryPlan` when its share is loaded, `Failed`.
    Sent down: the plan that fits all ranks, then `StepNews` and `ReadAhead`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to every process; rank 0 says when to end
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    try:
        rank_0.send(None)
        ranks = TensorParallel.join(shard, resolve_device(config.device).type, folder)
        _Worker(ranks, config, blobs).run(rank_0)
    except Exception as error:
        with suppress(OSError):
            rank_0.send(Failed(f"failed with {type(error).__name__}: {error}", traceback.format_exc()))
    os._exit(1)  # waits neither for threads nor for a device whose exchanges nobody joins any more


def _end_with_parent(folder: str) -> None:
    """Wherever the main thread is: it may wait for the device, for a file or for other ranks."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)  # which rank 0 has not done if it was killed
    os._exit(1)


class _Worker:
    def __init__(self, ranks: TensorParallel, config: EngineConfig, blobs: BlobStore) -> None:
        if config.torch_threads is not None:
            torch.set_num_threads(config.torch_threads)
        self._ranks = ranks
        self._config = config
        self._blobs = blobs
        self._model = load_model(config, ranks)
        self._mirror = Mirror()
        self._copies: list[PageCopy] = []  # which keep what they read from alive

    def run(self, rank_0: Connection[Any, Any]) -> None:
        rank_0.send(MemoryPlan.measure(self._config, self._model.decoder))
        runner = ModelRunner.build(self._config, self._model.decoder, rank_0.recv())
        host = self._host_cache(runner.slots)
        favour_steps()
        while True:
            message: StepNews | ReadAhead = rank_0.recv()
            if isinstance(message, ReadAhead):
                host.get(message.digest)
            else:
                self._step(runner, host, message)

    def _host_cache(self, slots: AdapterSlots) -> HostCache:
        shard = self._ranks.shard
        return HostCache(
            self._blobs,
            slots.layout,
            slots.dtype,
            self._config.host_cache_bytes // shard.size,
            pinned=self._ranks.device.type == "cuda",
            read=share_reader(self._model, shard, slots.dtype),
            vectors=slots.vectors.layout if slots.vectors is not None else None,
            bottlenecks=slots.bottlenecks.layout if slots.bottlenecks is not None else None,
            token_dtype=slots.tokens.rows.dtype if slots.tokens is not None else None,
        )

    @torch.inference_mode()
    def _step(self, runner: ModelRunner, host: HostCache, news: StepNews) -> None:
        self._load(runner.slots, host, news)
        runner.execute(self._mirror.output(news), self._pending(news))

    def _load(self, slots: AdapterSlots, host: HostCache, news: StepNews) -> None:
        """Copies go beside the steps that run, and the step that uses them waits for them on the device."""
        self._copies = [copy for copy in self._copies if not copy.is_done]
        for slot in news.freed:
            slots.free(slot)
        until = time.monotonic() + _READ_S
        for slot, digest, place in news.loaded:
            copy = slots.load(slot, read_patiently(host, digest, until), place)
            copy.hold_stream()
            self._copies.append(copy)

    def _pending(self, news: StepNews) -> PendingTokens | None:
        if news.sources is None:
            return None
        token_ids = torch.empty(news.num_pending, dtype=torch.int64, device=self._ranks.device)
        self._ranks.broadcast(token_ids)
        return PendingTokens(token_ids, news.sources)


def read_patiently(host: HostCache, digest: str, until: float) -> PageImage:
    """An adapter that rank 0 has read: a store that fails here is asked again, and may answer.

    until: on the monotonic clock. Raises what reading did last, then; what does not come of the store, at once.
    """
    while True:
        try:
            return host.get(digest).result()
        except (StoreError, OSError) as error:
            if time.monotonic() >= until:
                raise
            logger.warning("adapter %s cannot be read by every rank, and a step waits for it: %s", digest[:12], error)
        time.sleep(_PAUSE_S)


def share_reader(model: LoadedModel, shard: Shard, dtype: torch.dtype) -> AdapterReader:
    """What reads a rank's share of an adapter of this base, for pages in `dtype`."""
    whole = LoRALayout.from_linears(model.spec.linears, model.spec.num_layers)
    return partial(read_share, shard=shard, whole=whole, dtype=dtype)
