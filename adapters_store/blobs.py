"""Content-addressed blobs in a folder or in any store that fsspec reaches."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import fsspec

from adapters_store.blob_cache import BlobCache
from adapters_store.digest import is_digest, sha256_of
from adapters_store.errors import AdapterLoadFailed, StoreError, StoreUnavailable

_CHUNK: Final = 1 << 20
_PART: Final = 8 << 20  # of a transfer to an object store: memory holds one or two
_TEMPORARY: Final = ".tmp-"
_ABANDONED_S: Final = 3600.0


class BlobStore:
    """Blobs named by the SHA-256 (hex) of their bytes, under an fsspec URL such as `file:///data/blobs` or `s3://bucket/x`.

    A put into a folder is atomic and durable: a temporary file, or one that is final; fsync; rename, or a link; fsync
    of the folder. Object stores make an object visible whole by themselves. Every read checks the digest. Safe in any
    thread.

    cache_dir: where blobs of a remote store are kept for readers; a private temporary folder by default.
    cache_bytes: that folder's limit; the least recently used files go first.
    """

    def __init__(self, url: str, cache_dir: Path | None = None, cache_bytes: int = 20 << 30) -> None:
        self.url = url
        self._fs: Any
        self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)  # other processes put and delete too
        self._root = str(root).rstrip("/")
        self._is_local = "file" in _protocols(self._fs)
        self._given_cache_dir = cache_dir
        self._cache_bytes = cache_bytes
        self._cache: BlobCache | None = None
        self._own_cache_dir: tempfile.TemporaryDirectory[str] | None = None
        if self._is_local:
            self._clean_temporaries()

    def __reduce__(self) -> tuple[type[BlobStore], tuple[str, Path | None, int]]:
        return BlobStore, (self.url, self._given_cache_dir, self._cache_bytes)  # the same store in another process

    def put(self, digest: str, source: Path, *, is_final: bool = False) -> None:
        """Store the bytes of `source` under `digest`; storing the same blob again is harmless.

        is_final: nobody writes to the file any more, so that a folder's blob may be the file itself.
        Raises `StoreError` when `source` has another digest, `StoreUnavailable` when it cannot be written.
        """
        key = self._key(digest)
        with _reaching("written"):
            if self._is_local:
                _put_into_folder(Path(key), digest, source, is_final)
            else:
                self._put_object(key, digest, source)

    def open(self, digest: str) -> BinaryIO:
        """A checked blob, open at its start; its bytes stay readable while it is open, whatever is deleted or evicted.

        Raises `AdapterLoadFailed` (missing or damaged bytes) or `StoreUnavailable`.
        """
        key = self._key(digest)
        with _reaching("read"):
            try:
                if self._is_local:
                    return _open_checked(Path(key), digest)
                return self._open_cache().open(digest, lambda path: self._fs.get_file(key, str(path)))
            except FileNotFoundError:
                raise AdapterLoadFailed(digest, "its bytes are missing from the blob store") from None

    @contextmanager
    def reading(self, digest: str) -> Iterator[Path]:
        """A checked blob as a local file, which stays there during the `with` block. Raises as `open` does."""
        with self.open(digest) as file:
            yield Path(file.name)

    def local_path(self, digest: str) -> Path:
        """A checked blob as a local file; that of a remote store may be evicted at any time. Raises as `open` does."""
        with self.reading(digest) as path:
            return path

    @contextmanager
    def stored(self, digest: str) -> Iterator[BinaryIO]:
        """A blob as it is stored, unchecked and past the cache, to be read once; memory holds a few MB of it.

        Raises `AdapterLoadFailed` (missing bytes) or `StoreUnavailable`.
        """
        key = self._key(digest)
        with _reaching("read"):
            try:
                file = self._fs.open(key, "rb", block_size=_PART)
            except FileNotFoundError:
                raise AdapterLoadFailed(digest, "its bytes are missing from the blob store") from None
            with file:
                yield file

    def exists(self, digest: str) -> bool:
        """Whether the blob is stored. Raises `StoreUnavailable`."""
        key = self._key(digest)
        with _reaching("read"):
            return bool(self._fs.exists(key))

    def delete(self, digest: str) -> None:
        """Remove a blob; one that is absent is no error. Raises `StoreUnavailable`."""
        key = self._key(digest)
        with _reaching("written"), suppress(FileNotFoundError):
            self._fs.rm_file(key)

    def digests(self) -> Iterator[str]:
        """Digests of all stored blobs, in no order. Raises `StoreUnavailable`."""
        with _reaching("read"):
            paths = self._fs.find(self._root)
        names = (str(path).rsplit("/", 1)[-1] for path in paths)
        return filter(is_digest, names)

    def leftovers(self) -> list[str]:
        """What killed puts left behind, by name: temporary files, or uploads to an S3 store that began an hour ago.

        A put of this machine into a folder that still runs is not among them; another machine's may be. Raises
        `StoreUnavailable`.
        """
        with _reaching("read"):
            if self._is_local:
                return [str(path) for path in self._temporaries() if not _is_being_written(path)]
            return [f"{key}?{upload}" for key, upload in self._unfinished_uploads()]

    def remove_leftover(self, name: str) -> None:
        """Remove one of `leftovers`; one that is gone is no error. Raises `StoreUnavailable`."""
        with _reaching("written"), suppress(FileNotFoundError):
            if self._is_local:
                os.unlink(name)
                return
            key, _, upload = name.rpartition("?")
            bucket, _, path = key.partition("/")
            self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=path, UploadId=upload)

    def _key(self, digest: str) -> str:
        if not is_digest(digest):
            raise ValueError(f"not a SHA-256 digest: {digest!r}")
        return f"{self._root}/{digest[:2]}/{digest}"

    def _put_object(self, key: str, digest: str, source: Path) -> None:
        """Send the file in parts; the object appears when all are there."""
        with source.open("rb") as file:
            _check_source(digest, sha256_of(file))
        target = self._fs.open(key, "wb", block_size=_PART, autocommit=False)
        try:
            _copy(source, target)
            target.close()
        except BaseException:
            target.discard()
            raise
        target.commit()

    def _open_cache(self) -> BlobCache:
        if self._cache is None:
            folder = self._given_cache_dir
            if folder is None:
                self._own_cache_dir = tempfile.TemporaryDirectory(prefix="patchbay-blobs-")
                folder = Path(self._own_cache_dir.name)
            self._cache = BlobCache(folder, self._cache_bytes)
        return self._cache

    def _temporaries(self) -> Iterator[Path]:
        return Path(self._root).glob(f"*/{_TEMPORARY}*")

    def _clean_temporaries(self) -> None:
        """Remove what a killed `put` left, where no live process can still be writing it (an hour old)."""
        horizon = time.time() - _ABANDONED_S
        for path in self._temporaries():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < horizon:
                    path.unlink()

    def _unfinished_uploads(self) -> Iterator[tuple[str, str]]:
        """Of an S3 store, (bucket/key, upload id) of what may run no more; other stores tell of none."""
        if "s3" not in _protocols(self._fs):
            return
        bucket, _, prefix = self._root.partition("/")
        where: dict[str, str] = {"Bucket": bucket, "Prefix": prefix}
        horizon = time.time() - _ABANDONED_S
        while True:
            page = self._fs.call_s3("list_multipart_uploads", **where)
            for upload in page.get("Uploads", ()):
                if upload["Initiated"].timestamp() < horizon:
                    yield f"{bucket}/{upload['Key']}", upload["UploadId"]
            if not page.get("IsTruncated"):
                return
            where |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


@contextmanager
def _reaching(verb: str) -> Iterator[None]:
    """What a store's driver raises, of whatever class, as `StoreUnavailable`."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        raise StoreUnavailable(f"the blob store cannot be {verb}: {error}") from error


