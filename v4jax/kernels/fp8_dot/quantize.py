"""Rounding to e4m3 in tiles of 1 x 128 and blocks of 128 x 128 with power-of-two scales (spec 8.4).

The last tile or block of an axis holds the remainder. `core/qtensor.py` does the rounding. Rounded numbers have at
most four significant bits, so float32 and bfloat16 hold them exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.core.qtensor import dequantize, quantize

SIDE = 128


class Tiles(NamedTuple):
    """Numbers in e4m3 with one scale per tile.

    Attributes:
        values: uint8 [..., n], e4m3 codes. The last axis is padded with zeros to a multiple of the tile size.
        scales: uint8 [..., tiles], e8m0 codes.
    """

    values: jax.Array
    scales: jax.Array


def tiles(x: jax.Array) -> Tiles:
    """Round x in tiles of up to 128 numbers along the last axis."""
    return Tiles(*quantize(_filled(x, -1), "fp8", min(SIDE, x.shape[-1])))


def dequantize_tiles(t: Tiles, size: int) -> jax.Array:
    """Convert tiles back to float32 [..., size]; numbers after `size` are padding."""
    return dequantize(t.values, t.scales, "fp8")[..., :size]


def rows(x: jax.Array, axis: int = -1) -> jax.Array:
    """Round x in tiles along `axis` and return it as float32 of the same shape."""
    turned = jnp.moveaxis(x, axis, -1)
    return jnp.moveaxis(dequantize_tiles(tiles(turned), turned.shape[-1]), -1, axis)


def blocks(w_DUF: jax.Array) -> Tiles:
    """Round U matrices in blocks of 128 inputs D by 128 outputs F, with one scale a block.

    Returns:
        values [D / 128, U, F / 128, 128 * 128] and scales [D / 128, U, F / 128, 1], with D and F padded to multiples
        of 128. An axis shorter than 128 is one block of its own size.
    """
    filled = _filled(_filled(w_DUF, 0), 2)
    D, U, F = filled.shape
    d, f = (min(SIDE, size) for size in (w_DUF.shape[0], w_DUF.shape[2]))
    apart = filled.reshape(D // d, d, U, F // f, f).transpose(0, 2, 3, 1, 4)
    return Tiles(*quantize(apart.reshape(D // d, U, F // f, d * f), "fp8", d * f))


def unblock(values: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Arrange the values of `blocks` as a matrix [D, U, F], padding included.

    `shape` is the shape of the weight without padding.
    """
    blocks_D, U, blocks_F, _ = values.shape
    d, f = (min(SIDE, size) for size in (shape[0], shape[2]))
    return values.reshape(blocks_D, U, blocks_F, d, f).transpose(0, 3, 1, 2, 4).reshape(blocks_D * d, U, blocks_F * f)


def block_floats(w_DUF: jax.Array) -> jax.Array:
    """Round w in blocks and return it as float32 of the same shape."""
    t = blocks(w_DUF)
    return unblock(dequantize(t.values, t.scales, "fp8"), w_DUF.shape)[: w_DUF.shape[0], :, : w_DUF.shape[2]]


# --- differentiable rounding, for products outside this folder ----------------------------------------------------


def round_rows(x: jax.Array) -> jax.Array:
    """Round x in tiles along its last axis, keeping its dtype. The gradient is straight-through."""
    return straight_through(x, rows(jax.lax.stop_gradient(x)))


def round_weights(w_DUF: jax.Array) -> jax.Array:
    """Round w in blocks, keeping its dtype. The gradient is straight-through."""
    return straight_through(w_DUF, block_floats(jax.lax.stop_gradient(w_DUF)))


@jax.custom_vjp
def gradient_rows(x: jax.Array) -> jax.Array:
    """Return x unchanged, but round its gradient in tiles along the last axis."""
    return x


gradient_rows.defvjp(lambda x: (x, None), lambda _, dx: (rows(dx).astype(dx.dtype),))


def straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """Return `rounded` in the dtype of x, with the gradient of x."""
    # The added difference is zero and only carries the gradient. x + (rounded - x) would round a second time.
    return jax.lax.stop_gradient(rounded).astype(x.dtype) + (x - jax.lax.stop_gradient(x))


def _filled(x: jax.Array, axis: int) -> jax.Array:
    """Pad `axis` with zeros to a multiple of the tile size. An axis shorter than a tile is not padded."""
    size = x.shape[axis]
    missing = -size % min(SIDE, size)
    if not missing:
        return x
    width = [(0, 0)] * x.ndim
    width[axis] = (0, missing)
    return jnp.pad(x, width)
