"""Reference of the three FP8 products: operands are rounded, then multiplied as float32."""

import jax.numpy as jnp

from v4jax.kernels.fp8_dot.quantize import block_floats, dequantize_tiles, rows


def forward(x, w_DUF):
    """Return y_BTUF, float32, from the tiles of x_BTD along D and w_DUF rounded in blocks."""
    return jnp.einsum("BTD,DUF->BTUF", dequantize_tiles(x, w_DUF.shape[0]), block_floats(w_DUF))


def to_input(dy_BTUF, w_DUF):
    """Return dx_BTD, float32, with dy rounded in tiles along F and w in the blocks of the forward pass."""
    return jnp.einsum("BTUF,DUF->BTD", rows(dy_BTUF), block_floats(w_DUF))


def to_weight(x_BTD, dy_BTUF):
    """Return dw_DUF, float32, with x and dy rounded in tiles along T."""
    return jnp.einsum("BTD,BTUF->DUF", rows(x_BTD, 1), rows(dy_BTUF, 1))
