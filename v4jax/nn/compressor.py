"""Compressor: it pools the tokens of a window into one entry, separately for each channel (spec 2.5)."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.nn.kv_cache_interface import CompressionWindows, ForwardBatch, LayerCache
from v4jax.nn.linear import einsum, normal_param, param
from v4jax.nn.norm import RMSNorm
from v4jax.nn.rope import angles, frequencies, rotate


class Compressor(nnx.Module):
    """Projects to values and gates and pools them; `letter` names the width of its entries (H main, L indexer)."""

    def __init__(self, model: config.Model, kind: str, letter: str, size: int, rngs: nnx.Rngs):
        self.ratio, self.overlap, self.size = model.compress_rate(kind), kind == "csa", size
        self.rope, self.qk_rope_head_dim = model.rope, model.qk_rope_head_dim
        width = size * (2 if self.overlap else 1)
        self.kv = normal_param(rngs, "DW", (model.hidden_size, width), model.initializer_range)
        self.gate = normal_param(rngs, "DW", (model.hidden_size, width), model.initializer_range)
        self.ape = param("PW", jnp.zeros((self.ratio, width)))
        self.norm = RMSNorm(letter, size, model.rms_norm_eps)

    def __call__(
        self, x_BTD: jax.Array, chunk: ForwardBatch, past: LayerCache, name: str
    ) -> tuple[jax.Array, CompressionWindows, LayerCache]:
        """Return new entries [B, C, size] in x's dtype, their windows, and the changed cache.

        An entry has the rotary position of its window's first token.
        """
        x = x_BTD.astype(jnp.float32)
        rows = [einsum("BTD,DW->BTW", x, part, jnp.float32) for part in (self.kv, self.gate)]
        windows, past = past.compression_windows(name, jnp.concatenate(rows, axis=-1), chunk, self.ratio, self.overlap)
        if x.shape[1] >= self.ratio:
            return self._entries(windows, x_BTD.dtype), windows, past
        # A call of fewer tokens than a window seldom completes one. Pool only if a row of the batch does.
        shape = jax.eval_shape(lambda: self._entries(windows, x_BTD.dtype))
        skip = lambda: jnp.zeros(shape.shape, shape.dtype)
        return jax.lax.cond(windows.complete_BC.any(), lambda: self._entries(windows, x_BTD.dtype), skip), windows, past

    def _entries(self, windows: CompressionWindows, dtype: jnp.dtype) -> jax.Array:
        """Return the windows pooled, normalized and rotated, [B, C, size]."""
        cos_sin = angles(windows.position_BC, frequencies(self.rope, self.qk_rope_head_dim, compressed=True))
        return rotate(self.norm(self._pool(windows).astype(dtype)), cos_sin)

    def _pool(self, windows: CompressionWindows) -> jax.Array:
        """Pool the values with a softmax of the gates over the window's tokens, per channel (spec 2.5).

        With overlap, one softmax covers two windows: the tokens of the preceding window use channels [0, size), and
        those of this window use channels [size, 2 size).
        """
        width, size = self.ape.shape[1], self.size
        values, gates = windows.now_BCPW[..., :width], windows.now_BCPW[..., width:] + self.ape[...]
        if self.overlap:
            before = windows.before_BCPW
            gates_before = before[..., width : width + size] + self.ape[...][:, :size]
            values = jnp.concatenate([before[..., :size], values[..., size:]], axis=-2)
            gates = jnp.concatenate([gates_before, gates[..., size:]], axis=-2)
        return jnp.sum(jax.nn.softmax(gates, axis=-2) * values, axis=-2)
