"""What every gRPC server and channel of the mesh agrees on."""

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""Largest message in either direction. A prompt of a million tokens fits; KV bytes go elsewhere."""

KEEPALIVE_TIME_MS = 10_000
"""A silent connection is probed after this long, so that a dead host is noticed on idle streams."""
KEEPALIVE_TIMEOUT_MS = 5_000
MIN_PING_INTERVAL_MS = 5_000
"""Clients that ping more often than this are cut off."""
MAX_RECONNECT_BACKOFF_MS = 2_000

MESSAGE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *MESSAGE_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second listener beside the first
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *MESSAGE_OPTIONS,
    ("grpc.enable_http_proxy", 0),  # the mesh is never behind the proxy of the environment
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS),
)
