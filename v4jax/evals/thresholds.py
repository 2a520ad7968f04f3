"""Bounds of a suite: what a user may set, and whether a value keeps to one."""

from __future__ import annotations

from v4jax.core.errors import UserError


def read(text: str, defaults: dict[str, float]) -> dict[str, float]:
    """`defaults` with those of "name=0.5,other=1" in their place. Raises UserError for what is not of that form."""
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
