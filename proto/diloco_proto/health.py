"""The messages of gRPC's health service (`grpc.health.v1.Health`), as any health probe sends and reads them.

They are built in a pool of their own: in the common one they would collide with those of grpcio-health-checking, which
the program around us may have loaded too.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "grpc.health.v1.Health"

CHECK = f"/{SERVICE}/Check"
WATCH = f"/{SERVICE}/Watch"

UNAUTHENTICATED_METHODS = frozenset({CHECK, WATCH})
"""The only ones that are answered without a token: probes of containers and load balancers carry none."""


class Health(IntEnum):
    """`HealthCheckResponse.ServingStatus`."""

    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2
    SERVICE_UNKNOWN = 3


def _messages() -> tuple[Any, Any]:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="grpc/health/v1/health.proto", package="grpc.health.v1")
    file.syntax = "proto3"
    request = file.message_type.add(name="HealthCheckRequest")
    request.field.add(name="service", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    response = file.message_type.add(name="HealthCheckResponse")
    status = response.enum_type.add(name="ServingStatus")
    for value in Health:
        status.value.add(name=value.name, number=value.value)
    response.field.add(
        name="status",
        number=1,
        type=field.TYPE_ENUM,
        label=field.LABEL_OPTIONAL,
        type_name=".grpc.health.v1.HealthCheckResponse.ServingStatus",
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = (pool.FindMessageTypeByName(f"grpc.health.v1.{m}") for m in ("HealthCheckRequest", "HealthCheckResponse"))
    first, second = (message_factory.GetMessageClass(m) for m in made)
    return first, second


HealthCheckRequest, HealthCheckResponse = _messages()
