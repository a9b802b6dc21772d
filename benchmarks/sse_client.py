"""A lean streaming client: one HTTP/1.1 connection a request, timing each server-sent event as it arrives."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Stream:
    """One request's clock in seconds: `first` token after the start, then the gaps; `tokens` as the server counted."""

    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    status: int = 0


async def stream_completion(url: str, key: str, body: dict[str, Any]) -> Stream:
    """POST `body` to /v1/completions as a stream and read it to its end."""
    parts = urlsplit(url)
    data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(head.encode() + data)
    stream = Stream(status=int((await reader.readline()).split()[1]))
    last = start
    async for line in reader:
        if line.startswith(b'data: {"'):
            now = time.perf_counter()
            if b'"usage":{' in line:
                stream.tokens = json.loads(line[6:])["usage"]["completion_tokens"]
            elif stream.first is None:
                stream.first = now - start
            else:
                stream.gaps.append(now - last)
            last = now
    writer.close()
    return stream
