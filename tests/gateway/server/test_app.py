"""The whole application: started, asked over both wires, drained and stopped."""

from __future__ import annotations

import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from gateway.config import EngineConfig, GatewayConfig, ServerConfig, StoreConfig
from gateway.errors import ConfigInvalid
from gateway.server import app


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def config(base: Path, tmp_path_factory: pytest.TempPathFactory) -> GatewayConfig:
    return GatewayConfig(
        engine=EngineConfig(base=str(base), kv_cache_tokens=4096, max_model_len=256, torch_threads=1),
        store=StoreConfig(data_dir=str(tmp_path_factory.mktemp("app") / "data")),
        server=ServerConfig(http_port=free_port(), grpc_port=free_port(), num_front_doors=2),
    )


@pytest.fixture(scope="module")
def running(local_ray: None, config: GatewayConfig) -> Iterator[app.Running]:
    yield app.start(config, timeout_s=200)
    app.stop(keep_ray=True)


def admin(running: app.Running) -> dict[str, str]:
    return {"authorization": f"Bearer {running.admin_key_path.read_text().strip()}"}


def completion(model: str, **fields: object) -> dict[str, object]:
    return {"model": model, "prompt": "the quick", "max_tokens": 8, "temperature": 0} | fields


def test_it_is_ready_on_both_wires(running: app.Running, config: GatewayConfig) -> None:
    assert running.http_url.endswith(f":{config.server.http_port}")
    assert httpx.get(f"{running.http_url}/readyz").status_code == 200
    with grpc.insecure_channel(running.grpc_address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", "patchbay.v1.Inference"):
            reply = check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_the_first_admin_key_is_this_users_alone(running: app.Running) -> None:
    assert stat.S_IMODE(running.admin_key_path.stat().st_mode) == 0o600
    assert httpx.get(f"{running.http_url}/v1/tenants", headers=admin(running)).status_code == 200


def test_both_front_doors_share_the_ports_and_one_engine(running: app.Running, base: Path) -> None:
    answers, seen = set(), set()
    for _ in range(40):  # each on a connection of its own, which the kernel gives to either
        reply = httpx.post(f"{running.http_url}/v1/completions", headers=admin(running), json=completion(base.name))
        answers.add(reply.json()["choices"][0]["text"])
        metrics = httpx.get(f"{running.http_url}/metrics").text
        seen |= {
            sample.labels["front_door"]
            for family in text_string_to_metric_families(metrics)
            for sample in family.samples
            if sample.name == "patchbay_ready"
        }
        if len(seen) == 2:
            break
    assert len(seen) == 2
    assert len(answers) == 1


def test_metrics_are_the_front_doors_and_the_replicas(running: app.Running) -> None:
    text = httpx.get(f"{running.http_url}/metrics").text
    families = [family.name for family in text_string_to_metric_families(text)]
    assert len(families) == len(set(families))
    assert {"patchbay_connected_replicas", "vllm:num_requests_running", "patchbay_step_adapters"} <= set(families)


def test_the_trainer_takes_a_job(running: app.Running, base: Path) -> None:
    """Up to the first thing that the trainer says of a job: that its file is no training data."""
    client = httpx.Client(base_url=running.http_url, headers=admin(running))
    assert client.post("/v1/tenants", json={"id": "acme"}).is_success
    key = client.post("/v1/keys", json={"tenant": "acme", "role": "tenant"}).json()["key"]
    client.headers["authorization"] = f"Bearer {key}"
    file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("t.jsonl", b'{"no": "chat"}\n')})
    body = {"model": base.name, "training_file": file.json()["id"]}
    job = client.post("/v1/fine_tuning/jobs", json=body).json()
    deadline = time.monotonic() + 90
    while (job := client.get(f"/v1/fine_tuning/jobs/{job['id']}").json())["status"] == "validating_files":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert job["status"] == "failed"
    assert "line 1" in job["error"]["message"]


def test_a_request_that_runs_ends_whole_while_the_application_stops(
    running: app.Running, config: GatewayConfig, base: Path
) -> None:
    """The last test: it stops the application."""
    chunks: list[str] = []
    first = threading.Event()

    def stream() -> None:
        body = completion(base.name, max_tokens=200, stream=True, ignore_eos=True)
        url = f"{running.http_url}/v1/completions"
        with httpx.stream("POST", url, headers=headers, json=body, timeout=60) as reply:
            for line in reply.iter_lines():
                chunks.append(line)
                first.set()

    headers = admin(running)
    thread = threading.Thread(target=stream)
    thread.start()
    assert first.wait(30)
    app.stop(keep_ray=True)
    thread.join(30)
    assert [line for line in chunks if line][-1] == "data: [DONE]"
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{running.http_url}/readyz")


def test_a_port_in_use_is_said_before_anything_starts(config: GatewayConfig) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        taken = sock.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(ConfigInvalid, match=f":{taken}: another process listens there"):
            app.start(GatewayConfig(engine=config.engine, store=config.store, server=ServerConfig(http_port=taken)))
    assert time.monotonic() - started < 4.0, "less than a start of Serve takes"


def test_a_base_that_does_not_load_is_named(local_ray: None, config: GatewayConfig, tmp_path: Path) -> None:
    server = ServerConfig(http_port=0, grpc_port=0)
    broken = GatewayConfig(engine=EngineConfig(base=str(tmp_path / "no-base")), store=config.store, server=server)
    with pytest.raises(ConfigInvalid, match="no-base"):
        app.start(broken, timeout_s=120)


def test_the_builder_reads_a_file_or_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "patchbay.yaml"
    file.write_text("server:\n  num_replicas: 3\n")
    for args in ({"config": str(file)}, {"server": {"num_replicas": 3}}):
        built = app.app(args)
        replicas = built._bound_deployment.init_args[1]._bound_deployment
        assert replicas.num_replicas == 3
    with pytest.raises(ConfigInvalid, match="sever"):
        app.app({"sever": {}})


@pytest.mark.parametrize(
    ("device", "num_gpus", "fits"), [("auto", 0, False), ("cuda", 4, False), ("cuda", 2, True), ("cpu", 0, True)]
)
def test_a_replica_asks_for_as_many_gpus_as_share_its_base(device: str, num_gpus: float, fits: bool) -> None:
    args = {"engine": {"device": device, "tensor_parallel_size": 2}, "server": {"replica_num_gpus": num_gpus}}
    if not fits:
        with pytest.raises(ConfigInvalid, match="tensor_parallel_size 2 takes 2 GPUs a replica"):
            app.app(args)
        return
    replicas = app.app(args)._bound_deployment.init_args[1]._bound_deployment
    assert replicas.ray_actor_options["num_gpus"] == num_gpus
