"""Grouped expert MLP by `lax.ragged_dot` over tokens sorted by expert, for TPU and GPU."""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.fp8_dot import gradient_rows, round_rows
from v4jax.kernels.grouped_mlp.swiglu import swiglu


def experts(x_BD, picks_BK, weights_BK, gate_up_EUDF, down_EFD, *, limit, fp8=False):
    """See `api.experts`. Products accumulate in float32."""
    (B, D), K, E = x_BD.shape, picks_BK.shape[1], down_EFD.shape[0]
    order = jnp.argsort(picks_BK.reshape(-1), stable=True)  # rows (token, top-k index) sorted by expert
    sizes_E = jnp.bincount(picks_BK.reshape(-1), length=E).astype(jnp.int32)
    x = x_BD[order // K]
    gate_up = _both(x, gate_up_EUDF.astype(x.dtype), sizes_E)
    h = swiglu(gradient_rows(gate_up) if fp8 else gate_up, limit) * weights_BK.reshape(-1)[order][:, None]
    h = round_rows(h) if fp8 else h
    y = _dot(h.astype(x.dtype), down_EFD.astype(x.dtype), sizes_E)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(B * K))  # inverse permutation: gather, not scatter-add
    return y[place].reshape(B, K, D).sum(1)


def _dot(x_RD, w_EDF, sizes_E):
    return jax.lax.ragged_dot(x_RD, w_EDF, sizes_E, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _both(x_RD, w_EUDF, sizes_E):
    """Return the gate and up products, float32 [R, 2, F]."""
    return jnp.stack([_half(x_RD, w_EUDF, sizes_E, u) for u in range(2)], 1)


def _half(x_RD, w_EUDF, sizes_E, u):
    """Return the gate product (u = 0) or the up product (u = 1), float32 [R, F].

    `ragged_dot` gets all 2 E matrices, and those of the other half get zero rows. So the weights are read in place,
    while a slice would copy half of the weights of all experts.
    """
    E, U, D, F = w_EUDF.shape
    sizes_2E = jnp.zeros((E, U), jnp.int32).at[:, u].set(sizes_E).reshape(-1)
    return _dot(x_RD, w_EUDF.reshape(E * U, D, F), sizes_2E)


def _save(*arguments):
    return _both(*arguments), arguments


def _gradients(saved, dy_RUF):
    """Compute the weight gradients by two products of E groups each.

    The transpose of `_half` would compute 2 E groups for each of the two, half of them zeros.
    """
    x_RD, w_EUDF, sizes_E = saved
    E, U, D, F = w_EUDF.shape
    product = jax.linear_transpose(lambda w: _dot(x_RD, w, sizes_E), jax.ShapeDtypeStruct((E, D, F), w_EUDF.dtype))
    dx_RD, dw = 0, []
    for u in range(U):
        half = functools.partial(_half, w_EUDF=w_EUDF, sizes_E=sizes_E, u=u)
        dx_RD += jax.linear_transpose(half, x_RD)(dy_RUF[:, u])[0]
        dw += product(dy_RUF[:, u])
    return dx_RD, jnp.stack(dw, 1), None


_both.defvjp(_save, _gradients)
