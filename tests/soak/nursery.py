"""Front doors and engine replicas as plain processes that can be killed and are back within a second.

A program of its own, because it forks: `python nursery.py CONFIG FOLDER`. It imports everything once, then reads
commands: "start door-0" makes a process of that name and prints its pid, "kill replica-1" ends one by SIGKILL and
prints how it ended. It ends, with all of them, with its input. In each runs the very class that Ray Serve runs in
production; what Serve does for them, to name and to find each other, files in FOLDER do here: `doors/` has the delivery
addresses, `info` what the replicas serve, `state/` with how many replicas a door is ready.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ray import serve

import gateway.engine.async_engine
import gateway.server.grpc_server
import gateway.server.http_server  # noqa: F401 (imported once, before the forks)
from gateway.config import GatewayConfig, from_dict
from gateway.server.delivery import DeliveryAddress
from gateway.server.front_door import FrontDoor
from gateway.server.replica import EngineReplica
from gateway.server.router import EngineInfo

_PERIOD_S = 0.05


class Replicas:
    """What a front door uses of Serve's handle of the replicas: `broadcast("attach", address)` and `info.remote()`."""

    def __init__(self, folder: Path, door: str) -> None:
        self._folder = folder
        self._door = door
        self.info = SimpleNamespace(remote=self._info)

    def broadcast(self, method: str, address: DeliveryAddress) -> Any:
        assert method == "attach"
        write(self._folder / "doors" / self._door, pickle.dumps(address))
        return SimpleNamespace(results_async=self._nothing)

    async def _nothing(self, **_: Any) -> None: ...

    async def _info(self) -> EngineInfo:
        path = self._folder / "info"
        while not path.exists():
            await asyncio.sleep(_PERIOD_S)
        info: EngineInfo = pickle.loads(path.read_bytes())  # noqa: S301 (our own process wrote it)
        return info


def write(path: Path, data: bytes) -> None:
    """Put a file there, whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(data)
    part.rename(path)


async def run_door(name: str, config: GatewayConfig, folder: Path) -> None:
    door = await constructed(FrontDoor, config, Replicas(folder, name))
    state = folder / "state" / name
    while True:
        door.check_health()
        replicas = door._router.num_replicas if await door.ready() is None else 0
        write(state, str(replicas).encode())
        await asyncio.sleep(_PERIOD_S)


async def run_replica(name: str, config: GatewayConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    replica = await constructed(EngineReplica, config)
    write(folder / "info", pickle.dumps(await replica.info()))
    while True:
        replica.check_health()
        for path in (folder / "doors").glob("[!.]*"):
            try:
                await replica.attach(pickle.loads(path.read_bytes()))  # noqa: S301 (our own process wrote it)
            except FileNotFoundError:  # its door was killed just now
                continue
        await asyncio.sleep(_PERIOD_S)


async def constructed(deployment: Any, *arguments: Any) -> Any:
    """An instance whose constructor is a coroutine, as Serve makes it."""
    made = deployment.__new__(deployment)
    await made.__init__(*arguments)
    return made


def start(name: str, config: GatewayConfig, folder: Path) -> int:
    """The pid of a new process."""
    pid = os.fork()
    if pid:
        return pid
    try:
        serve.get_replica_context = lambda: SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))
        run: Callable[..., Coroutine[Any, Any, None]] = run_door if name.startswith("door") else run_replica
        asyncio.run(run(name, config, folder))
    finally:
        os._exit(1)  # which is not how a kill ends it


def kill(pid: int) -> int:
    """End a process of ours; its exit code, which is -9 unless it had ended by itself."""
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(config_path: str, folder_path: str) -> None:
    config, folder = from_dict(GatewayConfig, json.loads(Path(config_path).read_text())), Path(folder_path)
    for part in ("doors", "state"):
        (folder / part).mkdir(parents=True)
    pids: dict[str, int] = {}
    for line in sys.stdin:
        command, name = line.split()
        if command == "start":
            pids[name] = start(name, config, folder)
            print(pids[name], flush=True)
        else:
            print(kill(pids.pop(name)), flush=True)
    for pid in pids.values():
        kill(pid)


if __name__ == "__main__":
    main(*sys.argv[1:])
