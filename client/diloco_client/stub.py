"""The protocol's calls over a channel. What carries a frame goes and comes by `diloco_proto.frame_messages`."""

from __future__ import annotations

import grpc

from diloco_proto import outer_pb2 as pb
from diloco_proto import outer_pb2_grpc as rpc
from diloco_proto.frame_messages import read_pull, serialized


class Stub(rpc.OuterStub):
    """Push takes PushRequests or, of frames, their serialized messages; Pull gives PullReplies or, of frames, views of
    what has arrived."""

    def __init__(self, channel: grpc.Channel) -> None:
        super().__init__(channel)  # type: ignore[no-untyped-call]
        self.Push = channel.stream_stream(
            "/diloco.v1.Outer/Push", request_serializer=serialized, response_deserializer=pb.PushReply.FromString
        )
        self.Pull = channel.unary_stream(
            "/diloco.v1.Outer/Pull", request_serializer=serialized, response_deserializer=read_pull
        )
