"""The client against scripted answers on the wire: what it sends, and what it makes of errors, pages and streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from gateway.client import ApiError, ClientError, GatewayClient, InvalidInput, TimedOut, Unreachable

Handler = Callable[[httpx.Request], httpx.Response]


def client_of(handler: Handler) -> GatewayClient:
    return GatewayClient("http://gateway.test/", "pb_key", transport=httpx.MockTransport(handler))


def test_the_key_goes_as_a_bearer_token() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"data": [{"id": "base"}, {"id": "acme/tone"}]})

    assert client_of(handler).base_model() == "base"
    assert seen[0].headers["authorization"] == "Bearer pb_key"
    assert str(seen[0].url) == "http://gateway.test/v1/models"


def test_an_error_body_becomes_an_error_with_its_data() -> None:
    body = {"message": "The queue is full.", "type": "rate_limit_error", "param": "n", "code": "overloaded"}
    headers = {"retry-after": "1.5", "x-request-id": "req-7"}
    client = client_of(lambda _: httpx.Response(429, json={"error": body}, headers=headers))
    with pytest.raises(ApiError, match=r"The queue is full\.") as raised:
        client.models()
    error = raised.value
    assert (error.status, error.code, error.param, error.request_id) == (429, "overloaded", "n", "req-7")
    assert error.retry_after == 1.5


def test_an_answer_that_is_no_error_body_is_quoted() -> None:
    client = client_of(lambda _: httpx.Response(502, text="<html>Bad gateway</html>"))
    with pytest.raises(ApiError, match="Bad gateway") as raised:
        client.models()
    assert raised.value.status == 502
    assert raised.value.code is None


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (httpx.ConnectError("refused"), Unreachable),
        (httpx.ConnectTimeout("slow"), Unreachable),
        (httpx.ReadTimeout("slow"), TimedOut),
        (httpx.RemoteProtocolError("cut"), Unreachable),
    ],
)
def test_a_broken_connection_is_told_from_a_slow_one(cause: Exception, expected: type[ClientError]) -> None:
    def handler(_: httpx.Request) -> httpx.Response:
        raise cause

    with pytest.raises(expected, match=r"gateway\.test"):
        client_of(handler).models()


def test_an_upload_of_a_folder_of_adapterhub_sends_its_files(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "adapter.safetensors").write_bytes(b"tensors")
    bodies: list[bytes] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(request.read())
        return httpx.Response(200, json={})

    client_of(handler).upload_adapter("acme/tone", tmp_path)
    assert b'filename="adapter.safetensors"' in bodies[0]
    assert b'filename="adapter_config.json"' in bodies[0]


def test_an_upload_sends_the_peft_files_and_reports_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"w" * 200_000)
    (tmp_path / "golden.json").write_text("[]")
    (tmp_path / "README.md").write_text("not sent")
    bodies: list[bytes] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(request.read())
        return httpx.Response(200, json={"ref": "acme/tone:1"})

    progress: list[tuple[int, int]] = []
    client_of(handler).upload_adapter("acme/tone", tmp_path, "prod", lambda *sent: progress.append(sent))
    (body,) = bodies
    assert body.count(b'name="files"') == 3
    assert b'name="name"\r\n\r\nacme/tone\r\n' in body
    assert b'name="alias"\r\n\r\nprod\r\n' in body
    assert b"w" * 200_000 in body
    assert b"README" not in body
    assert progress[-1] == (200_004, 200_004)
    assert len(progress) > 3


def test_an_archive_is_sent_whole(tmp_path: Path) -> None:
    archive = tmp_path / "tone.tar.gz"
    archive.write_bytes(b"packed")
    bodies: list[bytes] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(request.read())
        return httpx.Response(200, json={})

    client_of(handler).upload_adapter("tone", archive)
    assert b'name="archive"; filename="tone.tar.gz"' in bodies[0]


@pytest.mark.parametrize("name", ["", "absent", "weights.bin"])
def test_what_is_no_adapter_is_refused_before_it_is_sent(tmp_path: Path, name: str) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(InvalidInput, match=r"peft|no file"):
        client_of(lambda _: pytest.fail("something was sent")).upload_adapter("tone", tmp_path / name)


def _event(number: int) -> dict[str, object]:
    return {"id": f"ftevent-{number:024d}", "created_at": 1, "type": "message", "message": str(number)}


def test_events_are_paged_back_to_the_last_one_seen() -> None:
    events = [_event(number) for number in range(1, 251)]

    def handler(request: httpx.Request) -> httpx.Response:
        limit, after = int(request.url.params["limit"]), request.url.params.get("after")
        older = [event for event in reversed(events) if after is None or str(event["id"]) < after]
        return httpx.Response(200, json={"data": older[:limit], "has_more": len(older) > limit})

    client = client_of(handler)
    assert client.job_events("ftjob-1") == events
    assert client.job_events("ftjob-1", newer_than=str(events[199]["id"])) == events[200:]
    assert client.job_events("ftjob-1", newer_than=str(events[-1]["id"])) == []


def test_watching_yields_each_event_once_and_ends_with_the_job() -> None:
    rounds = [("running", 1), ("running", 3), ("succeeded", 4)]
    reads = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal reads
        if request.url.path.endswith("/events"):
            count = rounds[reads - 1][1]
            data = [_event(number) for number in range(count, 0, -1)]
            return httpx.Response(200, json={"data": data, "has_more": False})
        reads += 1
        return httpx.Response(200, json={"status": rounds[reads - 1][0]})

    watched = [event["message"] for event in client_of(handler).watch_job("ftjob-1", poll_seconds=0)]
    assert watched == ["1", "2", "3", "4"]
    assert reads == 3


def _stream(*bodies: object, done: bool = True) -> GatewayClient:
    lines = [f"data: {json.dumps(body)}\n\n" for body in bodies] + (["data: [DONE]\n\n"] if done else [])
    return client_of(lambda _: httpx.Response(200, text="".join(lines)))


def _piece(text: str | None) -> dict[str, object]:
    return {"choices": [{"delta": {} if text is None else {"content": text}}]}


def test_a_stream_yields_its_text() -> None:
    client = _stream(_piece("Hel"), _piece("lo"), _piece(None), {"choices": [], "usage": {}})
    assert "".join(client.chat_stream("base", [])) == "Hello"


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 1000])
def test_a_line_of_a_stream_ends_at_newlines_alone(newline: str, size: int) -> None:
    text = "a\u2028b\u2029c\x85d€"
    lines = ["data: " + json.dumps(_piece(text), ensure_ascii=False), "", "data: [DONE]", ""]
    body = "".join(line + newline for line in lines).encode()
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    client = client_of(lambda _: httpx.Response(200, content=iter(pieces)))
    assert "".join(client.chat_stream("base", [])) == text


def test_an_error_inside_a_stream_is_raised() -> None:
    client = _stream(_piece("Hel"), {"error": {"message": "No replica.", "code": "engine_unavailable"}})
    with pytest.raises(ApiError, match=r"No replica\."):
        list(client.chat_stream("base", []))


def test_a_stream_without_its_end_is_an_error() -> None:
    with pytest.raises(ClientError, match="broke off"):
        list(_stream(_piece("Hel"), done=False).chat_stream("base", []))


def test_a_refused_stream_is_an_api_error() -> None:
    body = {"error": {"message": "No such model.", "code": "model_not_found"}}
    client = client_of(lambda _: httpx.Response(404, json=body))
    with pytest.raises(ApiError, match=r"No such model\."):
        list(client.chat_stream("acme/none", []))
