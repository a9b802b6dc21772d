"""Adapters in host memory: read from the blob store by background threads, kept by recent use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from adapters_store.blobs import BlobStore
from adapters_store.bottleneck_layout import BottleneckLayout, BottleneckShape
from adapters_store.errors import AdapterLoadFailed
from adapters_store.host_pages import HostPages
from adapters_store.lora_layout import LoRALayout, num_pages_for
from adapters_store.page_image import PageImage, check_weights, fill_pages
from adapters_store.tensor_file import ReadMemory
from adapters_store.vector_layout import VectorLayout
from adapters_store.weights import AdapterWeights, TokenTable, load_weights

AdapterReader = Callable[[BlobStore, str], AdapterWeights]
_OWN_SHARE = 16
_memory = ReadMemory()


def read_adapter(blobs: BlobStore, digest: str) -> AdapterWeights:
    """A stored adapter, good until the thread reads the next. Raises `AdapterLoadFailed`, `StoreUnavailable`."""
    with blobs.reading(digest) as path:
        return load_weights(path, _memory)


class HostCache:
    """digest -> `PageImage` for pools of this layout and dtype, least recently used out first.

    All images, those that only callers still hold too, share `max_bytes` of memory, which is `pinned` at the start
    where a GPU reads it. An adapter that finds no room there, being larger than the whole or because callers hold
    the rest, is handed out in memory of its own, and not kept. Virtual tokens and rows of tokens always have memory of
    their own, of which up to a sixteenth of `max_bytes` is kept beside. Loads of one digest that overlap are one load.
    A failure is not kept: the next `get` tries again. Safe to call from any thread.

    read: what a background thread reads for a digest, to be laid out. vectors, bottlenecks, token_dtype: how vectors
    and bottlenecks are laid out, and rows of tokens kept; None where adapters that have any cannot be served.
    """

    def __init__(
        self,
        blobs: BlobStore,
        layout: LoRALayout,
        dtype: torch.dtype,
        max_bytes: int,
        *,
        pinned: bool = False,
        num_threads: int = 2,
        read: AdapterReader = read_adapter,
        vectors: VectorLayout | None = None,
        bottlenecks: BottleneckLayout | None = None,
        token_dtype: torch.dtype | None = None,
    ) -> None:
        self._blobs = blobs
        self._read = read
        self._layout = layout
        self._dtype = dtype
        self._page_bytes = layout.page_bytes(dtype)
        self._pinned = pinned
        self._vectors = vectors
        self._bottlenecks = bottlenecks
        self._token_dtype = token_dtype
        self._most_own_bytes = max_bytes // _OWN_SHARE
        self._memory = HostPages(
            max_bytes,
            self._page_bytes,
            vectors.size if vectors is not None else 0,
            bottlenecks.page_bytes if bottlenecks is not None else 0,
            pinned=pinned,
        )
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="adapter-load")
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, PageImage] = OrderedDict()
        self._loading: dict[str, Future[PageImage]] = {}

    @property
    def num_pages(self) -> int:
        """Pages that there is room for."""
        return self._memory.num_pages

    @property
    def num_bytes(self) -> int:
        """Bytes of the images kept."""
        with self._lock:
            return sum(image.num_bytes + image.num_own_bytes for image in self._kept.values())

    def holds(self, digest: str) -> bool:
        """Whether the adapter is kept."""
        with self._lock:
            return digest in self._kept

    def get(self, digest: str) -> Future[PageImage]:
        """The adapter: a finished future when it is kept, else one that a background thread finishes.

        All who ask share the future: do not cancel it. It fails with `AdapterLoadFailed`, `StoreUnavailable`,
        ValueError when the adapter does not fit the base, or what else reading raised. Callbacks run on the loading
        thread, or at once on the caller's when it is done. Raises RuntimeError after `close`.
        """
        with self._lock:
            if (image := self._kept.get(digest)) is not None:
                self._kept.move_to_end(digest)
                return _finished(image)
            if (loading := self._loading.get(digest)) is not None:
                return loading
            future: Future[PageImage] = Future()
            self._threads.submit(self._load, digest, future)
            self._loading[digest] = future
            return future

    def close(self) -> None:
        """Stop the threads and unpin the memory: loads that run are finished, those not yet started fail."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            abandoned, self._loading = self._loading, {}
        for digest, future in abandoned.items():
            future.set_exception(AdapterLoadFailed(digest, "the adapter cache was closed"))
        self._memory.close()

    def _load(self, digest: str, future: Future[PageImage]) -> None:
        try:
            image, is_kept = self._make_image(digest)
        except Exception as error:  # whatever it is, it belongs to those who wait
            with self._lock:
                del self._loading[digest]
            future.set_exception(error)
            return
        with self._lock:
            del self._loading[digest]
            if is_kept and image.num_own_bytes <= self._most_own_bytes:
                self._kept[digest] = image
                self._trim()
        # Outside the lock: callbacks run here and may call `get`.
        future.set_result(image)

    def _make_image(self, digest: str) -> tuple[PageImage, bool]:
        """The image, and whether it may be kept: what has pages or vectors lies in the cache's memory then."""
        weights = self._read(self._blobs, digest)
        check_weights(weights, self._layout, self._dtype)
        if weights.virtual_tokens is not None:
            return PageImage(0, (), virtual_tokens=self._owned(weights.virtual_tokens)), True
        blank = PageImage(
            weights.rank,
            (),
            raw=weights.raw,
            bottleneck=self._checked_bottleneck(weights),
            token_tables=tuple(self._owned_table(table) for table in weights.token_tables),
        )
        image = self._take(blank, self._has_vectors(weights))
        is_kept = image is not None
        image = image or self._own_memory(blank, self._has_vectors(weights))
        if weights.bottleneck is not None and self._bottlenecks is not None:
            self._bottlenecks.fill(image.pages, weights.bottleneck)
        else:
            fill_pages(image.pages, weights, self._layout, self._dtype)
        if image.vectors is not None and self._vectors is not None:
            self._vectors.fill(image.vectors, weights)
        return image, is_kept

    def _owned(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy: what was read is good until the next is. In one piece, where pinning alone would keep strides."""
        return tensor.contiguous().pin_memory() if self._pinned else tensor.clone()

    def _owned_table(self, table: TokenTable) -> TokenTable:
        if self._token_dtype is None:
            raise ValueError("it has rows of tokens, for which this engine keeps no room (engine.num_token_rows)")
        return table._replace(rows=self._owned(table.rows.to(self._token_dtype)))

    def _take(self, blank: PageImage, has_vectors: bool) -> PageImage | None:
        """Room in the cache's memory, from which others leave for it."""
        num_frames = self._memory.num_frames_for(blank)
        if not self._memory.may_hold(num_frames, has_vectors):
            return None
        with self._lock:
            while (image := self._memory.take(blank, has_vectors)) is None:
                if not self._drop_one(num_frames):
                    return None
            return image

    def _drop_one(self, num_pages: int) -> bool:
        """Drop the least recently used image that makes room for so many pages, or for vectors. False without any."""
        lacks_pages = self._memory.num_free < num_pages
        helpful = (d for d, i in self._kept.items() if (i.pages if lacks_pages else i.vectors is not None))
        digest = next(helpful, None)
        if digest is None:
            return False
        del self._kept[digest]
        return True

    def _trim(self) -> None:
        """Drop the least recently used of what has memory of its own, down to what may be kept."""
        own = {digest: image.num_own_bytes for digest, image in self._kept.items() if image.num_own_bytes}
        excess = sum(own.values()) - self._most_own_bytes
        for digest, num_bytes in own.items():
            if excess <= 0:
                break
            del self._kept[digest]
            excess -= num_bytes

    def _own_memory(self, blank: PageImage, has_vectors: bool) -> PageImage:
        num_pages, page_bytes = num_pages_for(blank.rank), self._page_bytes
        if blank.bottleneck is not None and self._bottlenecks is not None:
            num_pages, page_bytes = blank.bottleneck.num_pages, self._bottlenecks.page_bytes
        pages = torch.empty(num_pages, page_bytes, dtype=torch.uint8)
        vectors = torch.empty_like(self._vectors.neutral) if self._vectors and has_vectors else None
        return replace(blank, pages=tuple(pages), vectors=vectors)

    def _checked_bottleneck(self, weights: AdapterWeights) -> BottleneckShape | None:
        if weights.bottleneck is None:
            return None
        if self._bottlenecks is None:
            raise ValueError("it has bottlenecks, for which this engine keeps no room (engine.num_bottleneck_pages)")
        self._bottlenecks.check(weights.bottleneck)
        return BottleneckShape.of(weights.bottleneck)

    def _has_vectors(self, weights: AdapterWeights) -> bool:
        if weights.vectors and self._vectors is None:
            raise ValueError("it has vectors, for which this engine keeps no room (engine.num_vector_slots)")
        return bool(weights.vectors)


def _finished(image: PageImage) -> Future[PageImage]:
    future: Future[PageImage] = Future()
    future.set_result(image)
    return future
