"""gRPC channel arguments and limits that both ends must agree on, each with its reason."""

from __future__ import annotations

PROTOCOL_VERSION = 1

MAX_MESSAGE_BYTES = 4 << 20
"""A frame is about 1 MiB; a manifest of some thousand tensors stays far below. Nothing needs more."""

PUSH_WINDOW_FRAMES = 8
"""Frames a worker sends ahead of the server's acknowledgement: about 8 MiB in flight a stream."""

ACK_EVERY_FRAMES = 2
"""The server acknowledges every second frame, so the window never runs dry."""

MAX_DATA_CONNECTIONS = 8
"""Connections of one worker that may share a transfer; as many streams as the server gives one item's frames out in."""

KEEPALIVE_MS = 20_000
"""Below the 30 s after which the strictest NAT boxes forget an idle connection."""

PING_TIMEOUTS = 3
"""Times the keepalive period in which a ping must be answered even while other bytes arrive."""

ANSWER_SECONDS = 10.0
"""The server says at least so often that a push whose frames it has is still waiting for its outcome, which may take as
long as a full disk stays full. A third of the client's patience with a transfer on which nothing moves."""


MAX_STREAMS = 16
"""Calls at once on one connection, of which a worker has three or so; further ones wait in the client."""

LOOKAHEAD_BYTES = 256 << 10
"""Of a stream, sent before the server asks for it. The more, the less a push waits between two frames: with a whole
frame it is a sixth faster on a fast link than with gRPC's 64 KiB. But before a token is known anybody can have the
server hold as much for each call."""

MAX_METADATA_BYTES = 8 << 10
"""Of a call's headers, which are read before its token is known. A call of ours has some hundred bytes."""

HANDSHAKE_SECONDS = 20
"""For a new connection to become one of TLS and HTTP/2; whoever says nothing is cut off."""


def _common(keepalive_ms: int) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", keepalive_ms),
        # Without a byte of any kind for so long after a ping a connection is dead. TCP_USER_TIMEOUT is this, too.
        ("grpc.keepalive_timeout_ms", keepalive_ms),
        # The answer itself may take longer: behind a slow uplink's full buffers it waits for megabytes.
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUTS * keepalive_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )


def client_options(keepalive_ms: int = KEEPALIVE_MS) -> tuple[tuple[str, int], ...]:
    """Of a channel. An idle connection is probed every `keepalive_ms`, and given up when no answer comes."""
    return (
        *_common(keepalive_ms),
        # Channels to one address share a connection unless told otherwise, and bulk would starve heartbeats.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 3_000),
        ("grpc.enable_retries", 0),
    )


def server_options(keepalive_ms: int = KEEPALIVE_MS) -> tuple[tuple[str, int], ...]:
    """Of a server whose clients have the same `keepalive_ms`."""
    return (
        *_common(keepalive_ms),
        # Linux would let a second server share the port in silence.
        ("grpc.so_reuseport", 0),
        # The server's ping guard; half the client's period, so that jitter never looks like abuse.
        ("grpc.http2.min_ping_interval_without_data_ms", keepalive_ms // 2),
        # What is read before a token is known, and what strangers can make us hold. Without the probe a stream has
        # this window, and as much as the message needs that the server asks for; with it, megabytes.
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES * 5 // 4),  # in between gRPC refuses some
        ("grpc.server_handshake_timeout_ms", 1000 * HANDSHAKE_SECONDS),
    )


CLIENT_OPTIONS = client_options()

SERVER_OPTIONS = server_options()
