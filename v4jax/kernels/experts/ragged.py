"""Expert products by `lax.ragged_dot` over tokens sorted by expert: the accelerators' path."""

import jax
import jax.numpy as jnp

from v4jax.kernels.experts.activation import swiglu
from v4jax.kernels.fp8 import gradient_rows, with_rows


def experts(x_BD, picks_BK, weights_BK, gate_up_EDUF, down_EFD, *, limit, fp8=False):
    """See `api.experts`; float32 accumulation, float32 result [B, D]."""
    (B, D), K, (E, _, _, F) = x_BD.shape, picks_BK.shape[1], gate_up_EDUF.shape
    order = jnp.argsort(picks_BK.reshape(-1), stable=True)  # rows (token, pick), expert by expert
    sizes_E = jnp.bincount(picks_BK.reshape(-1), length=E).astype(jnp.int32)
    x = x_BD[order // K]
    gate_up = jax.lax.ragged_dot(
        x, gate_up_EDUF.reshape(E, D, 2 * F).astype(x.dtype), sizes_E, preferred_element_type=jnp.float32
    )
    gate_up = gate_up.reshape(-1, 2, F)
    h = swiglu(gradient_rows(gate_up) if fp8 else gate_up, limit) * weights_BK.reshape(-1)[order][:, None]
    h = with_rows(h) if fp8 else h
    y = jax.lax.ragged_dot(h.astype(x.dtype), down_EFD.astype(x.dtype), sizes_E, preferred_element_type=jnp.float32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(B * K))  # inverse permutation: gather back, no scatter-add
    return y[place].reshape(B, K, D).sum(1)
