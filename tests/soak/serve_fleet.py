"""The same fleet run by Ray Serve, which starts again what is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from gateway.config import GatewayConfig
from tests.soak.fleet import children, kill_child_of

_CLASSES = {"door": "FrontDoor", "replica": "EngineReplica"}
_SAMPLES = 8  # connections, which the kernel gives to any door


class ServeFleet:
    """As `Fleet`; a name's number counts the processes of its kind that live."""

    def __init__(self, config: GatewayConfig) -> None:
        self.doors = tuple(f"door-{i}" for i in range(config.server.num_front_doors))
        self.replicas = tuple(f"replica-{i}" for i in range(config.server.num_replicas))
        self.url = f"http://{config.server.host}:{config.server.http_port}"
        self._config = config
        self._data = Path(config.store.data_dir)

    @property
    def admin(self) -> str:
        """An admin's key."""
        return (self._data / "admin.key").read_text().strip()

    async def start_all(self) -> None:
        """Start the application."""
        from gateway.server import app

        await asyncio.to_thread(app.start, self._config)
        await self.wait_whole()

    def start(self, name: str) -> None:
        """Serve does that."""

    def kill(self, name: str) -> None:
        """SIGKILL, at once."""
        kind, _, number = name.partition("-")
        os.kill(self._pids(kind)[int(number)], signal.SIGKILL)

    def kill_validator(self) -> bool:
        """Kill the process that checks an upload just now, if there is one."""
        return kill_child_of(set(self._pids("door")))

    def blob(self, digest: str) -> Path:
        """The file that holds these bytes."""
        return self._data / "blobs" / digest[:2] / digest

    async def wait_whole(self, timeout_s: float = 180.0) -> None:
        """Wait until every process lives, and every door is ready with all replicas."""
        deadline = time.monotonic() + timeout_s
        while not (self._is_alive() and await self._is_ready()):
            assert time.monotonic() < deadline, "Serve does not bring it up again"
            await asyncio.sleep(0.2)

    def _is_alive(self) -> bool:
        return all(
            len(self._pids(kind)) == len(names) for kind, names in (("door", self.doors), ("replica", self.replicas))
        )

    async def _is_ready(self) -> bool:
        doors: dict[str, float] = {}
        with suppress(httpx.TransportError):
            async with httpx.AsyncClient(base_url=self.url, trust_env=False) as http:
                for _ in range(_SAMPLES):
                    text = (await http.get("/metrics", headers={"connection": "close"})).text
                    doors |= dict(_connected(text))
        return len(doors) == len(self.doors) and set(doors.values()) == {len(self.replicas)}

    def _pids(self, kind: str) -> list[int]:
        """The processes of our Ray's workers that run this class."""
        parents, title = dict(children()), f"ray::ServeReplica:patchbay:{_CLASSES[kind]}"
        ours = [pid for pid, parent in parents.items() if parents.get(parent) == os.getpid()]
        return sorted(pid for pid in ours if _title(pid).startswith(title))


def _title(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def _connected(metrics: str) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "patchbay_connected_replicas":
                yield sample.labels["front_door"], sample.value


@contextmanager
def serving_fleet(config: GatewayConfig) -> Iterator[ServeFleet]:
    """A fleet in the Ray that runs, to be started."""
    from gateway.server import app

    try:
        yield ServeFleet(config)
    finally:
        app.stop(keep_ray=True)
