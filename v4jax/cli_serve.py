"""Flags of `v4jax serve`: those of the server. Names, types and defaults are those of `serve.openai.settings`."""

from __future__ import annotations

from absl import flags

from v4jax.cli_flags import Flag, define_path, define_size

_SECONDS = {"lower_bound": 0.0}
SETTINGS_FLAGS = (
    Flag("host", "address to listen on; 0.0.0.0 lets other machines in", default="127.0.0.1"),
    Flag("port", "port to listen on; 0: a free one", flags.DEFINE_integer, 8000, {"lower_bound": 0}),
    Flag("served_model_name", "name of the model for clients", shown="name of the checkpoint's directory"),
    Flag(
        "max_queued_requests",
        "requests that wait beyond the batch; further ones get status 429",
        flags.DEFINE_integer,
        256,
        {"lower_bound": 0},
    ),
    Flag("max_body_bytes", "longest body of a request", define_size, 32 << 20),
    Flag("max_header_bytes", "longest head of a request", define_size, 32 << 10),
    Flag("body_timeout", "seconds in which a body must arrive", flags.DEFINE_float, 60.0, _SECONDS),
    Flag("request_timeout", "seconds until a request is aborted; 0: no limit", flags.DEFINE_float, 0.0, _SECONDS),
    Flag("send_timeout", "seconds for a client to read a part of a stream", flags.DEFINE_float, 30.0, _SECONDS),
    Flag(
        "max_unread_outputs",
        "outputs that wait for a slow client until it is disconnected",
        flags.DEFINE_integer,
        4096,
        {"lower_bound": 1},
    ),
    Flag("heartbeat_interval", "seconds of silence until a comment is sent", flags.DEFINE_float, 10.0, _SECONDS),
    Flag("engine_timeout", "seconds without a step until /health fails", flags.DEFINE_float, 300.0, _SECONDS),
    Flag("drain_timeout", "seconds for running requests after SIGTERM", flags.DEFINE_float, 60.0, _SECONDS),
    Flag("api_keys", "JSON file of hashed keys", define_path, shown="every client is let in"),
    Flag("audit_log", "file that gets a line of JSON for each request", define_path, shown="none"),
    Flag("audit_log_bytes", "size at which the audit log is rotated", define_size, 100 << 20),
    Flag("allowed_origins", "origins of web pages that may call the server, or *", flags.DEFINE_list, shown="none"),
    Flag("ssl_certfile", "certificate, for TLS", define_path, shown="plain HTTP"),
    Flag("ssl_keyfile", "key of the certificate", define_path),
)
