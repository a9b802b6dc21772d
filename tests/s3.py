"""An S3 server of the tests' own (moto's, in a process of its own), and the environment that leads s3fs there."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import urlopen

START_SECONDS = 60
BUCKET = "patchbay-tests"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def serve() -> Iterator[dict[str, str]]:
    """Start a server that holds an empty bucket; yields the environment variables that lead there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(server, url)
        yield {**KEYS, "AWS_ENDPOINT_URL": url}
    finally:
        server.terminate()
        server.wait(timeout=30)


def make_bucket(environment: dict[str, str]) -> None:
    """Make the bucket."""
    import s3fs

    s3fs.S3FileSystem(
        key=environment["AWS_ACCESS_KEY_ID"],
        secret=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
    ).mkdir(BUCKET)


def _wait(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urlopen(f"{url}/moto-api/data.json", timeout=5).close()
            return
        except (URLError, OSError):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("moto's server does not start") from None
            time.sleep(0.1)
