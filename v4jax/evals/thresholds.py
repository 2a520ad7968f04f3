"""Bounds of an eval suite, as the user overrides them."""

from __future__ import annotations

from v4jax.core.errors import UserError


def read(text: str, defaults: dict[str, float]) -> dict[str, float]:
    """Override default bounds.

    Args:
      text: Bounds such as "name=0.5,other=1"; empty keeps all defaults.
      defaults: Default bounds by name.

    Returns:
      Bounds by name.

    Raises:
      UserError: A part of `text` is not NAME=NUMBER, or the name is unknown.
    """
    limits = dict(defaults)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            limits[name], known = float(value), name in defaults
        except ValueError:
            known = False
        if not known:
            raise UserError(f"bound {part!r} is not NAME=NUMBER with a name of {', '.join(defaults)}")
    return limits
