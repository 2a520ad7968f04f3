"""e4m3 numbers in tiles of 1x128 and blocks of 128x128 with power-of-two scales, and the same as floats (spec 8.4).

A tile or block at the end of an axis holds what is left. Rounding is that of `core/qtensor.py`; what it gives has at
most four significant bits, so float32 holds it exactly, and so does bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.core.qtensor import dequantize, quantize

SIDE = 128


class Tiles(NamedTuple):
    """values: uint8 [..., n], e4m3, n filled up with zeros to whole tiles. scales: uint8 [..., tiles], e8m0."""

    values: jax.Array
    scales: jax.Array


def tiles(x: jax.Array) -> Tiles:
    """Tiles of up to 128 numbers along the last axis."""
    return Tiles(*quantize(_filled(x, -1), "fp8", min(SIDE, x.shape[-1])))


def floats(t: Tiles, size: int) -> jax.Array:
    """float32 [..., size] of tiles of as many numbers."""
    return dequantize(t.values, t.scales, "fp8")[..., :size]


def rows(x: jax.Array, axis: int = -1) -> jax.Array:
    """x rounded in tiles along `axis`: float32."""
    turned = jnp.moveaxis(x, axis, -1)
    return jnp.moveaxis(floats(tiles(turned), turned.shape[-1]), -1, axis)


def blocks(w_DUF: jax.Array) -> Tiles:
    """Blocks of 128 inputs D by 128 outputs F, a scale each; U counts matrices. values
    [D / 128, U, F / 128, 128 * 128], scales [D / 128, U, F / 128, 1]."""
    filled = _filled(_filled(w_DUF, 0), 2)
    D, U, F = filled.shape
    d, f = (min(SIDE, size) for size in (w_DUF.shape[0], w_DUF.shape[2]))
    apart = filled.reshape(D // d, d, U, F // f, f).transpose(0, 2, 3, 1, 4)
    return Tiles(*quantize(apart.reshape(D // d, U, F // f, d * f), "fp8", d * f))


def whole(values: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """[D, U, F] with its filling, from the blocks of a weight of this shape."""
    blocks_D, U, blocks_F, _ = values.shape
    d, f = (min(SIDE, size) for size in (shape[0], shape[2]))
    return values.reshape(blocks_D, U, blocks_F, d, f).transpose(0, 3, 1, 2, 4).reshape(blocks_D * d, U, blocks_F * f)


def block_floats(w_DUF: jax.Array) -> jax.Array:
    """w rounded in blocks: float32, of its shape."""
    t = blocks(w_DUF)
    return whole(dequantize(t.values, t.scales, "fp8"), w_DUF.shape)[: w_DUF.shape[0], :, : w_DUF.shape[2]]


# --- with gradients, for products of other kinds ------------------------------------------------------------------


def with_rows(x: jax.Array) -> jax.Array:
    """x rounded in tiles along its last axis, in its own type; gradients pass straight through."""
    return _straight(x, rows(jax.lax.stop_gradient(x)))


def weights(w_DUF: jax.Array) -> jax.Array:
    """w rounded in blocks, in its own type; gradients pass straight through."""
    return _straight(w_DUF, block_floats(jax.lax.stop_gradient(w_DUF)))


@jax.custom_vjp
def gradient_rows(x: jax.Array) -> jax.Array:
    """x itself; its gradient is rounded in tiles along the last axis."""
    return x


gradient_rows.defvjp(lambda x: (x, None), lambda _, dx: (rows(dx).astype(dx.dtype),))


def _straight(x: jax.Array, rounded: jax.Array) -> jax.Array:
    # The difference is zero and only carries the gradient: x + (rounded - x) would round once more.
    return jax.lax.stop_gradient(rounded).astype(x.dtype) + (x - jax.lax.stop_gradient(x))


def _filled(x: jax.Array, axis: int) -> jax.Array:
    """x with zeros at the end of `axis`, up to whole tiles; an axis shorter than one tile is one."""
    size = x.shape[axis]
    missing = -size % min(SIDE, size)
    if not missing:
        return x
    width = [(0, 0)] * x.ndim
    width[axis] = (0, missing)
    return jnp.pad(x, width)
