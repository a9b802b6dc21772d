"""A PostgreSQL server of the tests' own, on a Unix socket in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 60


def find_binary(name: str) -> str | None:
    """A program of the server, which Debian keeps off the PATH; None without one."""
    debian = sorted(str(path) for path in Path("/usr/lib/postgresql").glob("*/bin"))
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *debian]))


@contextmanager
def serve() -> Iterator[str]:
    """Start a server with an empty database; yields its SQLAlchemy URL."""
    folder = Path(tempfile.mkdtemp(prefix="patchbay-pg-", dir="/tmp"))  # short: a socket's path has 107 characters
    run_as = _unprivileged(folder)
    data = str(folder / "data")
    try:
        initdb = [_binary("initdb"), "--username=patchbay", "--auth=trust", "--encoding=UTF8", "--no-sync", data]
        subprocess.run([*run_as, *initdb], check=True, stdout=subprocess.DEVNULL, cwd=folder)
        settings = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=200", "-k", str(folder)]
        with (folder / "log").open("wb") as log:
            postgres = [_binary("postgres"), "-D", data, *settings]
            server = subprocess.Popen([*run_as, *postgres], stdout=log, stderr=log, cwd=folder)
        try:
            _wait(server, folder)
            yield f"postgresql+psycopg://patchbay@/postgres?host={folder}"
        finally:
            server.terminate()
            server.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _binary(name: str) -> str:
    path = find_binary(name)
    assert path is not None
    return path


def _unprivileged(folder: Path) -> list[str]:
    """What runs a command as another user, who is given the folder: the server refuses to run as root.

    It is a program, since `subprocess` itself changes the user in a fork of this process, which may be too large.
    """
    if os.getuid() != 0:
        return []
    users = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = users.get("postgres") or users["nobody"]
    os.chown(folder, user.pw_uid, user.pw_gid)
    change = f"import os, sys; os.setgroups([]); os.setgid({user.pw_gid}); os.setuid({user.pw_uid})"
    return [sys.executable, "-c", f"{change}; os.execv(sys.argv[1], sys.argv[1:])"]


def _wait(server: subprocess.Popen[bytes], folder: Path) -> None:
    import psycopg

    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            psycopg.connect(f"host={folder} user=patchbay dbname=postgres").close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "log").read_text()) from None
            time.sleep(0.1)
