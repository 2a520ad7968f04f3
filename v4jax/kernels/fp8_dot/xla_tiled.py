"""The three FP8 products tile by tile: e4m3 operands, float32 partial sums multiplied by the scales of each tile."""

import jax
import jax.numpy as jnp

from v4jax.kernels.fp8_dot.quantize import blocks, tiles, unblock


def forward(x, w_DUF):
    """See `ref.forward`."""
    w, (B, T, _), U = blocks(w_DUF), x.values.shape, w_DUF.shape[1]
    columns = unblock(w.values, w_DUF.shape)  # [D, U, F], padded
    scales = _repeated(w.scales[..., 0], columns.shape[2])  # [D / 128, U, F]
    flat = lambda a: a.reshape(a.shape[0], -1)
    y = _scaled(_merged(x.values), _merged(x.scales), flat(columns), flat(scales))
    return y.reshape(B, T, U, -1)[..., : w_DUF.shape[2]]


def to_input(dy_BTUF, w_DUF):
    """See `ref.to_input`."""
    w, dy, (B, T) = blocks(w_DUF), tiles(dy_BTUF), dy_BTUF.shape[:2]
    columns = unblock(w.values, w_DUF.shape)
    turned = columns.transpose(1, 2, 0).reshape(-1, columns.shape[0])  # [U F, D]
    scales = w.scales[..., 0].transpose(1, 2, 0).reshape(-1, w.scales.shape[0])
    scales = _repeated(scales, columns.shape[0])  # [U F / 128, D]
    flat = lambda a: a.reshape(B * T, -1)
    return _scaled(flat(dy.values), flat(dy.scales), turned, scales).reshape(B, T, -1)[..., : w_DUF.shape[0]]


def to_weight(x_BTD, dy_BTUF):
    """See `ref.to_weight`. The tiles along the tokens of all rows form one axis."""
    B, T, U, F = dy_BTUF.shape
    x = tiles(x_BTD.transpose(2, 0, 1))  # [D, B, T]
    dy = tiles(dy_BTUF.reshape(B, T, -1).transpose(2, 0, 1))  # [U F, B, T]
    flat = lambda a: a.reshape(a.shape[0], -1)
    dw = _scaled(flat(x.values), flat(x.scales), flat(dy.values).T, flat(dy.scales).T)
    return dw.reshape(-1, U, F)


def _scaled(a_RC, scales_RP, b_CS, scales_PS):
    """Multiply scaled e4m3 matrices whose contracted axis C consists of P tiles.

    Args:
        a_RC: uint8 [R, C], e4m3 codes.
        scales_RP: uint8 [R, P], e8m0 codes.
        b_CS: uint8 [C, S], e4m3 codes.
        scales_PS: uint8 [P, S], e8m0 codes.

    Returns:
        float32 [R, S].
    """
    (R, C), S, P = a_RC.shape, b_CS.shape[1], scales_RP.shape[1]
    as_fp8 = lambda codes: jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    power = lambda codes: jax.lax.bitcast_convert_type(codes, jnp.float8_e8m0fnu).astype(jnp.float32)
    arms = a_RC.reshape(R, P, C // P).swapaxes(0, 1), b_CS.reshape(P, C // P, S), scales_RP.T, scales_PS

    def add(total, tile):
        a, b, scales_R, scales_S = tile
        part = jnp.einsum("RC,CS->RS", as_fp8(a), as_fp8(b), preferred_element_type=jnp.float32)
        return total + part * power(scales_R)[:, None] * power(scales_S), None

    return jax.lax.scan(add, jnp.zeros((R, S), jnp.float32), arms)[0]


def _merged(a):
    return a.reshape(-1, a.shape[-1])


def _repeated(scales, size):
    """Repeat block scales along the last axis so that each of the `size` numbers has its scale."""
    return jnp.repeat(scales, size // scales.shape[-1], axis=-1)
