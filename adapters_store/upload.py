"""Staging: an upload on its way to become a version. It is written to disk as it arrives, and kept only if valid."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from adapters_store.archive import ARCHIVE_FILE
from adapters_store.base_spec import BaseSpec
from adapters_store.canonical import CANONICAL_FILE
from adapters_store.errors import AdapterInvalid, StoreError, UploadTooLarge, telling_full_disk
from adapters_store.file_names import (
    CONFIG_FILE,
    GOLDEN_FILE,
    KEPT_FILES,
    WEIGHTS_FILE,
    WEIGHTS_FILES,
    is_kept,
    split_name,
)
from adapters_store.golden import GoldenPrompt, parse_golden
from adapters_store.manifest import AdapterManifest
from adapters_store.sandbox import ConfinedProcess, SandboxLimits
from adapters_store.strict_json import shown

_HEADROOM: Final = 128 << 20  # for the header, and for VeRA's matrices where the file leaves them out
_EARLY: Final = threading.BoundedSemaphore(2)  # processes that wait for uploads which may take long to arrive
_MAX_FILES: Final = 64  # of which most are ignored: few have a meaning
_NAME_BYTES: Final = 8
_OWN_NAME: Final = re.compile(rf"[0-9a-f]{{{2 * _NAME_BYTES}}}")  # whatever else lies there is not ours to remove


@dataclass(frozen=True)
class UploadLimits:
    """Limits of one upload in bytes: of what arrives, and of what archives unpack to; and of the confined tasks.

    max_import_error: of a delta that is served by fewer ranks than it has, as `AdapterManifest.import_error`.
    """

    max_upload_bytes: int = 2 << 30
    max_unpacked_bytes: int = 4 << 30
    max_import_error: float = 0.01
    sandbox: SandboxLimits = field(default_factory=SandboxLimits)


@dataclass(frozen=True)
class StagedAdapter:
    """A validated adapter, ready to be published while its `Staging` is open.

    path: its canonical file. golden: what its self-test must answer.
    """

    manifest: AdapterManifest
    path: Path
    golden: tuple[GoldenPrompt, ...] = ()


class Staging:
    """One upload's private folder under `root`; leaving the `with` block removes it, whatever happened.

    Memory stays bounded: chunks go to disk as they come. Whatever writes there may raise `DiskFull`. Not for several
    threads at once.
    """

    def __init__(self, root: Path, limits: UploadLimits | None = None) -> None:
        self._limits = limits or UploadLimits()
        with telling_full_disk():
            root.mkdir(parents=True, exist_ok=True)
            self._lock = _lock_new(root)
            self._path = Path(self._lock.name).with_suffix("")
            self._path.mkdir(mode=0o700)
        self._source: str | None = None
        self._files: set[str] = set()
        self._sinks: list[UploadSink] = []
        self._num_bytes = 0
        self._validator: ConfinedProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything that was staged."""
        for sink in self._sinks:
            with suppress(OSError):  # of a full disk, which has no room for the last bytes either
                sink.close()
        if self._validator is not None:
            self._take_validator().kill()
        shutil.rmtree(self._path, ignore_errors=True)
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()

    def add_file(self, name: str, chunks: Iterable[bytes]) -> None:
        """Take one file of a peft folder. Raises `AdapterInvalid` or `UploadTooLarge`."""
        sink = self.begin_file(name)
        for chunk in chunks:
            sink.write(chunk)
        sink.finish()

    def add_archive(self, name: str, chunks: Iterable[bytes]) -> None:
        """Take a tar, tar.gz or zip of a peft folder. Raises `AdapterInvalid` or `UploadTooLarge`."""
        sink = self.begin_archive(name)
        for chunk in chunks:
            sink.write(chunk)
        sink.finish()

    def begin_file(self, name: str) -> UploadSink:
        """Begin a file whose chunks come one by one. Raises `AdapterInvalid` for its name, or one file too many."""
        if len(self._sinks) == _MAX_FILES:
            raise AdapterInvalid(f"the upload holds more than {_MAX_FILES} files", file=shown(name))
        folder, file = split_name(name)
        if not is_kept(folder, file):
            return self._sink(None, shown(name), self._limits.max_upload_bytes)
        self._claim(folder, file)
        return self._sink(self._path / file, file, KEPT_FILES[file])

    def begin_archive(self, name: str) -> UploadSink:
        """Begin an archive whose chunks come one by one; `finish` unpacks it."""
        if self._files:
            raise AdapterInvalid("an upload holds either files or one archive", file=shown(name))
        self._files.add(ARCHIVE_FILE)
        path = self._path / ARCHIVE_FILE
        limit = self._limits.max_upload_bytes
        return self._sink(path, shown(name), limit, lambda: self._unpack(path, name))

    def expect_validation(self) -> None:
        """Begin the process that is to `validate`, while files arrive; a few uploads may have theirs at once."""
        if self._validator is None and _EARLY.acquire(blocking=False):
            try:
                self._validator = ConfinedProcess("validate", self._path)
            except StoreError:  # which `validate` tells
                _EARLY.release()

    def validate(
        self,
        base: BaseSpec,
        max_rank: int,
        base_fingerprint: str | None = None,
        *,
        max_virtual_tokens: int = 0,
        max_token_rows: int = 0,
    ) -> StagedAdapter:
        """Check what was staged against the served base, in a confined process.

        max_rank: the tenant's limit. base_fingerprint: the base that the uploader says it was trained on, if any.
        max_virtual_tokens: the most that may come before a prompt (prompt, P- and prefix tuning). max_token_rows: the
        most rows of its own for tokens (trained tokens, embed_tokens and lm_head).
        Raises `AdapterInvalid` naming the file and the field or tensor at fault.
        """
        if CONFIG_FILE not in self._files:
            raise AdapterInvalid("is missing from the upload", file=CONFIG_FILE)
        weights_file = self._weights_file()
        golden = parse_golden((self._path / GOLDEN_FILE).read_bytes()) if GOLDEN_FILE in self._files else ()
        weights_bytes = (self._path / weights_file).stat().st_size
        request = {
            "base": asdict(base),
            "weights_file": weights_file,
            "max_rank": max_rank,
            "max_virtual_tokens": max_virtual_tokens,
            "max_import_error": self._limits.max_import_error,
            "max_token_rows": max_token_rows,
            "base_fingerprint": base_fingerprint,
        }
        limits = self._limits.sandbox  # the library maps the whole file once
        limits = replace(limits, memory_bytes=limits.memory_bytes + weights_bytes, file_bytes=weights_bytes + _HEADROOM)
        process = self._take_validator() if self._validator else ConfinedProcess("validate", self._path)
        answer = process.run(request, limits)
        return StagedAdapter(AdapterManifest.model_validate(answer), self._path / CANONICAL_FILE, golden)

    def _take_validator(self) -> ConfinedProcess:
        assert self._validator is not None
        process, self._validator = self._validator, None
        _EARLY.release()
        return process

    def _sink(self, path: Path | None, name: str, max_bytes: int, then: Callable[[], None] | None = None) -> UploadSink:
        sink = UploadSink(path, name, max_bytes, self._count, then)
        self._sinks.append(sink)
        return sink

    def _claim(self, folder: str, file: str) -> None:
        """Note that `file` came: all in one folder, none twice, and no archive beside them."""
        if ARCHIVE_FILE in self._files:
            raise AdapterInvalid("an upload holds either files or one archive", file=file)
        if file in self._files:
            raise AdapterInvalid("the upload holds this file twice", file=file)
        if self._source not in (None, folder):
            raise AdapterInvalid("the upload holds the files of more than one folder", file=file)
        self._source = folder
        self._files.add(file)

    def _weights_file(self) -> str:
        found = [name for name in WEIGHTS_FILES if name in self._files]
        if not found:
            raise AdapterInvalid("is missing from the upload", file=WEIGHTS_FILE)
        if len(found) > 1:
            raise AdapterInvalid(f"comes beside {found[0]}; an upload has one of the two", file=found[1])
        return found[0]

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > self._limits.max_upload_bytes:
            raise UploadTooLarge("the upload", self._limits.max_upload_bytes)

    def _unpack(self, path: Path, name: str) -> None:
        request = {"name": name, "max_bytes": self._limits.max_unpacked_bytes}
        limits = replace(self._limits.sandbox, file_bytes=self._limits.max_unpacked_bytes + _HEADROOM)
        answer = ConfinedProcess("unpack", self._path).run(request, limits)
        self._files |= set(answer["files"])
        path.unlink()


