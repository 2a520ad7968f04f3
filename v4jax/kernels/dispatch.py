"""Selection of the implementation of an operation."""

from collections.abc import Collection

import jax

from v4jax.core.errors import UserError


def select(impl: str | None, known: Collection[str], best: dict[str, str], portable: str = "ref") -> str:
    """Select an implementation.

    Args:
        impl: the requested implementation, or None for the best one of JAX's default backend.
        known: names of all implementations.
        best: backend to the name of its fastest implementation.
        portable: used on backends that `best` does not list. It is plain JAX, so it runs on every backend, though
            perhaps slowly.

    Returns:
        The name of an implementation.

    Raises:
        UserError: `impl` is not in `known`.
    """
    if impl is None:
        return best.get(jax.default_backend(), portable)
    if impl not in known:
        raise UserError(f"unknown implementation {impl!r}; one of {', '.join(known)}")
    return impl
