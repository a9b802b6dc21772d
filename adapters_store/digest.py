"""SHA-256 digests: what names a blob, and what its bytes are checked against."""

from __future__ import annotations

import hashlib
from typing import BinaryIO


def sha256_of(file: BinaryIO) -> str:
    """The digest, in hex, of an open file from its position to its end; other threads run meanwhile."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # its protocol asks for more


def is_digest(name: str) -> bool:
    """Whether `name` is a SHA-256 digest in lowercase hex."""
    return len(name) == 64 and set(name) <= set("0123456789abcdef")
