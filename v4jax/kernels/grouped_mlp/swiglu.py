"""The clamped SwiGLU of routed and shared experts."""

import jax
import jax.numpy as jnp


def swiglu(gate_up_UF: jax.Array, limit: float) -> jax.Array:
    """Compute silu(min(gate, limit)) * clip(up, -limit, limit) (spec 3.2).

    The gate is not clipped from below. Both clamps are applied before the silu and the product.

    Args:
        gate_up_UF: [..., 2, F], gate first.
        limit: the clamp.

    Returns:
        float32 [..., F].
    """
    gate, up = gate_up_UF[..., 0, :].astype(jnp.float32), gate_up_UF[..., 1, :].astype(jnp.float32)
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)
