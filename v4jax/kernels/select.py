"""Which implementation of an operation runs."""

from collections.abc import Collection

import jax

from v4jax.core.check import UserError


def select(impl: str | None, known: Collection[str], best: dict[str, str]) -> str:
    """`impl` if given (UserError for an unknown name), else the best one of the default backend."""
    if impl is None:
        return best[jax.default_backend()]
    if impl not in known:
        raise UserError(f"unknown implementation {impl!r}; one of {', '.join(known)}")
    return impl
