"""Reference of the grouped expert MLP: all experts for all tokens in float32; experts not chosen have weight zero."""

import jax
import jax.numpy as jnp

from v4jax.kernels.fp8_dot import gradient_rows, round_rows
from v4jax.kernels.grouped_mlp.swiglu import swiglu


def experts(x_BD, picks_BK, weights_BK, gate_up_EUDF, down_EFD, *, limit, fp8=False):
    """Sum weight * W2 (silu(min(W1 x, limit)) * clip(W3 x, -limit, limit)) over each token's experts (spec 3.2).

    See `api.experts` for the arguments. Returns float32 [B, D].
    """
    x, gate_up, down = (a.astype(jnp.float32) for a in (x_BD, gate_up_EUDF, down_EFD))
    weight_BE = (jax.nn.one_hot(picks_BK, gate_up.shape[0]) * weights_BK[..., None]).sum(1)
    gate_up_BEUF = jnp.einsum("BD,EUDF->BEUF", x, gate_up)
    h_BEF = swiglu(gradient_rows(gate_up_BEUF) if fp8 else gate_up_BEUF, limit) * weight_BE[..., None]
    return jnp.einsum("BEF,EFD->BD", round_rows(h_BEF) if fp8 else h_BEF, down)
