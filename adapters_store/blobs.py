"""Content-addressed blobs in a folder or in any store that fsspec reaches."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from adapters_store.errors import AdapterLoadFailed, StoreError, StoreUnavailable

_CHUNK = 1 << 20
_TEMPORARY = ".tmp-"


class BlobStore:
    """Blobs named by the SHA-256 (hex) of their bytes, under an fsspec URL such as `file:///data/blobs`.

    A put into a folder is atomic and durable: temporary file, fsync, rename, fsync of the folder. Object
    stores make an object visible whole by themselves. Every read checks the digest. Safe in any thread.

    cache_dir: where blobs of a remote store are kept for `local_path`; a private temporary folder by default.
    cache_bytes: that folder's limit; the least recently used files go first.
    """

    def __init__(self, url: str, cache_dir: Path | None = None, cache_bytes: int = 20 << 30) -> None:
        self.url = url
        self._fs: Any
        self._fs, root = fsspec.core.url_to_fs(url)
        self._root = str(root).rstrip("/")
        self._is_local = "file" in _protocols(self._fs)
        self._cache_bytes = cache_bytes
        self._cache = cache_dir
        self._owned_cache: tempfile.TemporaryDirectory[str] | None = None
        if self._is_local:
            self._clean_temporaries()

    def put(self, digest: str, source: Path) -> None:
        """Store the bytes of `source` under `digest`; storing the same blob again is harmless.

        Raises `StoreError` when `source` has another digest, `StoreUnavailable` when it cannot be written.
        """
        try:
            if self._is_local:
                self._put_local(digest, source)
            else:
                _check_source(digest, _sha256(source))
                self._fs.makedirs(os.path.dirname(self._key(digest)), exist_ok=True)
                self._fs.put_file(str(source), self._key(digest))
        except OSError as error:
            raise StoreUnavailable(f"the blob store cannot be written: {error}") from error

    def local_path(self, digest: str) -> Path:
        """A local file with the blob's bytes, checked.

        Raises `AdapterLoadFailed` (missing or damaged bytes) or `StoreUnavailable`.
        """
        path = Path(self._key(digest)) if self._is_local else self._download(digest)
        try:
            if _sha256(path) != digest:
                raise AdapterLoadFailed(digest, "its stored bytes are damaged (the digest differs)")
        except FileNotFoundError:
            raise _missing(digest) from None
        except OSError as error:
            raise StoreUnavailable(f"the blob store cannot be read: {error}") from error
        return path

    def open(self, digest: str) -> BinaryIO:
        """Open a checked blob for reading. Raises as `local_path` does."""
        return self.local_path(digest).open("rb")

    def exists(self, digest: str) -> bool:
        """Whether the blob is stored. Raises `StoreUnavailable`."""
        try:
            return bool(self._fs.exists(self._key(digest)))
        except OSError as error:
            raise StoreUnavailable(f"the blob store cannot be read: {error}") from error

    def delete(self, digest: str) -> None:
        """Remove a blob; one that is absent is no error. Raises `StoreUnavailable`."""
        try:
            self._fs.rm_file(self._key(digest))
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreUnavailable(f"the blob store cannot be written: {error}") from error

    def digests(self) -> Iterator[str]:
        """Digests of all stored blobs, in no order. Raises `StoreUnavailable`."""
        try:
            paths = self._fs.find(self._root)
        except OSError as error:
            raise StoreUnavailable(f"the blob store cannot be read: {error}") from error
        for path in paths:
            name = str(path).rsplit("/", 1)[-1]
            if _is_digest(name):
                yield name

    def _key(self, digest: str) -> str:
        if not _is_digest(digest):
            raise ValueError(f"not a SHA-256 digest: {digest!r}")
        return f"{self._root}/{digest[:2]}/{digest}"

    def _put_local(self, digest: str, source: Path) -> None:
        target = Path(self._key(digest))
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            _fsync_folder(target.parent.parent)
        temporary = _copy_to_temporary(source, target.parent, digest)
        os.replace(temporary, target)
        _fsync_folder(target.parent)

    def _clean_temporaries(self) -> None:
        """Remove what a killed `put` left, where no live process can still be writing it (an hour old)."""
        horizon = time.time() - 3600
        for path in Path(self._root).glob(f"*/{_TEMPORARY}*"):
            try:
                if path.stat().st_mtime < horizon:
                    path.unlink()
            except FileNotFoundError:
                continue

    def _download(self, digest: str) -> Path:
        path = self._cache_folder() / digest
        try:
            if path.is_file() and _sha256(path) == digest:
                os.utime(path)
                return path
            handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
            os.close(handle)
            try:
                self._fs.get_file(self._key(digest), name)
                os.replace(name, path)
            finally:
                Path(name).unlink(missing_ok=True)
        except FileNotFoundError:
            raise _missing(digest) from None
        except OSError as error:
            raise StoreUnavailable(f"the blob store cannot be read: {error}") from error
        self._prune_cache(keep=path)
        return path

    def _cache_folder(self) -> Path:
        if self._cache is None:
            self._owned_cache = tempfile.TemporaryDirectory(prefix="patchbay-blobs-")
            self._cache = Path(self._owned_cache.name)
        self._cache.mkdir(parents=True, exist_ok=True)
        return self._cache

    def _prune_cache(self, keep: Path) -> None:
        files = sorted(
            ((p.stat().st_mtime, p.stat().st_size, p) for p in keep.parent.iterdir() if _is_digest(p.name)),
            reverse=True,
        )
        total = 0
        for _, size, path in files:
            total += size
            if total > self._cache_bytes and path != keep:
                path.unlink(missing_ok=True)


def _copy_to_temporary(source: Path, folder: Path, digest: str) -> str:
    """Copy `source` into a new durable temporary file of `folder` and return its path."""
    handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=folder)
    try:
        hasher = hashlib.sha256()
        with os.fdopen(handle, "wb") as target, source.open("rb") as reader:
            while chunk := reader.read(_CHUNK):
                hasher.update(chunk)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
        _check_source(digest, hasher.hexdigest())
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return name


def _check_source(digest: str, actual: str) -> None:
    if actual != digest:
        raise StoreError(f"the file to store has digest {actual[:12]}, not {digest[:12]}")


def _missing(digest: str) -> AdapterLoadFailed:
    return AdapterLoadFailed(digest, "its bytes are missing from the blob store")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_digest(name: str) -> bool:
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


def _protocols(fs: Any) -> tuple[str, ...]:
    protocol = fs.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
