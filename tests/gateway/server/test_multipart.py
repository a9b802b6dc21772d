"""Forms that arrive in pieces, and forms that are not what they should be."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from gateway.errors import InvalidRequest
from gateway.server.multipart import read_form


class Files:
    """Keeps every file that a form brings."""

    def __init__(self) -> None:
        self.whole: list[tuple[str, str, bytes]] = []

    async def begin(self, field: str, name: str) -> Sink:
        return Sink(self, field, name)


class Sink:
    def __init__(self, files: Files, field: str, name: str) -> None:
        self._files, self._field, self._name, self._data = files, field, name, b""

    async def write(self, chunk: bytes) -> None:
        self._data += chunk

    async def finish(self) -> None:
        self._files.whole.append((self._field, self._name, self._data))


def form() -> tuple[str, bytes]:
    files = [("files[]", ("a.json", b'{"a": 1}')), ("files", ("b\u00e9.bin", bytes(range(256)) * 3))]
    request = httpx.Request("POST", "http://x", data={"name": "m\u00fc", "alias": "prod"}, files=files)
    return request.headers["content-type"], request.read()


async def pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1 << 20])
async def test_the_pieces_do_not_matter(size: int) -> None:
    content_type, body = form()
    files = Files()
    fields = await read_form(content_type, pieces(body, size), files.begin)
    assert fields == {"name": "m\u00fc", "alias": "prod"}
    assert files.whole == [("files", "a.json", b'{"a": 1}'), ("files", "b\u00e9.bin", bytes(range(256)) * 3)]


@pytest.mark.parametrize("cut", [0, 1, 60, -3, -30])
async def test_a_form_that_ends_early_is_refused(cut: int) -> None:
    content_type, body = form()
    with pytest.raises(InvalidRequest):
        await read_form(content_type, pieces(body[:cut], 100), Files().begin)


@pytest.mark.parametrize("content_type", [None, "application/json", "multipart/form-data", "text/plain; boundary=x"])
async def test_another_kind_of_body_is_refused(content_type: str | None) -> None:
    with pytest.raises(InvalidRequest, match="multipart/form-data"):
        await read_form(content_type, pieces(b"{}", 9), Files().begin)


@pytest.mark.parametrize(
    "fields",
    [
        [("name", (None, "a")), ("name", (None, "b"))],
        [("name", (None, "a" * 5000))],
        [(f"field{i}", (None, "a")) for i in range(17)],
        [(f"file{i}", (f"{i}", b"a")) for i in range(65)],
        [("name", (None, b"\xff\xfe"))],
    ],
)
async def test_a_form_with_too_much_in_it_is_refused(fields: list[tuple[str, tuple[str | None, bytes]]]) -> None:
    request = httpx.Request("POST", "http://x", files=fields)
    with pytest.raises(InvalidRequest):
        await read_form(request.headers["content-type"], pieces(request.read(), 1000), Files().begin)
