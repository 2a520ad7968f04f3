"""The clamped SwiGLU that routed and shared experts have in common."""

import jax
import jax.numpy as jnp


def swiglu(gate_up_UF: jax.Array, limit: float) -> jax.Array:
    """silu(min(gate, limit)) * clip(up, -limit, limit) of [..., 2, F] (gate first), float32 (spec 3.2).

    The gate is not clipped from below, and both clamps come before the silu and the product.
    """
    gate, up = gate_up_UF[..., 0, :].astype(jnp.float32), gate_up_UF[..., 1, :].astype(jnp.float32)
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)
