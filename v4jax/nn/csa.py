"""Compressed sparse attention (spec 2.5, 2.6): overlapped entries, read where the indexer points."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.nn.hca import HCAttention, readable
from v4jax.nn.indexer import Indexer, score, top
from v4jax.nn.state import Chunk, Past

# Reading every entry through a mask costs products with all of them, gathering costs traffic per pick: with up to
# this many entries a pick the mask is taken: an estimate for XLA:CPU, that no bench has measured yet.
_DENSE_ENTRIES_PER_PICK = 4


class CSAttention(HCAttention):
    """A layer that attends its window and the `topk` entries that its indexer scores highest."""

    kind = "csa"

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        super().__init__(model, rngs)
        self.indexer = Indexer(model, rngs)

    def compress(self, x_BTD: jax.Array, chunk: Chunk, past: Past) -> Past:
        kv_BCH, windows, past = self.compressor(x_BTD, chunk, past, "main")
        # The indexer learns from its own loss alone, and moves nothing else (spec 8.3).
        index_BCL, _, past = self.indexer.compressor(jax.lax.stop_gradient(x_BTD), chunk, past, "index")
        return past.extend(kv_BCH, index_BCL, windows, chunk, self.compressor.ratio)

    def queries(self, x_BTD: jax.Array, low_BTQ: jax.Array, cos_sin) -> tuple[jax.Array, ...]:
        return self.indexer.queries(jax.lax.stop_gradient(x_BTD), jax.lax.stop_gradient(low_BTQ), cos_sin)

    def remote(self, extra, order_BT, segments_BT, past: Past):
        q_BTJL, w_BTJ = extra
        entries, count = past.entries, past.entries.kv_BCH.shape[1]
        if not count:
            return None
        mask_BTC = readable(order_BT, segments_BT, past, self.compressor.ratio)
        scores_BTC = jnp.where(mask_BTC, score(q_BTJL, w_BTJ, entries.index_BCL), -jnp.inf)
        k = min(self.model.indexer.topk, count)
        if k == count:
            return entries.kv_BCH, mask_BTC, scores_BTC
        if count <= _DENSE_ENTRIES_PER_PICK * k and order_BT.shape[1] > 1:
            return entries.kv_BCH, mask_BTC & _chosen(scores_BTC, k), scores_BTC
        picks_BTK = top(scores_BTC, k)
        slot_BTK = jnp.maximum(picks_BTK, 0)
        row = jnp.arange(slot_BTK.shape[0])[:, None, None]
        return entries.kv_BCH[row, slot_BTK], picks_BTK >= 0, jnp.take_along_axis(scores_BTC, slot_BTK, axis=-1)


def _chosen(scores_BTC: jax.Array, k: int) -> jax.Array:
    """The set that `top` picks, as a mask: above the k-th score, and of its equals those with the lowest index."""
    scores = jax.lax.stop_gradient(scores_BTC)
    kth = jax.lax.top_k(scores, k)[0][..., -1:]
    above, equal = scores > kth, scores == kth
    room = k - above.sum(-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= room))
