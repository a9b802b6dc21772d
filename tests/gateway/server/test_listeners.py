"""The HTTP listener on the wire: what it refuses before the application sees it."""

from __future__ import annotations

import re
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest

from gateway.server import listeners
from gateway.server.listeners import MAX_HEAD_BYTES
from tests.gateway.server.conftest import TenantClient
from tests.gateway.server.doors import Doors

_NUM_PIECES = 4
_PIECE = b"x" * (MAX_HEAD_BYTES // _NUM_PIECES + 1)
_HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: gateway\r\n"


@pytest.mark.parametrize(
    ("start", "answers"),
    [
        (_HEAD + b"x-endless: ", [431]),
        (b"GET /", [431]),
        (_HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\nx-endless: ", [401, 431]),
    ],
    ids=["header", "url", "trailer"],
)
def test_a_request_without_end_is_refused_and_others_are_served(doors: Doors, start: bytes, answers: list[int]) -> None:
    with _connected(doors) as client:
        client.sendall(start)
        for _ in range(_NUM_PIECES):
            assert httpx.get(f"{doors.url}/healthz").status_code == 200
            client.sendall(_PIECE)
        assert _statuses(client) == answers


def test_headers_below_the_limit_and_bodies_above_it_are_taken(doors: Doors) -> None:
    long = {"x-long": "x" * (MAX_HEAD_BYTES - 1024)}
    with httpx.Client(base_url=doors.url) as client:
        for _ in range(2):  # on one connection
            assert client.get("/healthz", headers=long).status_code == 200
            assert client.post("/healthz", content=bytes(2 * MAX_HEAD_BYTES)).status_code == 405


def test_a_head_that_does_not_come_in_time_is_refused_and_answers_may_take_longer(
    doors: Doors, tenant: TenantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners, "HEAD_S", 0.3)
    with _connected(doors) as silent, _connected(doors) as slow, _connected(doors) as again:
        slow.sendall(_HEAD)
        again.sendall(b"GET /healthz HTTP/1.1\r\nhost: gateway\r\n\r\n")
        assert again.recv(1 << 16).startswith(b"HTTP/1.1 200")
        again.sendall(_HEAD)
        assert [_statuses(client) for client in (silent, slow, again)] == [[408]] * 3
    begin = time.monotonic()
    stream = tenant.lenient.completions.create(
        model=doors.model, prompt="the", max_tokens=8000, stream=True, extra_body={"ignore_eos": True}
    )
    with stream:
        assert any(time.monotonic() - begin > 0.6 for _ in stream)


def _connected(doors: Doors) -> socket.socket:
    url = urlsplit(doors.url)
    return socket.create_connection((url.hostname, url.port), timeout=30)


def _statuses(client: socket.socket) -> list[int]:
    """Of all answers that come until the server closes the connection."""
    received = b"".join(iter(lambda: client.recv(1 << 16), b""))
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", received)]
