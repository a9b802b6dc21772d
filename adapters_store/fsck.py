"""`patchbay store fsck`: every row against its bytes, every name against its version, and what nothing names."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from pydantic import ValidationError
from sqlalchemy import Column, Row, Table, Text, and_, cast, delete, func, select

from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.errors import AdapterInvalid, AdapterLoadFailed
from adapters_store.golden import parse_golden
from adapters_store.manifest import ADAPTER_METADATA_KEY, AdapterManifest, AdapterSpec
from adapters_store.references import delete_unreferenced, is_referenced
from adapters_store.tables import adapter_versions, adapters, aliases, metadata, training_files
from adapters_store.upload import abandoned_stagings, remove_staging

_CHUNK: Final = 1 << 20
_MAX_HEADER: Final = 16 << 20
_UPLOAD_S: Final = 3600
_UPLOAD_AGAIN: Final = "Upload the same content again: that puts these bytes back. Else delete it."
_FROM_BACKUP: Final = "The database was changed or damaged: restore it from a backup, or delete the version."

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. A leftover is what nothing names: `StoreCheck.repair` removes it and loses nothing.

    kind: a word for programs. subject: what it is about: a version, a name, a digest, a path. advice: what to do.
    """

    kind: str
    subject: str
    problem: str
    advice: str
    is_leftover: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


