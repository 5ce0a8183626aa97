"""A server whose calls take the next behaviour of a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
import numpy as np

from diloco_client.network import Network
from diloco_client.transport import Retry, Transport
from diloco_proto import outer_pb2 as pb
from diloco_proto import outer_pb2_grpc as rpc
from diloco_proto.codec import (
    Format,
    encode_fragment,
    frame_checksum,
    pack_frames,
)
from diloco_proto.errors import ERROR_KEY

SOON = Retry(first=0.001, cap=0.01)


class Scripted(rpc.OuterServicer):
    """Each call takes the next behaviour of its script."""

    def __init__(self, *script: Callable) -> None:
        self.script = list(script)
        self.pulls: list[pb.PullRequest] = []

    def Push(self, requests, context):
        yield from self.script.pop(0)(requests, context)

    def Pull(self, request, context):
        self.pulls.append(request)
        yield from self.script.pop(0)(request, context)


@contextmanager
def connected(service: Scripted, **network: float) -> Iterator[Transport]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    rpc.add_OuterServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    transport = Transport(f"127.0.0.1:{port}", SOON, Network(**network))
    try:
        yield transport
    finally:
        transport.close()
        server.stop(None).wait()


def frames_of(values: np.ndarray) -> list[bytes]:
    return pack_frames(encode_fragment(Format.FP32, values), level=None)


def header_of(frames: list[bytes]) -> pb.PushHeader:
    return pb.PushHeader(worker_id="w", frame_digests=[frame_checksum(f) for f in frames])


def breaks(code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE, name: str = "") -> Callable:
    def behave(request, context):
        if name:
            context.set_trailing_metadata(((ERROR_KEY, name),))
        context.abort(code, "scripted")
        yield

    return behave
