"""Blobs of a remote store on this machine's disk: fetched once, checked, kept by recent use."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from adapters_store.digest import is_digest, sha256_of
from adapters_store.errors import AdapterLoadFailed

_ABANDONED_S: Final = 3600.0
_PARTIAL: Final = ".part-"
_LOCK: Final = ".lock-"


class BlobCache:
    """A folder of blobs, named by digest, that all processes of a machine may share. Safe in any thread.

    Who reads a blob holds a shared lock on its file and who evicts it needs the exclusive one, so that nothing goes
    while it is opened. Fetching is behind a lock too: those who come meanwhile wait for it and take what it brought.
    A killed process leaves no lock, and at most a part of a file, which no reader sees.

    max_bytes: of all files; the least recently opened go first. One that is larger is kept till the next comes.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._max_bytes = max_bytes

    def open(self, digest: str, fetch: Callable[[Path], None]) -> BinaryIO:
        """A checked blob, open at its start; while it is open its file stays. `fetch` writes it to the path given.

        Raises `AdapterLoadFailed` when what was fetched has another digest, and what `fetch` raises.
        """
        return self._open_kept(digest) or self._open_fetched(digest, fetch)

    def _open_kept(self, digest: str) -> BinaryIO | None:
        """The blob, if it is here and whole; a damaged file is removed."""
        path = self._folder / digest
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if os.fstat(file.fileno()).st_nlink:  # else it was evicted between the two lines above
            if sha256_of(file) == digest:
                os.utime(file.fileno())
                file.seek(0)
                return file
            path.unlink(missing_ok=True)
        file.close()
        return None

    def _open_fetched(self, digest: str, fetch: Callable[[Path], None]) -> BinaryIO:
        with self._fetching(digest):
            kept = self._open_kept(digest)  # another process has brought it meanwhile
            if kept is not None:
                return kept
            part = self._folder / f"{_PARTIAL}{digest}"
            try:
                fetch(part)
                return self._keep(part, digest)
            finally:
                part.unlink(missing_ok=True)

    def _keep(self, part: Path, digest: str) -> BinaryIO:
        with part.open("rb") as fetched:
            if sha256_of(fetched) != digest:
                raise AdapterLoadFailed(digest, "its stored bytes are damaged (the digest differs)")
            fcntl.flock(fetched, fcntl.LOCK_SH)  # nobody evicts it between its renaming and its opening
            self._make_room(part.stat().st_size)
            file = part.rename(self._folder / digest).open("rb")
            fcntl.flock(file, fcntl.LOCK_SH)
        return file

    @contextmanager
    def _fetching(self, digest: str) -> Iterator[None]:
        """The right to fetch: one lock file for the digests that begin alike, never removed."""
        with (self._folder / f"{_LOCK}{digest[:2]}").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, num_bytes: int) -> None:
        """Evict until `num_bytes` more fit, or all that is left is being read."""
        kept = []
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):
                found = entry.stat()
                if is_digest(entry.name):
                    kept.append((found.st_mtime, found.st_size, Path(entry.path)))
                elif entry.name.startswith(_PARTIAL) and found.st_mtime < time.time() - _ABANDONED_S:
                    os.unlink(entry.path)
        excess = num_bytes + sum(size for _, size, _ in kept) - self._max_bytes
        for _, size, path in sorted(kept):
            if excess <= 0:
                return
            if _evict(path):
                excess -= size


def _evict(path: Path) -> bool:
    """Remove a file unless somebody reads it."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            return True
    except (FileNotFoundError, BlockingIOError):
        return False
