"""Adapters in host memory: read from the blob store by background threads, kept by recent use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from adapters_store.blobs import BlobStore
from adapters_store.errors import AdapterLoadFailed
from adapters_store.weights import AdapterWeights, load_weights

AdapterReader = Callable[[BlobStore, str], AdapterWeights]


def read_adapter(blobs: BlobStore, digest: str) -> AdapterWeights:
    """The stored adapter, whole. Raises `AdapterLoadFailed` or `StoreUnavailable`."""
    return load_weights(blobs.local_path(digest))


class HostCache:
    """digest -> `AdapterWeights`, least recently used out first, at most `max_bytes` of tensors kept.

    Loads of one digest that overlap are one load. A failure is not kept: the next `get` tries again. An
    adapter larger than the whole cache is handed to its callers and not kept. Safe to call from any thread.

    read: what a background thread makes of a digest.
    """

    def __init__(
        self,
        blobs: BlobStore,
        max_bytes: int,
        num_threads: int = 2,
        *,
        read: AdapterReader = read_adapter,
    ) -> None:
        self._blobs = blobs
        self._read = read
        self._max_bytes = max_bytes
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="adapter-load")
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, AdapterWeights] = OrderedDict()
        self._loading: dict[str, Future[AdapterWeights]] = {}
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors kept."""
        return self._num_bytes

    def get(self, digest: str) -> Future[AdapterWeights]:
        """The adapter: a finished future when it is kept, else one that a background thread finishes.

        All who ask share the future: do not cancel it. It fails with `AdapterLoadFailed`, `StoreUnavailable`
        or what else reading raised. Callbacks run on the loading thread, or at once on the caller's when it
        is done. Raises RuntimeError after `close`.
        """
        with self._lock:
            if (weights := self._kept.get(digest)) is not None:
                self._kept.move_to_end(digest)
                return _finished(weights)
            if (loading := self._loading.get(digest)) is not None:
                return loading
            future: Future[AdapterWeights] = Future()
            self._threads.submit(self._load, digest, future)
            self._loading[digest] = future
            return future

    def close(self) -> None:
        """Stop the threads: loads that run are finished, those not yet started fail."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            abandoned, self._loading = self._loading, {}
        for digest, future in abandoned.items():
            future.set_exception(AdapterLoadFailed(digest, "the adapter cache was closed"))

    def _load(self, digest: str, future: Future[AdapterWeights]) -> None:
        try:
            weights = self._read(self._blobs, digest)
        except Exception as error:  # whatever it is, it belongs to those who wait
            with self._lock:
                del self._loading[digest]
            future.set_exception(error)
            return
        with self._lock:
            del self._loading[digest]
            self._keep(digest, weights)
        # Outside the lock: callbacks run here and may call `get`.
        future.set_result(weights)

    def _keep(self, digest: str, weights: AdapterWeights) -> None:
        if weights.num_bytes > self._max_bytes:
            return
        self._kept[digest] = weights
        self._num_bytes += weights.num_bytes
        while self._num_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._num_bytes -= oldest.num_bytes


def _finished(weights: AdapterWeights) -> Future[AdapterWeights]:
    future: Future[AdapterWeights] = Future()
    future.set_result(weights)
    return future
