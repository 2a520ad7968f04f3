"""The JSON object of a request body, within bounds that keep later code from failing."""

from __future__ import annotations

import json
import re

from v4jax.serve.openai.errors import ApiError, bad_request

_MAX_DEPTH = 100  # nested objects and lists
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that may be half a character


def parse_object(body: bytes) -> dict:
    """Return the object of a body.

    Raises:
        ApiError: the body is no UTF-8, no JSON or no object, has NaN or Infinity, is nested too deeply, or has text
            with half a character (a lone surrogate).
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is no JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # an integer of more digits than Python converts
        raise bad_request("the body has an integer of thousands of digits") from None
    if not isinstance(value, dict):
        raise bad_request("the body is no JSON object; send an object with the fields of the request")
    _check(value, check_text=_SURROGATE.search(body) is not None)
    return value


def _check(value: dict, check_text: bool) -> None:
    """Raise ApiError if a value is nested too deeply or, with `check_text`, has a lone surrogate."""
    level: list[dict | list] = [value]
    for _ in range(_MAX_DEPTH):
        following: list[dict | list] = []
        for container in level:
            items = container if isinstance(container, list) else (*container, *container.values())
            for item in items:
                if isinstance(item, (dict, list)):
                    following.append(item)
                elif check_text and isinstance(item, str) and not _is_unicode(item):
                    raise bad_request("a text has half a character (a lone surrogate); send whole characters")
        if not following:
            return
        level = following
    raise _too_deep()


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise bad_request(f"the body has {name}, which is no JSON; send a finite number")


def _too_deep() -> ApiError:
    return bad_request(f"the body is nested more than {_MAX_DEPTH} levels deep")
