"""gRPC's health service: whether this server takes contributions now. The only service that needs no token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from diloco_proto.health import SERVICE, UNAUTHENTICATED_METHODS, Health, HealthCheckRequest, HealthCheckResponse

from .engine import Engine

SERVICES = ("", "diloco.v1.Outer")
"""Those that one may ask about: the server as a whole, or its only other service."""

MAX_WATCHERS = 32
"""Open Watch streams; they are given to anybody, so there are only so many."""

LOOK_SECONDS = 0.5
"""How often a watched server is looked at."""

Context = grpc.aio.ServicerContext[Any, Any]


def health(engine: Engine) -> Health:
    """NOT_SERVING while the server drains, or cannot write what it would have to acknowledge."""
    return Health.NOT_SERVING if engine.draining or engine.trouble else Health.SERVING


def health_handlers(engine: Engine) -> grpc.GenericRpcHandler:
    """The service `grpc.health.v1.Health`."""
    service = HealthService(engine)
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Check": grpc.unary_unary_rpc_method_handler(
                service.check, HealthCheckRequest.FromString, HealthCheckResponse.SerializeToString
            ),
            "Watch": grpc.unary_stream_rpc_method_handler(
                service.watch, HealthCheckRequest.FromString, HealthCheckResponse.SerializeToString
            ),
        },
    )


class HealthService:
    """Answers of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._watchers = 0

    async def check(self, request: Any, context: Context) -> Any:
        if request.service not in SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this server has no such service")
        return HealthCheckResponse(status=health(self._engine))

    async def watch(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """The status now and whenever it changes. Ends once the server drains: it must not outlast its calls."""
        if self._watchers >= MAX_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watch this server's health; use Check")
        self._watchers += 1
        try:
            told = None
            while True:
                now = health(self._engine) if request.service in SERVICES else Health.SERVICE_UNKNOWN
                if now is not told:
                    yield HealthCheckResponse(status=now)
                    told = now
                if self._engine.draining:
                    return
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            self._watchers -= 1


__all__ = ["SERVICES", "UNAUTHENTICATED_METHODS", "HealthService", "health", "health_handlers"]
