"""Lightning indexer: it selects the compressed entries that a query attends (spec 2.6)."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.nn import qdq
from v4jax.nn.compressor import Compressor
from v4jax.nn.linear import einsum, normal_param
from v4jax.nn.rope import rotate


class Indexer(nnx.Module):
    """Low-dimensional queries, compressed index keys and a weight per head, all separate from the attention."""

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        heads, dim = model.indexer.index_n_heads, model.indexer.index_head_dim
        self.rounded, self.dtype, self.scale = model.kv_qdq, jnp.dtype(model.dtype), dim**-0.5 * heads**-0.5
        self.q_up = normal_param(rngs, "QJL", (model.q_lora_rank, heads, dim), model.initializer_range)
        self.weight = normal_param(rngs, "DJ", (model.hidden_size, heads), model.initializer_range)
        self.compressor = Compressor(model, "csa", "L", dim, rngs)

    def queries(self, x_BTD: jax.Array, low_BTQ: jax.Array, cos_sin) -> tuple[jax.Array, jax.Array]:
        """Return rotated queries q_BTJL and head weights w_BTJ, which are float32 and include the scale."""
        q = rotate(einsum("BTQ,QJL->BTJL", low_BTQ, self.q_up, self.dtype), cos_sin)
        if self.rounded:
            q = qdq.keys(q)
        w = einsum("BTD,DJ->BTJ", x_BTD, self.weight, self.dtype).astype(jnp.float32) * self.scale
        return q, w


def causal_mask(seq_index_BT: jax.Array, ratio: int, first: jax.Array | int, count: int) -> jax.Array:
    """Return bool [B, T, count], True if a query sees the entry, for entries from `first` on.

    Query t sees entry i if i < (t + 1) // ratio (spec 2.5).
    """
    return first + jnp.arange(count) < ((seq_index_BT + 1) // ratio)[..., None]
