"""Storage rounding in the forward pass (spec 2.4, 2.5): what a model trained for FP8 entries and FP4 keys computes.

An engine whose cache stores these formats reproduces such a model exactly. Gradients pass straight through.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.core.qtensor import dequantize, group_size, quantize

ENTRY_GROUP, KEY_GROUP = 64, 32  # most numbers that share a scale


def entries(kv: jax.Array, qk_rope_head_dim: int) -> jax.Array:
    """Main entries or window rows [..., H]: FP8 in groups of up to 64, all but the rotary channels at the end."""
    plain = kv.shape[-1] - qk_rope_head_dim
    return jnp.concatenate([_rounded(kv[..., :plain], "fp8", group_size(plain, ENTRY_GROUP)), kv[..., plain:]], axis=-1)


def keys(x: jax.Array) -> jax.Array:
    """Indexer queries or keys [..., L], L a power of two: rotated by a Hadamard matrix, then FP4 in groups of up to 32.

    The rotation spreads outliers over all channels and, done to both sides, changes no product.
    """
    turned = jnp.einsum("...k,kl->...l", x.astype(jnp.float32), _hadamard(x.shape[-1]))
    return _rounded(turned.astype(x.dtype), "fp4", group_size(x.shape[-1], KEY_GROUP))


def mxfp4(w: jax.Array) -> jax.Array:
    """Matrices [..., in, out] as FP4 holds them: e2m1 in groups of 32 along the input, with e8m0 scales (spec 8.4).

    Returned in its own type; numbers that FP4 can hold come out as they are. Gradients pass straight through.
    """
    turned = jax.lax.stop_gradient(w).mT
    rounded = dequantize(*quantize(turned, "fp4", KEY_GROUP), "fp4", jnp.float32)
    # The difference is zero and only carries the gradient: w + (rounded - w) could round once more.
    return rounded.mT.astype(w.dtype) + (w - jax.lax.stop_gradient(w))


def _rounded(x: jax.Array, format: str, group: int) -> jax.Array:
    rounded = dequantize(*quantize(jax.lax.stop_gradient(x), format, group), format, x.dtype)
    return x + jax.lax.stop_gradient(rounded - x)


@functools.cache
def _hadamard(size: int) -> np.ndarray:
    """Orthonormal Hadamard matrix of Sylvester's construction, symmetric: float32 [size, size]."""
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix * np.float32(size**-0.5)
