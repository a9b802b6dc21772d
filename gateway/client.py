"""A thin client of the gateway's HTTP API, for the command line and the demo: one method a route."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import quote

import httpx

Json = dict[str, Any]
Progress = Callable[[int, int], None]

ENDED_STATUSES = frozenset({"succeeded", "failed", "cancelled"})
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter.safetensors")  # peft's name, and that of the package `adapters`
GOLDEN_FILE = "golden.json"
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")


class ClientError(Exception):
    """A call that did not succeed; the text is for people."""


class ApiError(ClientError):
    """The gateway answered with an error: OpenAI's error body, and the id to report it by."""

    def __init__(self, status: int, body: Json, request_id: str | None, retry_after: float | None) -> None:
        self.status = status
        self.message = str(body.get("message") or f"HTTP status {status}")
        self.code: str | None = body.get("code")
        self.param: str | None = body.get("param")
        self.request_id = request_id
        self.retry_after = retry_after
        super().__init__(self.message)


class Unreachable(ClientError):
    """No gateway answered at `url`."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"No answer from the gateway at {url}: {reason}")
        self.url = url


class TimedOut(ClientError):
    """The gateway did not answer in time."""

    def __init__(self, url: str, seconds: float | None) -> None:
        super().__init__(f"The gateway at {url} did not answer within {seconds:g} s" if seconds else "Timed out")
        self.url = url


class InvalidInput(ClientError):
    """A local file or argument that cannot be sent as it is."""


class GatewayClient:
    """One gateway and one key. Methods return the decoded JSON bodies and raise `ClientError`s.

    `timeout` is in seconds, for each read and write: an upload or a stream may take longer while bytes move.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = 120.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # trust_env off: a proxy of the environment must not see keys meant for a gateway that the user named.
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=timeout, transport=transport, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # -- models, health, metrics ----------------------------------------------------------------------------

    def models(self) -> list[Json]:
        """The models that this key may call: the base and its tenant's adapters."""
        return _data(self._json("GET", "/v1/models"))

    def base_model(self) -> str:
        """The name of the base: the one model without a tenant in its name."""
        return next(str(model["id"]) for model in self.models() if "/" not in model["id"])

    def ready(self) -> bool:
        """Whether the gateway takes requests."""
        try:
            return self._send("GET", "/readyz").status_code == httpx.codes.OK
        except ClientError:
            return False

    def metrics(self) -> str:
        """The Prometheus text of the gateway and its replicas."""
        return self._checked(self._send("GET", "/metrics")).text

    # -- tenants and keys (admin) ---------------------------------------------------------------------------

    def create_tenant(self, tenant: str, max_rank: int | None = None) -> Json:
        """Make a tenant; `max_rank` is the highest LoRA rank that it may upload or train."""
        return self._json("POST", "/v1/tenants", json=_given(id=tenant, max_rank=max_rank))

    def tenants(self) -> list[Json]:
        """All tenants."""
        return _data(self._json("GET", "/v1/tenants"))

    def create_key(self, tenant: str | None, role: str = "tenant") -> Json:
        """Make a key. The answer is the only place where it ever shows."""
        return self._json("POST", "/v1/keys", json=_given(tenant=tenant, role=role))

    def keys(self) -> list[Json]:
        """All keys, without their secrets."""
        return _data(self._json("GET", "/v1/keys"))

    def revoke_key(self, key_id: str) -> Json:
        """Revoke a key, at once."""
        return self._json("DELETE", f"/v1/keys/{key_id}")

    # -- adapters -------------------------------------------------------------------------------------------

    def upload_adapter(
        self, name: str, path: str | Path, alias: str | None = None, on_progress: Progress | None = None
    ) -> Json:
        """Upload a peft folder (with golden.json, where there is one), or an archive, as the next version of `name`.

        `on_progress(sent, total)` is called with the files' bytes as they go out.
        """
        field, paths = _adapter_parts(Path(path))
        return self._upload("/v1/adapters", _given(name=name, alias=alias), field, paths, on_progress)

    def adapters(self) -> list[Json]:
        """The adapters that this key may call."""
        return _data(self._json("GET", "/v1/adapters"))

    def adapter(self, name: str) -> Json:
        """One adapter ("tenant/name") with its versions and aliases."""
        return self._json("GET", f"/v1/adapters/{name}")

    def set_alias(self, name: str, alias: str, version: int, canary: tuple[int, int] | None = None) -> Json:
        """Point an alias of "tenant/name" at a version; canary: another one, and the percentage of callers it gets."""
        split = {"version": canary[0], "percent": canary[1]} if canary is not None else None
        return self._json("PUT", f"/v1/adapters/{name}/aliases/{alias}", json=_given(version=version, canary=split))

    def delete_alias(self, name: str, alias: str) -> Json:
        """Take an alias of "tenant/name" away; the version that it named stays."""
        return self._json("DELETE", f"/v1/adapters/{name}/aliases/{alias}")

    def rollback(self, name: str, alias: str = "default") -> Json:
        """Drop an alias's canary; without one, point it back at the version that it named before."""
        return self._json("POST", f"/v1/adapters/{name}/rollback", json={"alias": alias})

    def test_version(self, name: str, version: int, golden: Sequence[Mapping[str, str]] = ()) -> Json:
        """Run a version's self-test again, with these golden prompts or its upload's. The version after it."""
        return self._json("POST", f"/v1/adapters/{name}/versions/{version}/test", json={"golden": list(golden)})

    def download_adapter(self, name: str, version: int, folder: str | Path) -> None:
        """Write a version of "tenant/name" as the peft folder `folder`, which must not exist yet."""
        target = Path(folder)
        if target.exists():
            raise InvalidInput(f"{target} exists already.")
        request = self._http.build_request("GET", f"/v1/adapters/{name}/versions/{version}/download")
        response = self._dispatch(request, stream=True)
        try:
            if response.is_error:
                response.read()
            _unpack(_Stream(self._checked(response).iter_raw()), target)
        except httpx.TransportError as error:
            raise self._lost(error) from error
        finally:
            response.close()

    def set_tag(self, name: str, key: str, value: str, version: int | None = None) -> Json:
        """Tag "tenant/name", or one of its versions."""
        return self._json("PUT", _tag_path(name, key, version), json={"value": value})

    def delete_tag(self, name: str, key: str, version: int | None = None) -> Json:
        """Take a tag away."""
        return self._json("DELETE", _tag_path(name, key, version))

    def delete_version(self, name: str, version: int) -> Json:
        """Delete a version that no alias names."""
        return self._json("DELETE", f"/v1/adapters/{name}/versions/{version}")

    # -- files and fine-tune jobs ---------------------------------------------------------------------------

    def upload_file(self, path: str | Path, on_progress: Progress | None = None) -> Json:
        """Upload a JSON-lines file of chat examples to train on."""
        return self._upload("/v1/files", {"purpose": "fine-tune"}, "file", [Path(path)], on_progress)

    def create_job(self, **fields: Any) -> Json:
        """Queue a fine-tune job; the fields are OpenAI's, and `peft`. Fields that are None are left out."""
        return self._json("POST", "/v1/fine_tuning/jobs", json=_given(**fields))

    def jobs(self, limit: int = 20) -> list[Json]:
        """The newest `limit` jobs."""
        return _data(self._json("GET", "/v1/fine_tuning/jobs", params={"limit": limit}))

    def job(self, job_id: str) -> Json:
        """One job."""
        return self._json("GET", f"/v1/fine_tuning/jobs/{job_id}")

    def cancel_job(self, job_id: str) -> Json:
        """Ask a job to stop."""
        return self._json("POST", f"/v1/fine_tuning/jobs/{job_id}/cancel")

    def job_events(self, job_id: str, newer_than: str = "") -> list[Json]:
        """A job's events after the one with the id `newer_than`, oldest first."""
        path, params, events = f"/v1/fine_tuning/jobs/{job_id}/events", {"limit": "100"}, list[Json]()
        while True:
            page = self._json("GET", path, params=params)  # newest first, as OpenAI's
            events += [event for event in page["data"] if event["id"] > newer_than]
            if not page["has_more"] or page["data"][-1]["id"] <= newer_than:
                return sorted(events, key=lambda event: str(event["id"]))
            params["after"] = page["data"][-1]["id"]

    def watch_job(self, job_id: str, poll_seconds: float = 0.5) -> Iterator[Json]:
        """Each event of a job as it happens, until the job has ended."""
        last = ""
        while True:
            # The status first: an event that comes between the two calls is seen in this round or the next.
            ended = self.job(job_id)["status"] in ENDED_STATUSES
            for event in self.job_events(job_id, last):
                last = event["id"]
                yield event
            if ended:
                return
            time.sleep(poll_seconds)

    # -- generation -----------------------------------------------------------------------------------------

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], **fields: Any) -> Json:
        """One answer to a conversation, whole."""
        body = _given(model=model, messages=list(messages), **fields)
        return self._json("POST", "/v1/chat/completions", json=body)

    def chat_stream(self, model: str, messages: Sequence[Mapping[str, str]], **fields: Any) -> Iterator[str]:
        """The pieces of text of one answer, as they are generated."""
        body = _given(model=model, messages=list(messages), stream=True, **fields)
        request = self._http.build_request("POST", "/v1/chat/completions", json=body)
        response = self._dispatch(request, stream=True)
        try:
            if response.is_error:
                response.read()
            for chunk in _server_sent(self._checked(response)):
                for choice in chunk.get("choices", ()):
                    yield choice["delta"].get("content") or ""
        except httpx.TransportError as error:
            raise self._lost(error) from error
        finally:
            response.close()

    # -- plumbing -------------------------------------------------------------------------------------------

    def _json(self, method: str, path: str, **kwargs: Any) -> Json:
        response = self._checked(self._send(method, path, **kwargs))
        return response.json() if response.content else {}

    def _send(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        return self._dispatch(self._http.build_request(method, path, **kwargs))

    def _dispatch(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        try:
            return self._http.send(request, stream=stream)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> ClientError:
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return TimedOut(self.url, self._timeout)
        return Unreachable(self.url, str(error) or type(error).__name__)

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.is_success:
            return response
        try:
            body = response.json()["error"]
        except (ValueError, KeyError, TypeError):
            body = {"message": f"HTTP status {response.status_code}: {response.text[:200]}"}
        retry_after = response.headers.get("retry-after", "")
        raise ApiError(
            response.status_code,
            body,
            response.headers.get("x-request-id"),
            float(retry_after) if retry_after.replace(".", "", 1).isdigit() else None,
        )

    def _upload(self, path: str, fields: Json, field: str, paths: Sequence[Path], on_progress: Progress | None) -> Json:
        with ExitStack() as stack:
            try:
                files = [stack.enter_context(part.open("rb")) for part in paths]
            except OSError as error:
                raise InvalidInput(f"Cannot read {error.filename}: {error.strerror}.") from error
            meter = _Meter(sum(part.stat().st_size for part in paths), on_progress)
            parts: list[tuple[str, Any]] = [
                (field, (part.name, _Metered(file, meter), "application/octet-stream"))
                for part, file in zip(paths, files, strict=True)
            ]
            return self._json("POST", path, data=fields, files=parts)


class _Meter:
    """Counts the bytes of one upload, all its files together."""

    def __init__(self, total: int, on_progress: Progress | None) -> None:
        self._sent = 0
        self._total = total
        self._on_progress = on_progress

    def add(self, count: int) -> None:
        self._sent += count
        if self._on_progress is not None:
            self._on_progress(self._sent, self._total)


class _Metered:
    """A file whose reads are counted; httpx sends it piece by piece, so memory stays small."""

    def __init__(self, file: BinaryIO, meter: _Meter) -> None:
        self._file = file
        self._meter = meter

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._meter.add(len(data))
        return data

    def fileno(self) -> int:
        return self._file.fileno()


class _Stream(io.RawIOBase):
    """Pieces of bytes as a file to read once."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while len(self._rest) < size and (piece := next(self._pieces, b"")):
            self._rest += piece
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


def _unpack(stream: _Stream, folder: Path) -> None:
    """The one folder of a tar, under the name given; what broke off is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".patchbay-", dir=folder.parent) as name:
        try:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                archive.extractall(name, filter="data")
        except tarfile.TarError as error:
            raise ClientError(f"The download broke off: {error}. Start it again.") from error
        (inner,) = Path(name).iterdir()
        inner.rename(folder)


def _tag_path(name: str, key: str, version: int | None) -> str:
    owner = name if version is None else f"{name}/versions/{version}"
    return f"/v1/adapters/{owner}/tags/{quote(key, safe='')}"


def _given(**fields: Any) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def _data(page: Json) -> list[Json]:
    return list(page["data"])


def _adapter_parts(path: Path) -> tuple[str, list[Path]]:
    """The form field and the files of an upload: a peft folder's two files and its golden prompts, or one archive."""
    if path.is_dir():
        weights = next((name for name in WEIGHTS_FILES if (path / name).is_file()), WEIGHTS_FILES[0])
        paths = [path / CONFIG_FILE, path / weights]
        missing = [part.name for part in paths if not part.is_file()]
        if missing:
            raise InvalidInput(f"{path} is not a peft adapter folder: it has no {' and no '.join(missing)}.")
        golden = path / GOLDEN_FILE
        return "files", [*paths, golden] if golden.is_file() else paths
    if not path.is_file():
        raise InvalidInput(f"There is no file or folder {path}.")
    if not path.name.endswith(_ARCHIVES):
        raise InvalidInput(f"{path} is no peft folder and no archive of one ({', '.join(_ARCHIVES)}).")
    return "archive", [path]


def _server_sent(response: httpx.Response) -> Iterator[Json]:
    """The JSON bodies of an OpenAI event stream, until its [DONE]. Raises the `ApiError` that it may hold."""
    for line in _lines(response.iter_bytes()):
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        body = json.loads(data)
        if "error" in body:
            raise ApiError(response.status_code, body["error"], response.headers.get("x-request-id"), None)
        yield body
    raise ClientError("The stream broke off before its end; send the request again.")


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The whole lines of an event stream; a CRLF that two pieces share may make an empty one more.

    Bytes split at LF, CRLF and CR only, as the stream's lines do; text would at U+2028 and others too.
    """
    rest = b""
    for piece in pieces:
        lines = (rest + piece).splitlines(keepends=True)
        rest = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
        yield from lines
