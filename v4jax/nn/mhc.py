"""Manifold-constrained hyper-connections (spec 4): X residual streams, read, written and mixed per token."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v4jax import config
from v4jax.kernels.sinkhorn import sinkhorn
from v4jax.kernels.tuning import tuned
from v4jax.nn.linear import normal_param, param


def _mean(n: int) -> np.ndarray:
    """Return n logits whose sigmoid is 1 / n; for n = 1 the sigmoid is 0.98, because it cannot reach 1."""
    return np.full(n, -np.log(max(n - 1, 0.02)))


def _coefficients(x_BTXD: jax.Array, fn_MXD: jax.Array, rms_norm_eps: float) -> jax.Array:
    """Return `(fn vec(X)) * rsqrt(mean(vec(X)^2) + eps)`, float32 [M, B, T].

    The coefficient axis M comes first, so that elementwise work runs over tokens. It comes first in fn too: XLA:CPU is
    slower on the weight gradient of a matmul with few output columns than on one with few output rows.
    """
    x = x_BTXD.astype(jnp.float32)
    inverse_rms_BT = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=(-2, -1)) + rms_norm_eps)
    # Merge streams and hidden size into one axis V = X D. Otherwise XLA transposes and copies the weight in each call.
    fn_MV, x_BTV = fn_MXD.astype(jnp.float32).reshape(fn_MXD.shape[0], -1), x.reshape(*x.shape[:2], -1)
    # For few tokens XLA:CPU is faster with the weight as the left operand, for more with the tokens.
    if x.shape[0] * x.shape[1] <= tuned("mhc")["max_tokens_weight_left"]:
        return jnp.einsum("MV,BTV->MBT", fn_MV, x_BTV) * inverse_rms_BT
    return jnp.moveaxis(jnp.einsum("BTV,MV->BTM", x_BTV, fn_MV), -1, 0) * inverse_rms_BT


class HyperConnection(nnx.Module):
    """Coefficients of one sublayer: weights of its input, of its output, and of the mix of the streams."""

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        n = model.mhc.hc_mult
        self.streams = n
        self.iters = model.mhc.hc_sinkhorn_iters
        self.eps = model.mhc.hc_eps
        self.rms_norm_eps = model.rms_norm_eps
        # Start near a plain residual network (spec 4.5): read is 1 / n, write is 1, mix is close to the identity.
        read, write, mix = _mean(n), np.zeros(n), 4.0 * np.eye(n)
        self.fn = normal_param(rngs, "MXD", (2 * n + n * n, n, model.hidden_size), model.initializer_range)
        self.base = param("M", np.concatenate([read, write, mix.reshape(-1)]))
        self.scale = param("S", np.full(3, 0.1))

    def __call__(self, x_BTXD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return read_XBT, write_XBT and the doubly stochastic mix_XYBT, all float32."""
        n = self.streams
        m = _coefficients(x_BTXD, self.fn[...], self.rms_norm_eps)
        scale, base = self.scale[...].astype(jnp.float32), self.base[...].astype(jnp.float32)[:, None, None]
        read = jax.nn.sigmoid(m[:n] * scale[0] + base[:n]) + self.eps
        write = 2 * jax.nn.sigmoid(m[n : 2 * n] * scale[1] + base[n : 2 * n])
        mix = (m[2 * n :] * scale[2] + base[2 * n :]).reshape(n, n, *m.shape[1:])
        return read, write, sinkhorn(mix, iters=self.iters, eps=self.eps)


class HyperHead(nnx.Module):
    """The weighted sum of the streams before the final norm (spec 4.3)."""

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        n = model.mhc.hc_mult
        self.eps, self.rms_norm_eps = model.mhc.hc_eps, model.rms_norm_eps
        self.fn = normal_param(rngs, "YXD", (n, n, model.hidden_size), model.initializer_range)
        self.base = param("X", _mean(n))
        self.scale = param("S", np.full(1, 0.1))

    def __call__(self, x_BTXD: jax.Array) -> jax.Array:
        """Reduce the streams x_BTXD to x_BTD, in the same dtype."""
        m = _coefficients(x_BTXD, self.fn[...], self.rms_norm_eps)
        scale, base = self.scale[...].astype(jnp.float32), self.base[...].astype(jnp.float32)
        read = jax.nn.sigmoid(m * scale + base[:, None, None])
        return hc_pre(x_BTXD, read + self.eps)


def hc_pre(x_BTXD: jax.Array, read_XBT: jax.Array) -> jax.Array:
    """Return the sublayer's input sum_j read_j X_j [B, T, D], computed in float32 and cast to x's dtype."""
    return jnp.einsum("BTXD,XBT->BTD", x_BTXD.astype(jnp.float32), read_XBT).astype(x_BTXD.dtype)


def hc_post(x_BTXD: jax.Array, y_BTD: jax.Array, write_XBT: jax.Array, mix_XYBT: jax.Array) -> jax.Array:
    """Return X'_k = write_k y + sum_j mix[j, k] X_j. The sum runs over the FIRST index of mix (spec 4.2)."""
    mixed = jnp.einsum("BTXD,XYBT->BTYD", x_BTXD.astype(jnp.float32), mix_XYBT)
    return (mixed + jnp.einsum("BTD,YBT->BTYD", y_BTD.astype(jnp.float32), write_XBT)).astype(x_BTXD.dtype)
