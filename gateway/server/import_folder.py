"""A peft folder that the server itself reads: on its disk or in an object store, where the operator allows it."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import fsspec

from adapters_store.file_names import CONFIG_FILE, KEPT_FILES
from adapters_store.upload import Staging
from gateway.errors import InvalidRequest, PermissionDenied

_CHUNK: Final = 1 << 20
_PARAM: Final = "lora_path"


class ImportFolder:
    """The folder at `path`, a local path or an fsspec URL, which must lie in one of `roots`. Blocks on its disk.

    Symlinks are followed before anything is compared, those of its files too. Raises `PermissionDenied` for what lies
    elsewhere, and `InvalidRequest` where there is no peft folder.
    """

    def __init__(self, path: str, roots: Sequence[str]) -> None:
        if not roots:
            raise PermissionDenied(
                "This gateway reads no folders: its operator names those that it may read in store.import_roots.",
                param=_PARAM,
            )
        self._roots = [_resolve(root) for root in roots]
        self._fs, folder = self._allowed(path)
        names = [name for name in KEPT_FILES if self._fs.isfile(f"{folder}/{name}")]
        if CONFIG_FILE not in names:
            raise InvalidRequest(f"There is no {CONFIG_FILE} in {path}.", param=_PARAM)
        self._names = names
        self._folder = folder

    def stage(self, staging: Staging) -> None:
        """Take its files into an upload, piece by piece. Raises what `Staging.add_file` does."""
        for name in self._names:
            scheme = "" if _is_local(self._fs) else f"{_protocol(self._fs)}://"
            fs, path = self._allowed(f"{scheme}{self._folder}/{name}")
            with fs.open(path, "rb") as file:
                staging.add_file(name, iter(lambda: file.read(_CHUNK), b""))  # it is read here

    def _allowed(self, path: str) -> tuple[Any, str]:
        fs, real = _resolve(path)
        for root_fs, root in self._roots:
            if type(fs) is type(root_fs) and (real == root or real.startswith(f"{root.rstrip('/')}/")):
                return fs, real
        raise PermissionDenied(f"{path} does not lie in one of the folders of store.import_roots.", param=_PARAM)


def _resolve(path: str) -> tuple[Any, str]:
    """The file system and the path in it, without `..` and, on a disk, without symlinks."""
    if "::" in path:
        raise InvalidRequest("Chained URLs are not read.", param=_PARAM)
    try:
        fs, plain = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}", param=_PARAM) from None
    return fs, str(Path(plain).resolve()) if _is_local(fs) else posixpath.normpath(plain)


def _protocol(fs: Any) -> str:
    return fs.protocol if isinstance(fs.protocol, str) else str(fs.protocol[0])


def _is_local(fs: Any) -> bool:
    return _protocol(fs) == "file"
