"""`patchbay serve`: a gateway, its replicas and the trainer, until a signal stops it."""

from __future__ import annotations

import dataclasses
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from gateway.cli.options import AsJson, given
from gateway.cli.output import print_json, say

if TYPE_CHECKING:
    from gateway.config import GatewayConfig
    from gateway.server.app import Running


def serve(
    config: Annotated[
        Path | None, typer.Option("--config", help="A YAML file; flags that are given replace its values.")
    ] = None,
    base: Annotated[str | None, typer.Option(help='A Hugging Face folder, or "embedded".')] = None,
    quantization: Annotated[str | None, typer.Option(help="nf4 or none.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option(min=1, help="GPUs that share one base.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="The longest context, in tokens.")] = None,
    num_adapter_slots: Annotated[int | None, typer.Option(min=1, help="Adapters on the device at once.")] = None,
    max_lora_rank: Annotated[int | None, typer.Option(min=1, help="The highest rank of an adapter.")] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on; loopback if not given.")] = None,
    http_port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.")] = None,
    grpc_port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.")] = None,
    data_dir: Annotated[
        str | None, typer.Option(envvar="PATCHBAY_DATA_DIR", help="Holds the database, blobs and admin key.")
    ] = None,
    num_replicas: Annotated[int | None, typer.Option(min=1, help="Engines, each with a base.")] = None,
    replica_num_gpus: Annotated[float | None, typer.Option(min=0.0, help="GPUs of each replica.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="Join this Ray cluster, not a local one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Serve until Ctrl-C or SIGTERM, then finish the requests that run and stop."""
    whole = configure(
        config,
        engine=given(
            base=base,
            quantization=quantization,
            device=device,
            tensor_parallel_size=tensor_parallel_size,
            max_model_len=max_model_len,
            num_adapter_slots=num_adapter_slots,
            max_lora_rank=max_lora_rank,
        ),
        server=given(
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            num_replicas=num_replicas,
            replica_num_gpus=replica_num_gpus,
            ray_address=ray_address,
        ),
        store=given(data_dir=data_dir),
    )
    _serve(whole, as_json)


def configure(file: Path | None, **flags: dict[str, Any]) -> GatewayConfig:
    """The configuration of the file, or the defaults, with the flags' values. Raises `ConfigInvalid`."""
    from gateway.config import GatewayConfig, from_dict

    config = GatewayConfig() if file is None else GatewayConfig.from_file(file)
    for section, values in flags.items():
        old = getattr(config, section)
        from_dict(type(old), values, section)  # the same checks and messages as for the file
        config = dataclasses.replace(config, **{section: dataclasses.replace(old, **values)})
    return config


def _serve(config: GatewayConfig, as_json: bool) -> None:
    import gateway.server.app as app

    signal.signal(signal.SIGTERM, _interrupt)
    running = app.start(config)
    try:
        signal.signal(signal.SIGTERM, _interrupt)  # Ray has set handlers of its own
        signal.signal(signal.SIGINT, _interrupt)
        _announce(running, as_json)
        threading.Event().wait()
    except KeyboardInterrupt:
        typer.echo("Stopping: the requests that run may finish.", err=True)
    finally:
        app.stop()


def _announce(running: Running, as_json: bool) -> None:
    key_file = str(running.admin_key_path)
    if as_json:
        places = {"http_url": running.http_url, "grpc_address": running.grpc_address}
        print_json({**places, "admin_key_file": key_file})
    else:
        where = f"HTTP {running.http_url}, gRPC {running.grpc_address}"
        say(f"Ready: {where}, admin key in {key_file}. Ctrl-C stops it.")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
