"""The specification of the three FP8 products: rounded operands as float32, plain products."""

import jax.numpy as jnp

from v4jax.kernels.fp8_dot.quantize import block_floats, floats, rows


def forward(x, w_DUF):
    """y_BTUF of the tiles of x_BTD."""
    return jnp.einsum("BTD,DUF->BTUF", floats(x, w_DUF.shape[0]), block_floats(w_DUF))


def to_input(dy_BTUF, w_DUF):
    """dx_BTD: the same blocks of w, tiles of dy along F."""
    return jnp.einsum("BTUF,DUF->BTD", rows(dy_BTUF), block_floats(w_DUF))


def to_weight(x_BTD, dy_BTUF):
    """dw_DUF: both in tiles along T."""
    return jnp.einsum("BTD,BTUF->DUF", rows(x_BTD, 1), rows(dy_BTUF, 1))
