"""Selection of the implementation of an operation. An implementation is named by its module."""

from collections.abc import Collection, Mapping

from v4jax.core.errors import UserError
from v4jax.core.target_device import target_device


def select(
    impl: str | None,
    known: Collection[str],
    preferred: Mapping[str, str],
    portable: str = "ref",
    operands: tuple = (),
) -> str:
    """Select an implementation.

    Args:
        impl: the requested implementation, or None for the preferred one of the platform that the operands are on.
        known: names of all implementations.
        preferred: platform ("cpu", "gpu" or "tpu") to the name of its fastest implementation.
        portable: used on platforms that `preferred` does not list. It is plain JAX, so it runs on every platform,
            though perhaps slowly.
        operands: arrays of the operation. Tracers say nothing about their platform; then the mesh under which the
            program is traced decides, and without a mesh JAX's default device (`core.target_device`).

    Returns:
        The name of an implementation.

    Raises:
        UserError: `impl` is not in `known`.
    """
    if impl is None:
        return preferred.get(target_device(*operands).platform, portable)
    if impl not in known:
        raise UserError(f"unknown implementation {impl!r}; one of {', '.join(known)}")
    return impl