class StoreCheck:
    """Looks through a database and its blobs. The gateway may run meanwhile: what moves under the check is no damage.

    Memory is bounded: blobs are read in chunks, past the cache. staging: of this machine. Every method may raise
    `StoreUnavailable`.
    """

    def __init__(self, database: Database, blobs: BlobStore, staging: Path) -> None:
        self._database = database
        self._blobs = blobs
        self._staging = staging

    def findings(self, on_bytes: OnBytes = lambda _: None) -> Iterator[Finding]:
        """Everything that is wrong, as it is found; `on_bytes` is told of what was read."""
        problems = self._database.problems()
        yield from (Finding("database", self._database.shown_url, text, advice) for text, advice in problems)
        if problems:
            return  # its rows cannot be trusted, or not be read
        yield from self._check_numbers()
        for column in _naming_columns():
            yield from self._check_names(column)
        yield from self._check_golden()
        stored = set(self._blobs.digests())  # before the rows: what is published meanwhile is no leftover
        named = self._named()
        for digest, owners in named.items():
            yield from self._check_blob(digest, owners, on_bytes)
        yield from self._leftovers(stored - named.keys())

    def repair(self, finding: Finding) -> bool:
        """Remove a leftover, unless something has come to name it; whether it was removed."""
        match finding.kind:
            case "orphan-blob":
                return delete_unreferenced(self._database, self._blobs, finding.subject)
            case "unfinished-blob":
                self._blobs.remove_leftover(finding.subject)
                return True
            case "abandoned-upload":
                return remove_staging(Path(finding.subject))
            case "unfinished-file":
                with self._database.write() as connection:
                    is_it = and_(training_files.c.id == finding.subject, training_files.c.status == "uploaded")
                    return connection.execute(delete(training_files).where(is_it)).rowcount > 0
        return False

    # -- rows -----------------------------------------------------------------------------------------------

    def _check_numbers(self) -> Iterator[Finding]:
        """A version's number above its adapter's last would be given out again."""
        highest = func.max(adapter_versions.c.version)
        query = (
            select(adapters.c.tenant, adapters.c.name, adapters.c.last_version, highest.label("highest"))
            .join(adapter_versions, adapter_versions.c.adapter_id == adapters.c.id)
            .group_by(adapters.c.id)
            .having(highest > adapters.c.last_version)
        )
        for row in self._rows(query):
            problem = f"counts {row.last_version} versions and has a version {row.highest}"
            yield Finding("version-number", f"{row.tenant}/{row.name}", problem, _FROM_BACKUP)

    def _check_names(self, column: Column[Any]) -> Iterator[Finding]:
        """Rows of a table that name a version which does not exist."""
        table = column.table
        same = and_(adapter_versions.c.adapter_id == table.c.adapter_id, adapter_versions.c.version == column)
        shown = [column.label("version"), *([table.c.alias] if "alias" in table.c else [])]
        query = (
            select(adapters.c.tenant, adapters.c.name, *shown)
            .join_from(table, adapters, adapters.c.id == table.c.adapter_id)
            .outerjoin(adapter_versions, same)
            .where(adapter_versions.c.id.is_(None), column.is_not(None))
        )
        for row in self._rows(query):
            yield _dangling(table, row)

    def _check_golden(self) -> Iterator[Finding]:
        """Golden prompts that cannot be read; those of one version at a time, as they may be long."""
        query = (
            select(adapters.c.tenant, adapters.c.name, adapter_versions.c.version, adapter_versions.c.id)
            .join(adapter_versions, adapter_versions.c.adapter_id == adapters.c.id)
            .where(adapter_versions.c.golden.is_not(None))
        )
        for row in self._rows(query):
            text = select(cast(adapter_versions.c.golden, Text).label("golden"))  # it may be no JSON any more
            for kept in self._rows(text.where(adapter_versions.c.id == row.id)):
                if not _is_golden(kept.golden):
                    yield Finding("golden-prompts", _ref(row), "its golden prompts cannot be read", _FROM_BACKUP)

    def _named(self) -> dict[str, _Owners]:
        """The digests that rows name, each with its owners."""
        versions = select(
            adapters.c.tenant,
            adapters.c.name,
            adapter_versions.c.version,
            adapter_versions.c.digest,
            adapter_versions.c.rank,
            cast(adapter_versions.c.manifest, Text).label("manifest"),  # it may be no JSON any more
        ).join(adapter_versions, adapter_versions.c.adapter_id == adapters.c.id)
        owners: dict[str, _Owners] = {}
        for row in self._rows(versions):
            owners.setdefault(row.digest, _Owners([], [])).versions.append(row)
        for row in self._rows(select(training_files)):
            owners.setdefault(row.digest, _Owners([], [])).files.append(row)
        return owners

    def _rows(self, query: Any) -> Sequence[Row[Any]]:
        with self._database.read() as connection:
            return connection.execute(query).all()

    # -- bytes ----------------------------------------------------------------------------------------------

    def _check_blob(self, digest: str, owners: _Owners, on_bytes: OnBytes) -> Iterator[Finding]:
        uploading = [file for file in owners.files if file.status == "uploaded"]
        yield from _unfinished(uploading)
        if len(uploading) == len(owners.files) and not owners.versions:
            return
        stored = self._read(digest, on_bytes)
        if stored is not None and stored.digest == digest:
            for row in owners.versions:
                yield from _check_row(row, stored)
        elif self._is_named(digest):  # else it was deleted meanwhile
            kind, what = ("blob-missing", "missing") if stored is None else ("blob-damaged", "damaged")
            for owner in owners.refs:
                yield Finding(kind, owner, f"its bytes ({digest}) are {what} in the blob store", _UPLOAD_AGAIN)

    def _read(self, digest: str, on_bytes: OnBytes) -> _Stored | None:
        """What is stored under a digest; None where nothing is."""
        hasher, size, header = hashlib.sha256(), 0, b""
        try:
            with self._blobs.stored(digest) as file:
                for chunk in _chunks(file):
                    hasher.update(chunk)
                    size += len(chunk)
                    if len(header) < _header_bytes(header):
                        header += chunk
                    on_bytes(len(chunk))
        except AdapterLoadFailed:
            return None
        return _Stored(hasher.hexdigest(), size, header)

    def _is_named(self, digest: str) -> bool:
        with self._database.read() as connection:
            return is_referenced(connection, digest)

    # -- leftovers ------------------------------------------------------------------------------------------

    def _leftovers(self, orphans: set[str]) -> Iterator[Finding]:
        removal = "Nothing names it: --repair removes it."
        for digest in sorted(orphans):
            if not self._is_named(digest):
                problem = "a blob that no version and no file names"
                yield Finding("orphan-blob", digest, problem, removal, is_leftover=True)
        for name in self._blobs.leftovers():
            yield Finding("unfinished-blob", name, "a blob that was never finished", removal, is_leftover=True)
        for path in abandoned_stagings(self._staging):
            problem = "an upload whose process is gone"
            yield Finding("abandoned-upload", str(path), problem, removal, is_leftover=True)


