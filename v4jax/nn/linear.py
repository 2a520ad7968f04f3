"""Parameters with logical axes, and einsum products in the compute dtype."""

import jax
import jax.numpy as jnp
from flax import nnx


class Fixed(nnx.Variable):
    """A stored array that no optimizer touches: router biases (spec 3.3) and hash tables (spec 3.1)."""


def weight(rngs: nnx.Rngs, letters: str, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 matrix drawn from N(0, std), its axes named by `letters` of the alphabet."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), letters=letters)


def constant(letters: str, value: jax.Array) -> nnx.Param:
    """A parameter with a given initial value."""
    return nnx.Param(jnp.asarray(value, jnp.float32), letters=letters)


def project(spec: str, x: jax.Array, w: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """`einsum(spec, x, w)` computed and returned in `dtype`; letters follow the alphabet. w may hold a QTensor."""
    return jnp.einsum(spec, x.astype(dtype), w[...].astype(dtype))
