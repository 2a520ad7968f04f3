"""RMS normalization over the last axis, in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax.nn.linear import param


def rms(x: jax.Array, eps: float) -> jax.Array:
    """Return `x * rsqrt(mean(x^2) + eps)` over the last axis, computed in float32 and cast to the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Weighted RMS normalization of the axis named by `letter`."""

    def __init__(self, letter: str, size: int, eps: float):
        self.eps = eps
        self.scale = param(letter, jnp.ones(size))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x [..., size]; the result has the same shape and dtype."""
        return (rms(x.astype(jnp.float32), self.eps) * self.scale[...].astype(jnp.float32)).astype(x.dtype)
