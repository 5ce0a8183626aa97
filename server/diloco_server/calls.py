"""Counts the calls of all services, from the outside."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc

from diloco_proto.errors import ERROR_KEY

from .metrics import Metrics

Context = grpc.aio.ServicerContext[Any, Any]


def _shape(handler: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What a handler calls, and what makes another handler of the same kind."""
    match handler.request_streaming, handler.response_streaming:
        case True, True:
            return handler.stream_stream, grpc.stream_stream_rpc_method_handler
        case False, True:
            return handler.unary_stream, grpc.unary_stream_rpc_method_handler
        case True, False:
            return handler.stream_unary, grpc.stream_unary_rpc_method_handler
        case _:
            return handler.unary_unary, grpc.unary_unary_rpc_method_handler


class CountCalls(grpc.aio.ServerInterceptor):
    """An interceptor: the first, so that it also sees what the others refuse."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method).rpartition("/")[2]
        inner, make = _shape(handler)
        counted = self._streaming if inspect.isasyncgenfunction(inner) else self._single
        return make(counted(method, inner), handler.request_deserializer, handler.response_serializer)

    def _single(self, method: str, inner: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def counted(request: Any, context: Context) -> Any:
            with self._counted(method, context):
                return await inner(request, context)

        return counted

    def _streaming(self, method: str, inner: Callable[..., Any]) -> Callable[..., AsyncIterator[Any]]:
        async def counted(request: Any, context: Context) -> AsyncIterator[Any]:
            with self._counted(method, context):
                # Closed at once with the call, not when it is collected: a session's end is an event of the run.
                async with aclosing(inner(request, context)) as replies:
                    async for reply in replies:
                        yield reply

        return counted

    @contextmanager
    def _counted(self, method: str, context: Context) -> Iterator[None]:
        self._metrics.on_call(method)
        code, refused = "OK", ""
        try:
            yield
        except grpc.aio.AbortError:
            given = context.code()
            code = given.name if isinstance(given, grpc.StatusCode) else "UNKNOWN"
            refused = str(dict(context.trailing_metadata() or ()).get(ERROR_KEY, ""))
            raise
        except Exception:
            code = "UNKNOWN"
            raise
        except BaseException:  # asyncio's and the generator's ways to say that the caller has gone
            code = "CANCELLED"
            raise
        finally:
            self._metrics.on_call_end(method, code, refused)
