"""Settings of the server. `cli_serve.FLAGS` has a flag of the same name for each."""

from __future__ import annotations

from dataclasses import dataclass

from v4jax.core.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Settings of one server; 0 seconds means no limit where it is noted.

    Args:
        host: address to listen on. The default accepts only clients of this machine.
        port: port to listen on; 0 takes a free one.
        served_model_name: name of the model for clients; None means the name of the checkpoint's directory.
        max_queued_requests: engine requests that wait beyond those that the batch holds. Further ones get status 429.
        max_body_bytes: longest body of a request; a longer one gets status 413.
        max_header_bytes: longest head of a request.
        body_timeout: seconds in which the body of a request must arrive.
        request_timeout: seconds after which a request is aborted; 0 means no limit.
        send_timeout: seconds that a client may take to read a part of a stream, after which it is disconnected.
        max_unread_outputs: outputs of a continuation that may wait for a slow client, after which it is disconnected.
        heartbeat_interval: seconds of silence of a stream after which a comment is sent.
        engine_timeout: seconds without a step after which `/health` reports the engine as stuck.
        drain_timeout: seconds that running requests have to end after SIGTERM.
        api_keys: file of keys (`keys.read_keys`); None lets every client in.
        audit_log: file to which a line of JSON is appended for each request; None for none.
        audit_log_bytes: size at which the audit log is rotated; five old files are kept.
        allowed_origins: origins of web pages that may call the server (CORS); () for none, ("*",) for all.
        ssl_certfile, ssl_keyfile: certificate and key for TLS; None serves plain HTTP.

    Raises:
        UserError: there is a key without a certificate.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    max_queued_requests: int = 256
    max_body_bytes: int = 32 << 20
    max_header_bytes: int = 32 << 10
    body_timeout: float = 60.0
    request_timeout: float = 0.0
    send_timeout: float = 30.0
    max_unread_outputs: int = 4096
    heartbeat_interval: float = 10.0
    engine_timeout: float = 300.0
    drain_timeout: float = 60.0
    api_keys: str | None = None
    audit_log: str | None = None
    audit_log_bytes: int = 100 << 20
    allowed_origins: tuple[str, ...] = ()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    def __post_init__(self):
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise UserError("--ssl_keyfile needs --ssl_certfile, the certificate of the key")
