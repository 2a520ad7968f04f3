"""RMS normalization over the last axis, in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax.nn.linear import param


def rms(x: jax.Array, eps: float) -> jax.Array:
    """`x * rsqrt(mean(x^2) + eps)` over the last axis; float32 inside, dtype of `x` outside."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Weighted RMS normalisation of the axis named by `letter`."""

    def __init__(self, letter: str, size: int, eps: float):
        self.eps = eps
        self.scale = param(letter, jnp.ones(size))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Any shape [..., size] to the same shape and dtype."""
        return (rms(x.astype(jnp.float32), self.eps) * self.scale[...].astype(jnp.float32)).astype(x.dtype)
