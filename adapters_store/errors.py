"""What the adapter store raises; each carries the data that a person needs to act on it."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapters_store.reports import VersionReport


class StoreError(Exception):
    """Base of the store's errors. `param` names the request field at fault, if one is."""

    param: str | None = None


class AdapterInvalid(StoreError):
    """An uploaded adapter was refused. Nothing of it was kept.

    `file` is the file inside the upload, `field` the config field or tensor name, if one is at fault.
    """

    def __init__(self, reason: str, *, file: str | None = None, field: str | None = None) -> None:
        where = ": ".join(part for part in (file, field) if part)
        super().__init__(f"{where}: {reason}" if where else reason)
        self.reason = reason
        self.file = file
        self.field = field
        self.param = field


class UploadTooLarge(StoreError):
    """An upload, or what it unpacks to, passes its byte limit."""

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(f"{what} is larger than the limit of {limit:,} bytes. Upload a smaller adapter.")
        self.what = what
        self.limit = limit


class AdapterNotFound(StoreError):
    """No such adapter, version or alias for this tenant (another tenant's looks the same)."""

    param = "model"

    def __init__(self, ref: str) -> None:
        super().__init__(f"The model {ref!r} does not exist or you do not have access to it.")
        self.ref = ref


class AliasInUse(StoreError):
    """A version cannot be deleted while an alias names it."""

    def __init__(self, ref: str, aliases: list[str]) -> None:
        names = ", ".join(f"@{alias}" for alias in aliases)
        super().__init__(f"{ref} is named by {names}. Point the alias at another version first, or delete the alias.")
        self.ref = ref
        self.aliases = aliases


class SelfTestFailed(StoreError):
    """A new version did not pass its self-test: it is kept, quarantined, and no alias names it."""

    def __init__(self, ref: str, report: VersionReport) -> None:
        super().__init__(f"{ref} did not pass its self-test and is quarantined: {report.reason}")
        self.ref = ref
        self.report = report


class RetestConflict(StoreError):
    """A version cannot be tested again now, or what came of the test no longer holds."""

    def __init__(self, ref: str, reason: str) -> None:
        super().__init__(f"{ref} {reason}.")
        self.ref = ref
        self.reason = reason


class VersionNotReady(StoreError):
    """A version cannot be served: its self-test has not ended, or it is quarantined."""

    param = "model"

    def __init__(self, ref: str, status: str, report: VersionReport | None) -> None:
        reason = f" ({report.reason})" if report is not None and report.reason else ""
        super().__init__(
            f"{ref} is {status}{reason} and takes no requests. Use another version, or roll the alias back."
        )
        self.ref = ref
        self.report = report


class StoreUnavailable(StoreError):
    """The database or the blob store does not answer, or has no room."""


class DiskFull(StoreUnavailable):
    """Uploads arrive on a disk that has no space left."""

    def __init__(self) -> None:
        super().__init__("No space is left on the disk where uploads arrive. Retry once the operator has made room.")


@contextmanager
def telling_full_disk() -> Iterator[None]:
    """What the system says of a full disk in this block, as `DiskFull`."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DiskFull from error


class AdapterLoadFailed(StoreError):
    """A stored adapter could not be read back (missing blob, damaged bytes, no room for its rank)."""

    def __init__(self, digest: str, reason: str) -> None:
        super().__init__(f"adapter {digest[:12]} could not be loaded: {reason}")
        self.digest = digest
        self.reason = reason


class InvalidName(StoreError):
    """A tenant, adapter or alias name that does not follow the rule for names."""

    def __init__(self, what: str, name: str) -> None:
        kind = "adapter" if what == "name" else what
        super().__init__(
            f"{name[:80]!r} is not a valid {kind} name. Use 1 to 63 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or digit."
        )
        self.param = what
        self.name = name


class InvalidTag(StoreError):
    """A tag that passes a limit of its length or number."""

    def __init__(self, reason: str, param: str) -> None:
        super().__init__(f"The tag cannot be set: {reason}.")
        self.reason = reason
        self.param = param


class NoPreviousVersion(StoreError):
    """An alias has named no other version before, so there is nothing to roll back to."""

    def __init__(self, ref: str) -> None:
        super().__init__(f"{ref} has named no other version before. Set the alias to a version instead.")
        self.param = "alias"
        self.ref = ref


class TenantExists(StoreError):
    """A tenant of that id exists already."""

    def __init__(self, tenant: str) -> None:
        super().__init__(f"The tenant {tenant!r} exists already.")
        self.param = "id"
        self.tenant = tenant


class TenantNotFound(StoreError):
    """No tenant of that id."""

    def __init__(self, tenant: str) -> None:
        super().__init__(f"The tenant {tenant!r} does not exist. Create it first.")
        self.param = "tenant"
        self.tenant = tenant


class KeyNotFound(StoreError):
    """No API key of that id."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"No key has the id {key_id!r}.")
        self.key_id = key_id
