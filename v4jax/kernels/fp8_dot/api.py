"""Public API of the FP8 product: its gradients and the selection of an implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.dispatch import select
from v4jax.kernels.fp8_dot import ref, xla_tiled
from v4jax.kernels.fp8_dot.quantize import dequantize_tiles, tiles

_IMPLEMENTATIONS = {"ref": ref, "xla_tiled": xla_tiled}
_PREFERRED = {"gpu": "xla_tiled"}


def dot(x_BTD: jax.Array, w_DUF: jax.Array, impl: str | None = None) -> jax.Array:
    """Multiply x by U matrices with e4m3 operands and float32 accumulation (spec 8.4, 9.3).

    The forward pass rounds x in tiles of 128 along D, and each of the U matrices in blocks of 128 x 128. The gradient
    of x rounds dy in tiles of 128 along F. The gradient of w rounds x (as the forward pass rounded it) and dy in tiles
    of 128 tokens of a row. Every scale is a power of two. Gradients use e4m3 too (DeepSeek-V3, section 3.3).

    Args:
        x_BTD: activations [B, T, D].
        w_DUF: weights [D, U, F].
        impl: "xla_tiled" multiplies e4m3 operands tile by tile and scales the partial sums, for backends with FP8
            products. "ref" multiplies the same numbers as float32. None takes the best one of the backend. Operands
            and products of two numbers are equal bit for bit in both, so results differ only by the order of float32
            additions.

    Returns:
        float32 [B, T, U, F].

    Raises:
        UserError: `impl` is unknown.
    """
    return _dot(x_BTD, w_DUF, select(impl, _IMPLEMENTATIONS, _PREFERRED, operands=(x_BTD, w_DUF)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x_BTD, w_DUF, impl):
    return _IMPLEMENTATIONS[impl].forward(tiles(x_BTD), w_DUF)


def _save(x_BTD, w_DUF, impl):
    x = tiles(x_BTD)  # keep the rounded x for the backward pass: one byte a number
    return _IMPLEMENTATIONS[impl].forward(x, w_DUF), (x, w_DUF, jnp.zeros((), x_BTD.dtype))


def _gradients(impl, saved, dy_BTUF):
    x, w_DUF, like = saved
    dx_BTD = _IMPLEMENTATIONS[impl].to_input(dy_BTUF, w_DUF)
    dw_DUF = _IMPLEMENTATIONS[impl].to_weight(dequantize_tiles(x, w_DUF.shape[0]), dy_BTUF)
    return dx_BTD.astype(like.dtype), dw_DUF.astype(w_DUF.dtype)


_dot.defvjp(_save, _gradients)