def _put_into_folder(target: Path, digest: str, source: Path, is_final: bool) -> None:
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        _fsync_folder(target.parent.parent)
    if not (is_final and not target.exists() and _link_durable(source, target, digest)):
        os.replace(_copy_to_temporary(source, target.parent, digest), target)
    _fsync_folder(target.parent)


def _link_durable(source: Path, target: Path, digest: str) -> bool:
    """Give a file a second name; False on another file system, or where that name is taken."""
    with source.open("rb") as file:
        _check_source(digest, sha256_of(file))
        os.fchmod(file.fileno(), 0o600)
        os.fsync(file.fileno())
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _open_checked(path: Path, digest: str) -> BinaryIO:
    file = path.open("rb")
    try:
        if sha256_of(file) != digest:
            raise AdapterLoadFailed(digest, "its stored bytes are damaged (the digest differs)")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _copy_to_temporary(source: Path, folder: Path, digest: str) -> str:
    """Copy `source` into a new durable temporary file of `folder`, locked meanwhile, and return its path."""
    handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=folder)
    try:
        with os.fdopen(handle, "wb") as target:
            fcntl.flock(target, fcntl.LOCK_EX)
            actual = _copy(source, target)
            target.flush()
            os.fsync(target.fileno())
        _check_source(digest, actual)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return name


def _copy(source: Path, target: Any) -> str:
    """Write the bytes of `source` into an open file; their digest."""
    hasher = hashlib.sha256()
    with source.open("rb") as reader:
        while chunk := reader.read(_CHUNK):
            hasher.update(chunk)
            target.write(chunk)
    return hasher.hexdigest()


def _is_being_written(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:  # it was finished just now
        return True
    except BlockingIOError:
        return True
    return False


def _check_source(digest: str, actual: str) -> None:
    if actual != digest:
        raise StoreError(f"the file to store has digest {actual[:12]}, not {digest[:12]}")


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _protocols(fs: Any) -> tuple[str, ...]:
    protocol = fs.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
