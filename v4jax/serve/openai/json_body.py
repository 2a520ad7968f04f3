"""The JSON object of a request body."""

from __future__ import annotations

from v4jax.core import untrusted_json
from v4jax.serve.openai.errors import bad_request

# A body is bounded before it is read. This many bytes a byte of it let a list of token ids through the bound on values.
_ROOM = 16


def parse_object(body: bytes) -> dict:
    """Return the object of a body.

    Raises:
        ApiError: the body is no UTF-8, no JSON or no object, has NaN or Infinity, a name twice or half a character (a
            lone surrogate), or is nested too deeply.
    """
    try:
        value = untrusted_json.parse(body, _ROOM * len(body) + untrusted_json.SMALL)
    except untrusted_json.JsonError as error:
        raise bad_request(f"the body is no JSON that is accepted: {error}") from None
    if not isinstance(value, dict):
        raise bad_request("the body is no JSON object; send an object with the fields of the request")
    return value
