"""Public entry of the FP8 product, its gradients, and the choice of an implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.dispatch import select
from v4jax.kernels.fp8_dot import ref, xla_tiled
from v4jax.kernels.fp8_dot.quantize import floats, tiles

_IMPLEMENTATIONS = {"ref": ref, "tiled": xla_tiled}
_BEST = {"gpu": "tiled"}


def dot(x_BTD: jax.Array, w_DUF: jax.Array, impl: str | None = None) -> jax.Array:
    """y_BTUF = x w with operands in e4m3, float32 sums: float32 [B, T, U, F] (spec 8.4, 9.3).

    x is rounded in tiles of 128 along D, w in blocks of 128 x 128 for each of the U matrices, dy in tiles along F; the
    gradient of w takes x (as the forward pass rounded it) and dy in tiles of 128 tokens of a row. Every scale is a
    power of two. No other format is used for gradients (DeepSeek-V3, 3.3).

    impl: "tiled" multiplies e4m3 operands tile by tile and scales the partial sums, for backends with such products;
    "ref" multiplies the same numbers as float32; None takes the backend's. Operands are equal bit for bit in both, and
    so is every product of two numbers: results differ by the order of float32 additions alone.
    """
    return _dot(x_BTD, w_DUF, select(impl, _IMPLEMENTATIONS, _BEST))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x_BTD, w_DUF, impl):
    return _IMPLEMENTATIONS[impl].forward(tiles(x_BTD), w_DUF)


def _save(x_BTD, w_DUF, impl):
    x = tiles(x_BTD)  # a byte a number is what the backward pass keeps
    return _IMPLEMENTATIONS[impl].forward(x, w_DUF), (x, w_DUF, jnp.zeros((), x_BTD.dtype))


def _gradients(impl, saved, dy_BTUF):
    x, w_DUF, like = saved
    dx_BTD = _IMPLEMENTATIONS[impl].to_input(dy_BTUF, w_DUF)
    dw_DUF = _IMPLEMENTATIONS[impl].to_weight(floats(x, w_DUF.shape[0]), dy_BTUF)
    return dx_BTD.astype(like.dtype), dw_DUF.astype(w_DUF.dtype)


_dot.defvjp(_save, _gradients)
