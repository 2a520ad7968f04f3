"""Expert products by `lax.ragged_dot` over tokens sorted by expert: the accelerators' path."""

import jax
import jax.numpy as jnp

from v4jax.kernels.experts.activation import swiglu


def experts(x_BD, picks_BK, weights_BK, gate_up_EDUF, down_EFD, *, limit):
    """See `api.experts`; float32 accumulation, float32 result [B, D]."""
    (B, D), K, (E, _, _, F) = x_BD.shape, picks_BK.shape[1], gate_up_EDUF.shape
    order = jnp.argsort(picks_BK.reshape(-1), stable=True)  # rows (token, pick), expert by expert
    sizes_E = jnp.bincount(picks_BK.reshape(-1), length=E).astype(jnp.int32)
    x = x_BD[order // K]
    gate_up = jax.lax.ragged_dot(
        x, gate_up_EDUF.reshape(E, D, 2 * F).astype(x.dtype), sizes_E, preferred_element_type=jnp.float32
    )
    h = swiglu(gate_up.reshape(-1, 2, F), limit) * weights_BK.reshape(-1)[order][:, None]
    y = jax.lax.ragged_dot(h.astype(x.dtype), down_EFD.astype(x.dtype), sizes_E, preferred_element_type=jnp.float32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(B * K))  # inverse permutation: gather back, no scatter-add
    return y[place].reshape(B, K, D).sum(1)
