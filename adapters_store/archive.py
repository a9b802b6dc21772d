"""Unpacks a tenant's tar, tar.gz or zip; runs only inside the confined process (see `sandbox`)."""

from __future__ import annotations

import codecs
import errno
import gzip
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final

from adapters_store.errors import AdapterInvalid, UploadTooLarge
from adapters_store.file_names import KEPT_FILES, is_kept, split_name
from adapters_store.strict_json import shown

_CHUNK: Final = 1 << 20
_MAX_MEMBERS: Final = 256
_MAX_RATIO: Final = 100
_RATIO_FREE_BYTES: Final = 16 << 20  # small configs compress well, so the ratio counts from here

_Reader = IO[bytes] | gzip.GzipFile

codecs.lookup("cp437")  # zip's encoding of names: load it while modules may still be loaded

ARCHIVE_FILE: Final = "upload.archive"
_UNREADABLE: Final = "the archive is encrypted or uses an unusual compression"


def unpack(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Unpack `folder`/upload.archive into `folder`.

    request: "name" (what the uploader called it, for errors) and "max_bytes" (of all files together).
    Returns {"folder", "files"}: the one folder they lay in, and their names. Raises `AdapterInvalid` or
    `UploadTooLarge`, and OSError where the disk is full.
    """
    path, name = folder / ARCHIVE_FILE, shown(str(request["name"]))
    sink = _Unpacked(folder, name, path.stat().st_size, int(request["max_bytes"]))
    try:
        _reader(path, name)(path, sink)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        RecursionError,
    ) as error:
        raise AdapterInvalid(f"the archive is truncated or damaged ({shown(str(error))})", file=name) from None
    except RuntimeError:  # what zipfile says to a password and to compressions that it lacks
        raise AdapterInvalid(_UNREADABLE, file=name) from None
    except (OSError, ValueError, OverflowError) as error:  # gzip's checksum errors, tar's malformed numbers
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise AdapterInvalid(f"the archive is damaged ({shown(str(error))})", file=name) from None
    return {"folder": sink.source or "", "files": sorted(sink.files)}


class _Unpacked:
    """The files unpacked so far, with the rules that hold over all of them."""

    def __init__(self, folder: Path, archive: str, packed_bytes: int, max_bytes: int) -> None:
        self._folder = folder
        self._archive = archive
        self._max_bytes = max_bytes
        self._max_ratio_bytes = max(_RATIO_FREE_BYTES, packed_bytes * _MAX_RATIO)
        self._num_bytes = 0
        self._num_members = 0
        self.files: set[str] = set()
        self.source: str | None = None

    def count_member(self) -> None:
        """Count one entry of the archive, of whatever kind."""
        self._num_members += 1
        if self._num_members > _MAX_MEMBERS:
            raise AdapterInvalid(f"the archive holds more than {_MAX_MEMBERS} entries", file=self._archive)

    def add(self, path: str, reader: _Reader) -> None:
        """Write one regular file, or read past it when it is one that is ignored."""
        source, name = split_name(path)
        if not is_kept(source, name):
            self.drain(reader)
            return
        if name in self.files:
            raise AdapterInvalid("the archive holds this file twice", file=name)
        if self.source not in (None, source):
            raise AdapterInvalid("the archive holds the files of more than one folder", file=shown(path))
        self.source = source
        self.files.add(name)
        with (self._folder / name).open("xb") as target:
            for chunk in self._chunks(reader):
                target.write(chunk)
                if target.tell() > KEPT_FILES[name]:
                    raise UploadTooLarge(name, KEPT_FILES[name])

    def drain(self, reader: _Reader) -> None:
        """Read to the end, under the same limits as what is kept."""
        for _ in self._chunks(reader):
            pass

    def _chunks(self, reader: _Reader) -> Iterator[bytes]:
        while chunk := reader.read(_CHUNK):
            self._num_bytes += len(chunk)
            if self._num_bytes > self._max_bytes:
                raise UploadTooLarge(f"what {self._archive} unpacks to", self._max_bytes)
            if self._num_bytes > self._max_ratio_bytes:
                raise AdapterInvalid(f"unpacks to over {_MAX_RATIO} times its own size", file=self._archive)
            yield chunk


def _reader(path: Path, name: str) -> Callable[[Path, _Unpacked], None]:
    """Choose by the file's first bytes; its name says nothing sure."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _unpack_zip
    if head.startswith(b"\x1f\x8b"):
        return _unpack_tar_gz
    if head[257:262] == b"ustar":
        return _unpack_tar
    raise AdapterInvalid("is not a tar, tar.gz or zip archive", file=name)


def _unpack_tar(path: Path, sink: _Unpacked) -> None:
    with path.open("rb") as file:
        _read_tar(file, sink)


def _unpack_tar_gz(path: Path, sink: _Unpacked) -> None:
    with gzip.open(path) as file:
        _read_tar(file, sink)
        sink.drain(file)  # to its end, where gzip says whether it came whole


def _read_tar(file: IO[bytes] | gzip.GzipFile, sink: _Unpacked) -> None:
    with tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            sink.count_member()
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise AdapterInvalid("is not a regular file (a link, a device or alike)", file=shown(member.name))
            reader = archive.extractfile(member)
            assert reader is not None
            sink.add(member.name, reader)


def _unpack_zip(path: Path, sink: _Unpacked) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            sink.count_member()
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.orig_filename.endswith("/") or kind == stat.S_IFDIR:  # `is_dir` fails on an empty name
                continue
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise AdapterInvalid(_UNREADABLE, file=shown(member.filename))
            if kind not in (0, stat.S_IFREG):
                raise AdapterInvalid("is not a regular file (a link, a device or alike)", file=shown(member.filename))
            with archive.open(member) as reader:
                sink.add(member.orig_filename, reader)
