"""Versions are swapped under load while processes are killed: no wrong answer, no stale prefix, no lost stream."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import httpx
import pytest
import torch

from adapters_store.accounts import Accounts
from adapters_store.blobs import BlobStore
from adapters_store.database import Database
from adapters_store.fsck import StoreCheck
from gateway.config import EngineConfig, GatewayConfig, ServerConfig, StoreConfig, TrainerConfig
from tests.soak.answers import HEAD, Answers, Content
from tests.soak.book import ALIASES, Book
from tests.soak.clients import Clients
from tests.soak.fleet import Fleet, running_fleet
from tests.soak.killer import Killer
from tests.soak.serve_fleet import ServeFleet, serving_fleet
from tests.soak.swapper import Swapper
from tests.tiny import edited_adapter, make_base

REQUESTS = int(os.environ.get("PATCHBAY_SOAK_REQUESTS", 10_000))
SOAK = [pytest.mark.soak, pytest.mark.timeout(0)]


def configuration(base: Path, folder: Path) -> GatewayConfig:
    """Room for few adapters and few blocks, so that both come and go, blocks by way of the host tier too."""
    ports = [free_port() for _ in range(2)]
    return GatewayConfig(
        engine=EngineConfig(
            base=str(base),
            quantization="none",
            dtype="float32",
            device="cpu",
            kv_cache_tokens=768,
            kv_host_bytes=1 << 20,
            overlap_steps=True,
            max_num_seqs=8,
            num_adapter_slots=3,
            num_vector_slots=0,
            max_lora_rank=16,
            host_cache_bytes=1 << 20,
            torch_threads=1,
        ),
        store=StoreConfig(data_dir=str(folder)),
        server=ServerConfig(http_port=ports[0], grpc_port=ports[1], num_front_doors=2, num_replicas=2),
        trainer=TrainerConfig(enabled=False),
    )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def new_keys(config: GatewayConfig) -> dict[str, str]:
    """A key for each tenant."""
    database = Database(config.store.database)
    accounts = Accounts(database)
    tenants = {name.partition("/")[0] for name in ALIASES}
    for tenant in tenants:
        accounts.create_tenant(tenant)
    keys = {tenant: accounts.create_key(tenant) for tenant in tenants}
    database.dispose()
    return keys


@dataclass(frozen=True)
class Plan:
    """How long a run is: whole answers, swaps and kills at least.

    pauses: seconds between kills, from and to. purges: the share of deletions that are waited for.
    """

    num_done: int
    num_swaps: int
    num_kills: int
    num_contents: int
    num_prompts: int
    pauses: tuple[float, float]
    purges: float


SHORT = Plan(100, 6, 2, 4, 4, (0.0, 0.6), 0.0)
LONG = Plan(REQUESTS, REQUESTS // 50, REQUESTS // 100, 8, 12, (0.1, 2.0), 0.15)
ON_SERVE = replace(LONG, num_done=REQUESTS // 4, num_swaps=REQUESTS // 200, num_kills=5)  # Serve takes 10 s for each


@pytest.mark.parametrize("plan", [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=SOAK)])
async def test_every_answer_is_of_a_version_that_was_meant(tmp_path: Path, plan: Plan) -> None:
    base = make_base(tmp_path / "base")
    config = configuration(base, tmp_path / "data")
    with running_fleet(config, tmp_path / "fleet") as fleet:
        await swap_under_load(fleet, config, base, tmp_path, plan)
    assert_sound(config)


@pytest.mark.soak
@pytest.mark.timeout(0)
async def test_so_it_is_where_ray_serve_replaces_what_is_killed(local_ray: None, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    config = configuration(base, tmp_path / "data")
    with serving_fleet(config) as fleet:
        await swap_under_load(fleet, config, base, tmp_path, ON_SERVE)
    assert_sound(config)


async def swap_under_load(
    fleet: Fleet | ServeFleet, config: GatewayConfig, base: Path, folder: Path, plan: Plan
) -> None:
    """Ask, swap and kill until the plan is done; then every answer is judged."""
    seed = int(os.environ.get("PATCHBAY_SOAK_SEED") or secrets.randbits(32))
    print(f"PATCHBAY_SOAK_SEED={seed}")
    answers = Answers(base, folder, plan.num_contents, plan.num_prompts)
    assert answers.telltale > 0.9, "a stale prefix would not show"
    await fleet.start_all()
    book, broken = Book(answers, base.name), zeroed(answers.contents[0], folder / "broken")
    swapper = Swapper(book, answers, fleet, broken, Random(seed), waits_for_purge=plan.purges)
    clients = Clients(book, answers, fleet.url, new_keys(config), Random(seed + 1))
    killer = Killer(book, fleet, plan.pauses, Random(seed + 2))
    await swapper.prepare()

    def is_over() -> bool:
        counts = (book.num_done, plan.num_done), (book.num_swaps, plan.num_swaps), (len(book.kills), plan.num_kills)
        return all(done >= wanted for done, wanted in counts)

    async with asyncio.TaskGroup() as group:
        group.create_task(clients.run(is_over, 12))
        group.create_task(swapper.run(is_over))
        group.create_task(killer.run(is_over))
    print(book.tally(), dict(swapper.done))
    problems = book.problems()
    assert not problems, f"{len(problems)} of {len(book.answers)}\n" + "\n".join(problems[:5])
    assert sum(answer.cached >= HEAD for answer in book.answers) > len(book.answers) / 10, "the cache is not used"
    assert {kill.what.partition("-")[0] for kill in book.kills} >= {"door", "replica"}
    await assert_quiet(fleet.url)


def zeroed(content: Content, folder: Path) -> Path:
    """An adapter that changes nothing, which no self-test passes."""
    assert content.folder is not None
    return edited_adapter(content.folder, folder, lambda name, t: torch.zeros_like(t) if "lora_B" in name else t)


async def assert_quiet(url: str) -> None:
    """Nothing runs any more in any replica, and no block is held."""
    async with httpx.AsyncClient(base_url=url) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "patchbay_running_requests"):
        values = [line for line in lines if line.startswith(name)]
        assert values, name
        assert all(float(line.rpartition(" ")[2]) == 0 for line in values), values


def assert_sound(config: GatewayConfig) -> None:
    """The store has no damage; what the killed left is known as that."""
    database = Database(config.store.database)
    check = StoreCheck(database, BlobStore(config.store.blobs), config.store.staging)
    findings = list(check.findings())
    database.dispose()
    assert all(finding.is_leftover for finding in findings), findings
