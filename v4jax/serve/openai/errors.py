"""Errors of the API: status, headers, and the bodies that the clients of OpenAI and of Anthropic read."""

from __future__ import annotations

from v4jax.core.errors import UserError, printable

BAD_REQUEST = "BadRequestError"
_TYPES = {
    400: BAD_REQUEST,
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    431: "RequestHeadersTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "DeadlineExceededError",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request ends with an error that the client can read.

    Args:
        status: HTTP status, 400 to 504.
        message: one line.
        param: the field that the error is about; None if it is about no field.
        retry_after: seconds after which the client may try again; None for no advice.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param = status, printable(message), param
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, round(retry_after)))

    def openai_body(self) -> dict:
        """Return the body in OpenAI's shape; `code` is the status, as in vLLM."""
        kind = _TYPES.get(self.status, "APIError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    def anthropic_body(self) -> dict:
        """Return the body in Anthropic's shape."""
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def bad_request(message: str, param: str | None = None) -> ApiError:
    """Return the error of an invalid field."""
    return ApiError(400, message, param=param)


def to_api_error(error: BaseException) -> ApiError:
    """Return the error that a client gets for an exception of a handler. Only a UserError has a message for it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return bad_request(str(error))
    return ApiError(500, "the server failed at this request; its log has the reason")
