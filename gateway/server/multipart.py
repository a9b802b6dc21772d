"""multipart/form-data read as it arrives: small fields into memory, files piece by piece to where they belong."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from gateway.errors import InvalidRequest

_MAX_FIELDS: Final = 16
_MAX_FIELD_BYTES: Final = 4096
_MAX_FILES: Final = 64


class FileSink(Protocol):
    """Where one file goes."""

    async def write(self, chunk: bytes) -> None:
        """Take the next bytes."""

    async def finish(self) -> None:
        """The file has come whole."""


OnFile = Callable[[str, str], Awaitable[FileSink]]
"""(form field, file name) -> where its bytes go."""


async def read_form(content_type: str | None, body: AsyncIterator[bytes], on_file: OnFile) -> dict[str, str]:
    """Read a form to its end; the text fields by name. Memory holds one piece of `body` at a time.

    Raises `InvalidRequest` for a body that is not a whole form, for a field given twice or too long, and what
    `on_file` and its sinks raise.
    """
    reader = _FormReader(_boundary(content_type), on_file)
    async for piece in body:
        await reader.feed(piece)
    return reader.close()


def _boundary(content_type: str | None) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary or len(boundary) > 256:
        raise InvalidRequest("the body must be multipart/form-data with a boundary")
    return boundary


class _FormReader:
    """Collects what the parser's callbacks say of one piece, then does it: callbacks cannot wait.

    _steps: a part's headers when it begins, its bytes, None when it ends.
    """

    def __init__(self, boundary: bytes, on_file: OnFile) -> None:
        self._on_file = on_file
        self._parser = MultipartParser(
            boundary,
            {
                "on_header_field": self._header_name_part,
                "on_header_value": self._header_value_part,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": lambda data, start, end: self._steps.append(data[start:end]),
                "on_part_end": lambda: self._steps.append(None),
                "on_end": self._end,
            },
        )
        self._steps: list[dict[bytes, bytes] | bytes | None] = []
        self._headers: dict[bytes, bytes] = {}
        self._header_name = self._header_value = b""
        self._fields: dict[str, bytes] = {}
        self._num_files = 0
        self._field = ""
        self._sink: FileSink | None = None
        self._ended = False

    async def feed(self, piece: bytes) -> None:
        self._steps = []
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise InvalidRequest(f"the body is not a well-formed form: {error}") from None
        for step in self._steps:
            if isinstance(step, dict):
                await self._begin(step)
            elif step is not None:
                await self._take(step)
            elif self._sink is not None:
                await self._sink.finish()

    def close(self) -> dict[str, str]:
        if not self._ended:
            raise InvalidRequest("the form ends before its last boundary: the upload was cut off")
        try:
            return {name: value.decode() for name, value in self._fields.items()}
        except UnicodeDecodeError:
            raise InvalidRequest("the form's text fields must be UTF-8") from None

    def _header_name_part(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_value_part(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _headers_finished(self) -> None:
        self._steps.append(self._headers)
        self._headers = {}

    def _end(self) -> None:
        self._ended = True

    async def _begin(self, headers: dict[bytes, bytes]) -> None:
        _, options = parse_options_header(headers.get(b"content-disposition"))
        self._field = options.get(b"name", b"").decode("utf-8", "replace").removesuffix("[]")
        filename = options.get(b"filename")
        if filename is not None:
            self._num_files += 1
            if self._num_files > _MAX_FILES:
                raise InvalidRequest(f"the form holds more than {_MAX_FILES} files", param=self._field)
            self._sink = await self._on_file(self._field, filename.decode("utf-8", "replace"))
            return
        self._sink = None
        if self._field in self._fields:
            raise InvalidRequest(f"the field {self._field} is given twice", param=self._field)
        if len(self._fields) == _MAX_FIELDS:
            raise InvalidRequest(f"the form holds more than {_MAX_FIELDS} fields", param=self._field)
        self._fields[self._field] = b""

    async def _take(self, chunk: bytes) -> None:
        if self._sink is not None:
            await self._sink.write(chunk)
            return
        self._fields[self._field] += chunk
        if len(self._fields[self._field]) > _MAX_FIELD_BYTES:
            raise InvalidRequest(f"the field {self._field} is too long", param=self._field)
