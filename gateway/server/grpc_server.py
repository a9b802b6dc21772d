"""The gRPC front door: patchbay.v1, health and reflection on one grpc.aio server."""

from __future__ import annotations

from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gateway.rpc import patchbay_pb2 as pb
from gateway.rpc import patchbay_pb2_grpc as pb_grpc
from gateway.server.context import ServerContext
from gateway.server.grpc_adapters import AdaptersServicer
from gateway.server.grpc_calls import Guard
from gateway.server.grpc_fine_tuning import FineTuningServicer
from gateway.server.grpc_inference import InferenceServicer

SERVICE_NAMES: Final = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())
_HEALTH_NAME: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_MIN_PING_MS: Final = 10_000


def create_grpc_server(context: ServerContext) -> grpc.aio.Server:
    """The server of one front door; its caller adds the port and starts it. Statuses of health are the caller's."""
    server = grpc.aio.server(interceptors=(Guard(context),), options=_options(context))
    pb_grpc.add_InferenceServicer_to_server(InferenceServicer(context), server)  # type: ignore[no-untyped-call]
    pb_grpc.add_AdaptersServicer_to_server(AdaptersServicer(context), server)  # type: ignore[no-untyped-call]
    pb_grpc.add_FineTuningServicer_to_server(FineTuningServicer(context), server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(context.health, server)
    reflection.enable_server_reflection((*SERVICE_NAMES, _HEALTH_NAME, reflection.SERVICE_NAME), server)
    return server


def _options(context: ServerContext) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", context.config.limits.max_request_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", int(context.config.server.num_front_doors > 1)),
        # Clients may keep idle connections alive with pings, though not faster than this.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_MS),
    ]
