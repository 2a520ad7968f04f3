"""Which implementation of an operation runs."""

from collections.abc import Collection

import jax

from v4jax.core.errors import UserError


def select(impl: str | None, known: Collection[str], best: dict[str, str], portable: str = "ref") -> str:
    """`impl` if given (UserError for an unknown name), else the best one of the default backend.

    A backend that nobody has measured gets `portable`, plain JAX: perhaps slow, but it runs wherever JAX does.
    """
    if impl is None:
        return best.get(jax.default_backend(), portable)
    if impl not in known:
        raise UserError(f"unknown implementation {impl!r}; one of {', '.join(known)}")
    return impl
