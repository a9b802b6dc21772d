"""One running pair of front doors for all tests of this folder; each test makes tenants of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.gateway.server.doors import Doors
from tests.tiny import make_adapter, make_base

_numbers = itertools.count(1)


@dataclass(frozen=True)
class TenantClient:
    """A tenant of one test, with its key and clients. `openai` validates every answer strictly."""

    id: str
    key: str
    http: httpx.Client
    openai: OpenAI

    @property
    def lenient(self) -> OpenAI:
        """For streams of the older completions: OpenAI itself sends null as finish_reason in their chunks, which the
        SDK's types do not allow."""
        return self.openai.with_options(_extra_kwargs={"_strict_response_validation": False})

    def upload(self, name: str, folder: Path, **fields: str) -> httpx.Response:
        """Upload a peft folder."""
        files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
        return self.http.post("/v1/adapters", data={"name": name, **fields}, files=files)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny-base", max_position_embeddings=8192)


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A peft folder of rank 4."""
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "r4", rank=4, seed=1)


@pytest.fixture(scope="session")
def other_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A peft folder of rank 8."""
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "r8", rank=8, seed=2)


@pytest.fixture(scope="session")
def doors(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    doors = Doors(base, tmp_path_factory.mktemp("doors") / "data")
    doors.start()
    yield doors
    doors.stop()


@pytest.fixture(scope="session")
def helper(doors: Doors, adapter: Path) -> str:
    """An adapter of some other tenant, "tenant/name"."""
    key = doors.new_tenant("owner")
    files = [("files", (path.name, path.read_bytes())) for path in sorted(adapter.iterdir())]
    headers = {"authorization": f"Bearer {key}"}
    httpx.post(f"{doors.url}/v1/adapters", data={"name": "own"}, files=files, headers=headers).raise_for_status()
    return "owner/own"


@pytest.fixture
def new_tenant(doors: Doors) -> Iterator[Callable[..., TenantClient]]:
    made: list[TenantClient] = []

    def make(max_rank: int | None = None) -> TenantClient:
        tenant = f"tenant-{next(_numbers)}"
        key = doors.new_tenant(tenant, max_rank)
        http = httpx.Client(base_url=doors.url, headers={"authorization": f"Bearer {key}"}, timeout=30)
        client = OpenAI(
            base_url=f"{doors.url}/v1", api_key=key, max_retries=0, timeout=30, _strict_response_validation=True
        )
        made.append(TenantClient(tenant, key, http, client))
        return made[-1]

    yield make
    for client in made:
        client.http.close()
        client.openai.close()


@pytest.fixture
def tenant(new_tenant: Callable[..., TenantClient]) -> TenantClient:
    return new_tenant()


@pytest.fixture
def admin(doors: Doors) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {doors.admin}"}
    with httpx.Client(base_url=doors.url, headers=headers, timeout=30) as client:
        yield client
