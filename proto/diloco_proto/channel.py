"""gRPC channel arguments and limits that both ends must agree on, each with its reason."""

from __future__ import annotations

PROTOCOL_VERSION = 1

MAX_MESSAGE_BYTES = 4 << 20
"""A frame is about 1 MiB; a manifest of some thousand tensors stays far below. Nothing needs more."""

PUSH_WINDOW_FRAMES = 8
"""Frames a worker sends ahead of the server's acknowledgement: about 8 MiB in flight a stream."""

ACK_EVERY_FRAMES = 2
"""The server acknowledges every second frame, so the window never runs dry."""

_KEEPALIVE_MS = 20_000
"""Below the 30 s after which the strictest NAT boxes forget an idle connection."""

_COMMON: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

CLIENT_OPTIONS: tuple[tuple[str, int], ...] = (
    *_COMMON,
    # Channels to one address share a connection unless told otherwise, and bulk would starve heartbeats.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 10_000),
    ("grpc.enable_retries", 0),
)

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_COMMON,
    # Linux would let a second server share the port in silence.
    ("grpc.so_reuseport", 0),
    # The server's ping guard; half the client's period, so that jitter never looks like abuse.
    ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
)
