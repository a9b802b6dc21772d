"""Patchbay as a Ray Serve application: how it is put together, started and stopped."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from gateway.config import GatewayConfig, from_dict
from gateway.errors import ConfigInvalid, EngineUnavailable
from gateway.server.front_door import DRAIN_S, FrontDoor
from gateway.server.listeners import bind_http
from gateway.server.replica import EngineReplica
from gateway.server.trainer_replica import TrainerReplica

logger = logging.getLogger(__name__)

APP_NAME: Final = "patchbay"
_FRONT_DOOR_CPUS: Final = 0.1
_CLUSTER_START_ATTEMPTS: Final = 20  # databases and volumes of a cluster may come up later than we do
_SHUTDOWN_S: Final = DRAIN_S + 5.0
_OBJECT_STORE_BYTES: Final = 128 << 20  # requests and tokens do not pass through it
_QUIET: Final = {"log_level": "WARNING", "enable_access_log": False}
# Read by Ray and Serve when they are imported in a worker; a value that the user has set stays.
_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # Engine, trainer and front door share the cores: threads that spin at OpenMP's barriers would starve each other.
    "OMP_WAIT_POLICY": "PASSIVE",
    # NumPy only decomposes many small matrices (LoKr), in which more threads would wait for each other.
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class Running:
    """A started gateway. `grpc_address` is "host:port"; of several front doors, the first one's."""

    http_url: str
    grpc_address: str
    admin_key_path: Path


def build(config: GatewayConfig, *, start_attempts: int = 1) -> serve.Application:
    """The application: front doors -> engine replicas, and the trainer.

    The front door is the root, so that a handle of the application reaches it. start_attempts: how often Serve tries to
    start a process that fails before the application has ever been up.
    """
    replicas = replica_deployment(config).options(max_constructor_retry_count=start_attempts).bind(config)
    doors = _front_door_deployment(config).options(max_constructor_retry_count=start_attempts)
    if config.trainer.enabled:
        return doors.bind(config, replicas, _trainer_deployment(config).bind(config))
    return doors.bind(config, replicas)


def app(args: dict[str, Any]) -> serve.Application:
    """Serve's builder function, for `import_path: gateway.server.app:app`.

    args: {"config": path of a YAML file}, or the configuration itself as a mapping. Raises `ConfigInvalid`.
    """
    if set(args) == {"config"}:
        config = GatewayConfig.from_file(args["config"])
    else:
        config = from_dict(GatewayConfig, args)
    return build(config, start_attempts=_CLUSTER_START_ATTEMPTS)


def start(config: GatewayConfig, *, log_to_driver: bool = False, timeout_s: float = 300.0) -> Running:
    """Start Patchbay in a local Ray, or in the cluster at `config.server.ray_address`, and wait until it is ready.

    log_to_driver: print the processes' logs here. Raises `ConfigInvalid` for a port in use or when a part fails to
    start, and `EngineUnavailable` when it is not ready within `timeout_s` seconds; nothing is left running then.
    """
    _check_ports(config)
    deadline = time.monotonic() + timeout_s
    joined = ray.is_initialized()
    try:
        if not joined:
            _start_ray(config, log_to_driver)
        return _start_app(config, deadline)
    except BaseException:
        stop(keep_ray=joined)
        raise


def stop(*, keep_ray: bool = False) -> None:
    """Let running requests end, stop the application and, unless `keep_ray`, leave Ray: a local one ends with that."""
    if not ray.is_initialized():
        return
    with suppress(RayServeException):  # no Serve, no application
        serve.delete(APP_NAME)
    if not keep_ray:
        ray.shutdown()


def _start_app(config: GatewayConfig, deadline: float) -> Running:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config=_QUIET)
    target = serve.RunTarget(build(config), name=APP_NAME, route_prefix=None)
    (handle,) = serve.run_many([target], wait_for_applications_running=False)
    _wait_running(deadline)
    while reason := _not_ready(handle, deadline):
        if time.monotonic() > deadline:
            raise EngineUnavailable(f"Patchbay is not ready in time: {reason}")
        time.sleep(0.1)
    addresses = handle.addresses.remote().result()
    return Running(addresses.http_url, addresses.grpc, Path(config.store.data_dir).resolve() / "admin.key")