@dataclass(frozen=True)
class _Owners:
    """The rows that name one blob."""

    versions: list[Row[Any]]
    files: list[Row[Any]]

    @property
    def refs(self) -> list[str]:
        return [_ref(row) for row in self.versions] + [file.id for file in self.files if file.status != "uploaded"]


@dataclass(frozen=True)
class _Stored:
    """A blob as it lies in the store. header: its first bytes, a safetensors header's at least where it is one."""

    digest: str
    num_bytes: int
    header: bytes

    def spec(self) -> AdapterSpec | None:
        """The adapter's spec that the header carries; None without one."""
        try:
            entries = json.loads(self.header[8 : _header_bytes(self.header)])
            return AdapterSpec.model_validate_json(entries["__metadata__"][ADAPTER_METADATA_KEY])
        except (ValueError, KeyError, TypeError):  # pydantic's error is a ValueError
            return None


def _check_row(row: Row[Any], stored: _Stored) -> Iterator[Finding]:
    """What a version's row says of bytes that are whole."""
    try:
        manifest = AdapterManifest.model_validate_json(row.manifest)
    except ValidationError:
        yield Finding("manifest", _ref(row), "its manifest cannot be read", _FROM_BACKUP)
        return
    told = AdapterSpec.model_validate(manifest.model_dump(include=set(AdapterSpec.model_fields)))
    differs = {
        "digest": manifest.digest != row.digest,
        "rank": manifest.rank != row.rank,
        "size": manifest.size_bytes != stored.num_bytes,
        "spec": stored.spec() != told,
    }
    for name in (name for name, wrong in differs.items() if wrong):
        yield Finding("manifest", _ref(row), f"its manifest has another {name} than its row or its bytes", _FROM_BACKUP)


def _is_golden(text: str) -> bool:
    try:
        parse_golden(text.encode())
    except AdapterInvalid:
        return False
    return True


def _unfinished(files: Sequence[Row[Any]]) -> Iterator[Finding]:
    """Training files whose upload was cut off; one that is an hour old goes on no more."""
    for file in files:
        if file.created_at < time.time() - _UPLOAD_S:
            advice = "Its uploader was never told yes: --repair removes it."
            yield Finding("unfinished-file", file.id, "a training file that never came whole", advice, is_leftover=True)


def _naming_columns() -> list[Column[Any]]:
    """The columns of tables beside `adapter_versions` that name a version."""
    about = [table for table in metadata.sorted_tables if {"adapter_id", "version"} <= set(table.c.keys())]
    return [*(table.c.version for table in about if table is not adapter_versions), aliases.c.canary_version]


def _dangling(table: Table, row: Row[Any]) -> Finding:
    name = f"{row.tenant}/{row.name}"
    subject = f"{name}@{row.alias}" if "alias" in table.c else f"{name}:{row.version}"
    problem = f"{table.name} names version {row.version}, which does not exist"
    if table is aliases:
        advice = f"Point it at a version that exists: patchbay adapter alias {name} {row.alias} VERSION."
    else:
        advice = f"No request reads it: delete these rows of {table.name} in the database."
    return Finding("dangling-name", subject, problem, advice)


def _ref(row: Row[Any]) -> str:
    return f"{row.tenant}/{row.name}:{row.version}"


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _header_bytes(start: bytes) -> int:
    """Length of a safetensors file's header, its first eight bytes included, as these say; bounded."""
    if len(start) < 8:
        return 8
    return min(8 + int.from_bytes(start[:8], "little"), _MAX_HEADER)
