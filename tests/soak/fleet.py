"""A running Patchbay of several processes, any of which can be killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from gateway.config import GatewayConfig


class Fleet:
    """Front doors behind one port and engine replicas, as `nursery.py` makes them.

    url: of the doors. doors, replicas: names.
    """

    def __init__(self, config: GatewayConfig, folder: Path, nursery: subprocess.Popen[str]) -> None:
        self.doors = tuple(f"door-{i}" for i in range(config.server.num_front_doors))
        self.replicas = tuple(f"replica-{i}" for i in range(config.server.num_replicas))
        self.url = f"http://{config.server.host}:{config.server.http_port}"
        self.folder = folder
        self._data = Path(config.store.data_dir)
        self._nursery = nursery
        self._pids: dict[str, int] = {}

    @property
    def admin(self) -> str:
        """An admin's key."""
        return (self._data / "admin.key").read_text().strip()

    async def start_all(self) -> None:
        """Make every process and wait until all is whole."""
        for name in (*self.doors, *self.replicas):
            self.start(name)
        await self.wait_whole()

    def start(self, name: str) -> None:
        """Make the process; it is not ready yet."""
        self._pids[name] = self._order("start", name)

    async def wait_whole(self, timeout_s: float = 60.0) -> None:
        """Wait until every door is ready and every replica is attached to it."""
        deadline = time.monotonic() + timeout_s
        while not self.is_whole:
            assert time.monotonic() < deadline, "the fleet does not come up again; see its log"
            await asyncio.sleep(0.02)

    @property
    def is_whole(self) -> bool:
        return all(self._replicas_of(door) == len(self.replicas) for door in self.doors)

    def kill(self, name: str) -> None:
        """SIGKILL, at once."""
        del self._pids[name]
        assert self._order("kill", name) == -signal.SIGKILL, f"{name} had ended by itself; see the fleet's log"
        for part in ("state", "doors"):
            (self.folder / part / name).unlink(missing_ok=True)

    def kill_validator(self) -> bool:
        """Kill the process that checks an upload just now, if there is one."""
        return kill_child_of({self._pids[door] for door in self.doors if door in self._pids})

    def blob(self, digest: str) -> Path:
        """The file that holds these bytes."""
        return self._data / "blobs" / digest[:2] / digest

    def _replicas_of(self, door: str) -> int:
        try:
            return int((self.folder / "state" / door).read_text())
        except FileNotFoundError:
            return 0

    def _order(self, command: str, name: str) -> int:
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.write(f"{command} {name}\n")
        self._nursery.stdin.flush()
        return int(self._nursery.stdout.readline())


def children() -> Iterator[tuple[int, int]]:
    """Every process of this machine, and its parent."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            yield int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])


def kill_child_of(parents: set[int]) -> bool:
    """SIGKILL to a child of one of them, if there is any."""
    for pid, parent in children():
        if parent in parents:
            with suppress(ProcessLookupError):  # it was done
                os.kill(pid, signal.SIGKILL)
                return True
    return False


@contextmanager
def running_fleet(config: GatewayConfig, folder: Path) -> Iterator[Fleet]:
    """A fleet of as many front doors and replicas as the configuration says, to be started; its log is in `folder`."""
    folder.mkdir(parents=True)
    path = folder / "config.json"
    path.write_text(json.dumps(asdict(config)))
    program = Path(__file__).with_name("nursery.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        nursery = subprocess.Popen(
            [sys.executable, program, path, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        try:
            yield Fleet(config, folder, nursery)
        finally:
            nursery.communicate(timeout=30)
