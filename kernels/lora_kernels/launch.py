"""How kernels are launched, and how many of them are compiled at once before any is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar

_T = TypeVar("_T")
_MOST_THREADS: Final = 16
_compilers: ContextVar[Executor | None] = ContextVar("compilers", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)` of a Triton kernel; in a rehearsal its compilation begins instead."""
    if is_rehearsal():
        kernel.warmup(*arguments, grid=grid, **options)
    else:
        kernel[grid](*arguments, **options)


def begun(compilation: Callable[[], _T]) -> Callable[[], _T]:
    """Something that returns what `compilation` does; in a rehearsal a thread has begun with that."""
    threads = _compilers.get()
    return compilation if threads is None else threads.submit(compilation).result


def is_rehearsal() -> bool:
    """Whether kernels are only compiled."""
    return _compilers.get() is not None


@contextmanager
def compiled_ahead(rehearse: Callable[[], object]) -> Iterator[None]:
    """Have the kernels compiled, by a thread each, that `rehearse` calls; the body's launches wait for their own.

    A rehearsal launches none of our kernels, so that what it computes is what lay in the memory before. At the end of
    the body all are compiled. What a compilation raises comes where its kernel is launched, and at the end if Triton's.
    """
    from triton import AsyncCompileMode

    threads = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MOST_THREADS), "compiler")
    with threads, AsyncCompileMode(threads):
        token = _compilers.set(threads)
        try:
            rehearse()
        finally:
            _compilers.reset(token)
        yield
