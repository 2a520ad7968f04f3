"""Storage rounding in the forward pass (spec 2.4, 2.5): the rounding of a model trained for FP8 entries and FP4 keys.

An engine whose cache stores these formats reproduces such a model exactly. Gradients pass straight through.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.core.qtensor import dequantize, group_size, quantize
from v4jax.kernels.fp8_dot import straight_through

ENTRY_GROUP, KEY_GROUP = 64, 32  # maximum group size, in elements that share a scale


def entries(kv: jax.Array, qk_rope_head_dim: int) -> jax.Array:
    """Round main entries or window rows [..., H] to FP8 in groups of up to 64, except the last (rotary) channels."""
    plain = kv.shape[-1] - qk_rope_head_dim
    return jnp.concatenate([_rounded(kv[..., :plain], "fp8", group_size(plain, ENTRY_GROUP)), kv[..., plain:]], axis=-1)


def keys(x: jax.Array) -> jax.Array:
    """Rotate indexer queries or keys [..., L] by a Hadamard matrix and round them to FP4 in groups of up to 32.

    L is a power of two. The rotation spreads outliers over all channels. Applied to queries and keys, it changes no dot
    product.
    """
    turned = jnp.einsum("...k,kl->...l", x.astype(jnp.float32), _hadamard(x.shape[-1]))
    return _rounded(turned.astype(x.dtype), "fp4", group_size(x.shape[-1], KEY_GROUP))


def mxfp4(w: jax.Array) -> jax.Array:
    """Round matrices [..., in, out] to MXFP4: e2m1 in groups of 32 along the input, with e8m0 scales (spec 8.4).

    The result has the dtype of w. Values that FP4 represents are unchanged. Gradients pass straight through.
    """
    turned = jax.lax.stop_gradient(w).mT
    rounded = dequantize(*quantize(turned, "fp4", KEY_GROUP), "fp4", jnp.float32)
    return straight_through(w, rounded.mT)


def _rounded(x: jax.Array, format: str, group: int) -> jax.Array:
    rounded = dequantize(*quantize(jax.lax.stop_gradient(x), format, group), format, x.dtype)
    return x + jax.lax.stop_gradient(rounded - x)


@functools.cache
def _hadamard(size: int) -> np.ndarray:
    """Return the symmetric orthonormal Hadamard matrix of Sylvester's construction, float32 [size, size]."""
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix * np.float32(size**-0.5)
