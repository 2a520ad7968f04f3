"""Lightning indexer: which compressed entries a query reads (spec 2.6)."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.nn.compressor import Compressor
from v4jax.nn.linear import project, weight
from v4jax.nn.rope import rotate


class Indexer(nnx.Module):
    """Small queries of its own, its own compressed keys, and a weight per head."""

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        heads, dim = model.indexer.heads, model.indexer.head_dim
        self.dtype, self.scale = jnp.dtype(model.dtype), dim**-0.5 * heads**-0.5
        self.q_up = weight(rngs, "QJL", (model.q_rank, heads, dim), model.init_std)
        self.weight = weight(rngs, "DJ", (model.hidden_size, heads), model.init_std)
        self.compressor = Compressor(model, "csa", "L", dim, rngs)

    def queries(self, x_BTD: jax.Array, low_BTQ: jax.Array, cos_sin) -> tuple[jax.Array, jax.Array]:
        """Rotated queries q_BTJL and head weights w_BTJ (float32, scale folded in)."""
        q = rotate(project("BTQ,QJL->BTJL", low_BTQ, self.q_up, self.dtype), cos_sin)
        w = project("BTD,DJ->BTJ", x_BTD, self.weight, self.dtype).astype(jnp.float32) * self.scale
        return q, w


def score(q_BTJL: jax.Array, w_BTJ: jax.Array, keys_BCL: jax.Array) -> jax.Array:
    """I[t, c] = sum_j w[t, j] relu(q[t, j] . k[c]): float32 [B, T, C].

    Entries are the minor axis throughout, and the sum over heads is a product: as a reduction over a middle axis
    XLA:CPU took 17 times as long, half of a prefill.
    """
    dots_BTJC = jnp.einsum("BTJL,BCL->BTJC", q_BTJL, keys_BCL, preferred_element_type=jnp.float32)
    return jnp.einsum("BTJC,BTJ->BTC", jax.nn.relu(dots_BTJC), w_BTJ)


def top(scores_BTC: jax.Array, k: int) -> jax.Array:
    """Indices of the k best entries, int32 [B, T, k], -1 where fewer are visible (score -inf).

    Ties go to the lowest index: relu makes exact zeros common, so the order has to be a rule (spec 11.4).
    """
    scores_BTC = jax.lax.stop_gradient(scores_BTC)
    scores_BTC = jnp.where(scores_BTC == 0, 0.0, scores_BTC)  # top_k sorts -0 below +0; products of relu give both
    values, picks_BTK = jax.lax.top_k(scores_BTC, k)
    return jnp.where(values > -jnp.inf, picks_BTK, -1)


def visible(chunk_order_BT: jax.Array, ratio: int, count: int) -> jax.Array:
    """Entry i is visible to query t when i < (t + 1) // ratio (spec 2.5): bool [B, T, count]."""
    return jnp.arange(count) < ((chunk_order_BT + 1) // ratio)[..., None]