class UploadSink:
    """One file that is arriving. A file that is ignored is counted and dropped (`path` None)."""

    def __init__(
        self,
        path: Path | None,
        name: str,
        max_bytes: int,
        count: Callable[[int], None],
        then: Callable[[], None] | None,
    ) -> None:
        self._name = name
        self._max_bytes = max_bytes
        self._count = count
        self._then = then
        self._num_bytes = 0
        with telling_full_disk():
            self._file: IO[bytes] | None = None if path is None else path.open("xb")

    def write(self, chunk: bytes) -> None:
        """Take the next bytes. Raises `UploadTooLarge`."""
        self._count(len(chunk))
        self._num_bytes += len(chunk)
        if self._num_bytes > self._max_bytes:
            raise UploadTooLarge(self._name, self._max_bytes)
        if self._file is not None:
            with telling_full_disk():
                self._file.write(chunk)

    def finish(self) -> None:
        """The file has come whole; an archive is unpacked now. Raises `AdapterInvalid` or `UploadTooLarge`."""
        with telling_full_disk():
            self.close()
        if self._then is not None:
            self._then()

    def close(self) -> None:
        """Stop writing; harmless when done already."""
        if self._file is not None:
            self._file.close()


def clean_staging(root: Path) -> int:
    """Remove what uploads left under `root` whose process is gone; for start-up. Returns how many."""
    return sum(map(remove_staging, abandoned_stagings(root)))


def abandoned_stagings(root: Path) -> list[Path]:
    """The folders of uploads under `root` whose process is gone; some have only their lock file left."""
    folders = {path.with_suffix("") for path in root.glob("*") if _OWN_NAME.fullmatch(path.stem)}
    return sorted(folder for folder in folders if not _is_live(folder))


def remove_staging(folder: Path) -> bool:
    """Remove an abandoned upload; False when its process lives after all."""
    try:
        with _locked(folder):
            shutil.rmtree(folder, ignore_errors=True)
            _lock_path(folder).unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:  # a lock file comes before its folder and goes after it: this upload never ends
        shutil.rmtree(folder, ignore_errors=True)
    return True


def _is_live(folder: Path) -> bool:
    try:
        with _locked(folder):
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an upload's lock. Raises BlockingIOError while its process does, FileNotFoundError without a lock file."""
    with _lock_path(folder).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _lock_path(folder: Path) -> Path:
    return folder.with_suffix(".lock")


def _lock_new(root: Path) -> IO[bytes]:
    """A locked file of a new name; while its process lives, `clean_staging` leaves the folder beside it alone."""
    while True:
        file = (root / f"{secrets.token_hex(_NAME_BYTES)}.lock").open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else a cleaner came between the two lines above
            return file
        file.close()