def replica_deployment(config: GatewayConfig) -> serve.Deployment:
    """The engine replicas' deployment; its constructor takes the configuration. Raises `ConfigInvalid`."""
    server = config.server
    _check_gpus(config)
    return serve.deployment(
        EngineReplica,
        name="EngineReplica",
        num_replicas=server.num_replicas,
        ray_actor_options={"num_cpus": server.replica_num_cpus, "num_gpus": server.replica_num_gpus},
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=_SHUTDOWN_S,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=_QUIET,
    )


def _front_door_deployment(config: GatewayConfig) -> serve.Deployment:
    resource = config.server.front_door_resource
    return serve.deployment(
        FrontDoor,
        name="FrontDoor",
        num_replicas=config.server.num_front_doors,
        ray_actor_options={"num_cpus": _FRONT_DOOR_CPUS, "resources": {resource: 1} if resource else {}},
        graceful_shutdown_timeout_s=_SHUTDOWN_S,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=_QUIET,
    )


def _trainer_deployment(config: GatewayConfig) -> serve.Deployment:
    trainer = config.trainer
    return serve.deployment(
        TrainerReplica,
        name="Trainer",
        num_replicas=1,
        ray_actor_options={"num_cpus": trainer.num_cpus, "num_gpus": trainer.num_gpus},
        graceful_shutdown_timeout_s=15.0,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=_QUIET,
    )


def _check_gpus(config: GatewayConfig) -> None:
    """A replica sees the GPUs that Ray gives it, and no others. Raises `ConfigInvalid`."""
    size, num_gpus = config.engine.tensor_parallel_size, config.server.replica_num_gpus
    if size > 1 and config.engine.device != "cpu" and num_gpus != size:
        raise ConfigInvalid(
            f"server.replica_num_gpus is {num_gpus:g}; engine.tensor_parallel_size {size} takes {size} GPUs a replica.",
            param="server.replica_num_gpus",
        )


def _check_ports(config: GatewayConfig) -> None:
    """Say that a port is taken before ten seconds of starting Ray. Raises `ConfigInvalid`."""
    server = config.server
    if server.ray_address is not None:
        return
    for port in (server.http_port, server.grpc_port):
        bind_http(server.host, port, shared=False).close()


def _start_ray(config: GatewayConfig, log_to_driver: bool) -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if config.server.ray_address is not None:
        ray.init(
            config.server.ray_address,
            namespace=APP_NAME,
            logging_level=logging.WARNING,
            log_to_driver=log_to_driver,
        )
        return
    # Ray makes a token for this cluster of ours and warns that it did.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    ray.init(
        num_cpus=_logical_cpus(config),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        namespace=APP_NAME,
        logging_level=logging.WARNING,
        log_to_driver=log_to_driver,
    )


def _logical_cpus(config: GatewayConfig) -> int:
    """Enough for every deployment to be placed: on one machine these are shares, not cores."""
    server = config.server
    wanted = server.num_front_doors * _FRONT_DOOR_CPUS + server.num_replicas * server.replica_num_cpus
    return math.ceil(wanted + config.trainer.num_cpus) + 1


def _not_ready(handle: DeploymentHandle[Any], deadline: float) -> str | None:
    """Why one of the front doors takes no requests yet: each of them, since any of them may be asked next."""
    reasons = handle.broadcast("ready").results(timeout_s=max(1.0, deadline - time.monotonic()))
    return next(filter(None, reasons), None) if reasons else "no front door is running"


def _wait_running(deadline: float) -> None:
    while True:
        status = serve.status().applications[APP_NAME]
        if status.status == "RUNNING":
            return
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ConfigInvalid(_failure(status))
        if time.monotonic() > deadline:
            raise EngineUnavailable(f"Patchbay did not start in time: {_failure(status)}")
        time.sleep(0.1)


def _failure(status: Any) -> str:
    """What the first failing deployment said last: its exception's text, without the class."""
    messages = [deployment.message for deployment in status.deployments.values() if deployment.message]
    text = next((message for message in messages if message.strip()), status.message)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^[\w.]+: ", "", lines[-1]) if lines else str(status.status)
