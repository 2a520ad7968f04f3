"""Compressed sparse attention (spec 2.5, 2.6): queries attend the top-k entries that the indexer selects."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.nn import qdq
from v4jax.nn.attention import IndexerTrace, SoftmaxPartial, attend
from v4jax.nn.hca import HeavilyCompressedAttention
from v4jax.nn.indexer import Indexer, score, score_picked, topk_search
from v4jax.nn.kv_cache_interface import EntryReader, ForwardBatch, LayerCache

# A prefill reads all entries through a mask if there are at most this many entries per top-k index, and gathers the
# top-k entries otherwise. The mask costs matmuls with all entries, the gather costs memory traffic per index. The value
# is an estimate for XLA:CPU, which no benchmark has measured yet.
_DENSE_ENTRIES_PER_PICK = 4


class CompressedSparseAttention(HeavilyCompressedAttention):
    """A layer that attends its window and the `index_topk` entries that its indexer scores highest."""

    kind = "csa"
    piece = 1024  # entries per read in a prefill

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        super().__init__(model, rngs)
        self.indexer = Indexer(model, rngs)

    def append_compressed(self, x_BTD: jax.Array, chunk: ForwardBatch, past: LayerCache) -> LayerCache:
        kv_BCH, windows, past = self.entries(x_BTD, chunk, past)
        # The indexer trains on its own loss alone, and that loss has no gradient for other parameters (spec 8.3).
        index_BCL, _, past = self.indexer.compressor(jax.lax.stop_gradient(x_BTD), chunk, past, "index")
        if self.model.kv_qdq:
            index_BCL = qdq.keys(index_BCL)
        return past.append(kv_BCH, index_BCL, windows, chunk, self.compressor.ratio)

    def indexer_queries(self, x_BTD: jax.Array, low_BTQ: jax.Array, cos_sin) -> tuple[jax.Array, ...]:
        return self.indexer.queries(jax.lax.stop_gradient(x_BTD), jax.lax.stop_gradient(low_BTQ), cos_sin)

    def attend_compressed(
        self, q_BTNH: jax.Array, extra, seq_index_BT, segments_BT, view: EntryReader
    ) -> tuple[SoftmaxPartial, IndexerTrace | None, EntryReader]:
        q_BTJL, w_BTJ = extra
        readable = self.entry_mask(seq_index_BT, segments_BT, view)
        k = min(self.model.indexer.index_topk, view.size)
        if view.size == k > self.piece:  # top-k covers all entries: a dense model, for comparison
            return super().attend_compressed(q_BTNH, extra, seq_index_BT, segments_BT, view)
        if not use_gather(view.size, k, seq_index_BT.shape[1]):
            mask_BTC = readable(0, view.size)
            scores_BTC = score(q_BTJL, w_BTJ, view.read_index_keys(0, view.size))
            if view.size > k:
                mask_BTC &= _topk_mask(jnp.where(mask_BTC, scores_BTC, -jnp.inf), k)
            part, p_BTNC = attend(q_BTNH, view.read_entries(0, view.size), mask_BTC)
            return part, IndexerTrace(scores_BTC, mask_BTC, p_BTNC), view
        picks_BTK = topk_search(q_BTJL, w_BTJ, view, readable, self.num_visible(seq_index_BT), k, self.indexer.raw_fp8)
        mask_BTK = picks_BTK >= 0
        rows_BTKH, after = view.gather_entries(picks_BTK)
        part, p_BTNK = attend(q_BTNH, rows_BTKH, mask_BTK)
        # Score the top-k entries again for the indexer loss: its gradient then needs their keys alone.
        scores_BTK = score_picked(q_BTJL, w_BTJ, view.gather_index_keys(picks_BTK))
        return part, IndexerTrace(scores_BTK, mask_BTK, p_BTNK), after


def use_gather(entries: int, k: int, queries: int) -> bool:
    """Return whether `queries` queries per row gather their k top-k entries; otherwise they read all through a mask."""
    return entries > k and (entries > _DENSE_ENTRIES_PER_PICK * k or queries == 1)


def _topk_mask(scores_BTC: jax.Array, k: int) -> jax.Array:
    """Return the set that `topk_search` selects as a mask, bool [B, T, C].

    The set holds the scores above the k-th highest, and of those equal to it the ones with the lowest index.
    """
    scores = jax.lax.stop_gradient(scores_BTC)
    kth = jax.lax.top_k(scores, k)[0][..., -1:]
    above, equal = scores > kth, scores == kth
    room = k - above.sum(-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= room))
