"""A whole Patchbay on loopback: real Ray, real processes, the embedded base, two tenants with an adapter each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gateway.config import EngineConfig, GatewayConfig, ServerConfig, StoreConfig, TrainerConfig
from gateway.embedded import embedded_path
from tests.tiny import make_adapter


@dataclass(frozen=True)
class Patchbay:
    """The running gateway's addresses, its data folder, and a key for the admin and each tenant."""

    http_url: str
    grpc_address: str
    data: Path
    keys: dict[str, str]

    def openai(self, who: str) -> openai.OpenAI:
        """The official client, with response validation on."""
        return openai.OpenAI(
            base_url=f"{self.http_url}/v1", api_key=self.keys[who], max_retries=0, _strict_response_validation=True
        )

    def http(self, who: str) -> httpx.Client:
        """Plain HTTP for what OpenAI's API lacks."""
        headers = {"authorization": f"Bearer {self.keys[who]}"}
        return httpx.Client(base_url=self.http_url, headers=headers, timeout=60)

    def upload(self, who: str, name: str, folder: Path, **fields: Any) -> dict[str, Any]:
        """Upload a peft folder as its files. Returns the version."""
        files = [
            ("files", (file, (folder / file).read_bytes()))
            for file in ("adapter_config.json", "adapter_model.safetensors")
        ]
        with self.http(who) as http:
            response = http.post("/v1/adapters", data={"name": name} | fields, files=files)
        assert response.status_code < 300, response.text
        answer: dict[str, Any] = response.json()
        return answer


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(embedded_path(), root / str(i), rank=4 + 12 * i, seed=i) for i in range(3)]


@pytest.fixture(scope="session")
def patchbay(
    local_ray: None, tmp_path_factory: pytest.TempPathFactory, adapter_folders: list[Path]
) -> Iterator[Patchbay]:
    from gateway.server import app

    config = GatewayConfig(
        engine=EngineConfig(kv_cache_tokens=16_384, num_adapter_slots=8),
        store=StoreConfig(data_dir=str(tmp_path_factory.mktemp("data"))),
        server=ServerConfig(http_port=0, grpc_port=0),
        trainer=TrainerConfig(),
    )
    running = app.start(config)
    keys = {"admin": running.admin_key_path.read_text().strip()}
    started = Patchbay(running.http_url, running.grpc_address, Path(config.store.data_dir), keys)
    with started.http("admin") as admin:
        for tenant in ("acme", "globex"):
            assert admin.post("/v1/tenants", json={"id": tenant}).status_code < 300
            keys[tenant] = admin.post("/v1/keys", json={"tenant": tenant, "role": "tenant"}).json()["key"]
    started.upload("acme", "acme/one", adapter_folders[0])
    started.upload("globex", "globex/two", adapter_folders[1])
    yield started
    app.stop(keep_ray=True)
