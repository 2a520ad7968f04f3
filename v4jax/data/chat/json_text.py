"""JSON as DeepSeek's prompts spell it: ", " and ": " between items, Unicode unescaped, numbers as in each version."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

from v4jax.core.errors import UserError

_MAX_DEPTH = 127  # levels of nesting; deeper arguments of a tool call are taken as text, as in DeepSeek's converter
_INT64_MIN, _UINT64_MAX = -(1 << 63), (1 << 64) - 1


def parse_arguments(text: str) -> dict | None:
    """Return the JSON object of the arguments of a tool call; None if the text is none.

    Integers outside of 64 bits become float64. A name that occurs twice keeps its first place and its last value.
    """
    try:
        value = json.loads(text, parse_int=_parse_int, parse_float=_parse_float, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _is_portable(value, _MAX_DEPTH) else None


def dumps(value: object, spell_float: Callable[[float], str]) -> str:
    """Return the JSON text of a value.

    Args:
        value: what `json.loads` returns, with string keys.
        spell_float: `repr` (V4.1) or `spell_float_v4` (V4).

    Raises:
        UserError: the value is no JSON.
    """
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int):
        return str(value) if _INT64_MIN <= value <= _UINT64_MAX else spell_float(float(value))
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f"{value} is no JSON number; replace it in the schemas of tools and response_format")
        return spell_float(value)
    if isinstance(value, dict):
        items = (f"{dumps(key, spell_float)}: {dumps(item, spell_float)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(dumps(item, spell_float) for item in value) + "]"
    raise UserError(
        f"a {type(value).__name__} is no JSON value; replace it in the schemas of tools and response_format"
    )


def spell_float_v4(value: float) -> str:
    """Return a float64 as the V4 prompt spells it.

    The digits are the shortest that give the same float64. The decimal point moves up to 5 places to the left or up to
    16 to the right; beyond that the number has an exponent, such as 1e-7 or 1.5e+16.
    """
    sign = "-" if math.copysign(1.0, value) < 0 else ""
    mantissa, exponent = _shortest(abs(value))
    point = exponent + 1  # number of digits before the decimal point
    if 0 < point <= 16:
        whole = mantissa[:point].ljust(point, "0")
        return f"{sign}{whole}.{mantissa[point:] or '0'}"
    if -5 < point <= 0:
        return f"{sign}0.{'0' * -point}{mantissa}"
    fraction = f".{mantissa[1:]}" if len(mantissa) > 1 else ""
    return f"{sign}{mantissa[0]}{fraction}e{exponent:+d}"


def _shortest(value: float) -> tuple[str, int]:
    """Return the shortest digits of a float64 and the power of ten of the first one. Zero has the digit 0."""
    digits, _, exponent = f"{value!r}".partition("e")
    whole, _, fraction = digits.partition(".")
    power = int(exponent or 0) + len(whole) - 1
    joined = whole + fraction
    stripped = joined.lstrip("0")
    if not stripped:
        return "0", 0
    return stripped.rstrip("0"), power - (len(joined) - len(stripped))


def _parse_int(text: str) -> int | float:
    if len(text) > 20 or text == "-0":
        return _parse_float(text)
    value = int(text)
    return value if _INT64_MIN <= value <= _UINT64_MAX else float(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("the number overflows float64")
    return value


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _is_portable(value: object, depth: int) -> bool:
    """Whether a parsed value nests at most `depth` levels and all of its text has a UTF-8 form."""
    if isinstance(value, str):
        return not any("\ud800" <= c <= "\udfff" for c in value)
    if isinstance(value, dict):
        return depth > 0 and all(_is_portable(k, 1) and _is_portable(v, depth - 1) for k, v in value.items())
    if isinstance(value, list):
        return depth > 0 and all(_is_portable(item, depth - 1) for item in value)
    return True
