"""Compressed sparse attention (spec 2.5, 2.6): queries attend the top-k entries that the indexer selects."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.kernels.attention import SoftmaxPartial, attend, attend_topk, use_gather, use_passes
from v4jax.kernels.indexer import score, score_picked, topk_mask, topk_search
from v4jax.nn import qdq
from v4jax.nn.attention import IndexerTrace
from v4jax.nn.hca import HeavilyCompressedAttention
from v4jax.nn.indexer import Indexer
from v4jax.nn.kv_cache_interface import EntryReader, ForwardBatch, LayerCache


class CompressedSparseAttention(HeavilyCompressedAttention):
    """A layer that attends its window and the `index_topk` entries that its indexer scores highest."""

    kind = "csa"

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
        mask = self.entry_mask(seq_index_BT, segments_BT, view)
        k = min(self.model.indexer.index_topk, view.size)
        if use_passes(view.size, k):  # a dense model, for comparison
            return super().attend_compressed(q_BTNH, extra, seq_index_BT, segments_BT, view)
        if not use_gather(view.size, k, seq_index_BT.shape[1]):
            mask_BTC = mask(0, view.size)
            scores_BTC = score(q_BTJL, w_BTJ, view.read_index_keys(0, view.size))
            if view.size > k:
                mask_BTC &= topk_mask(jnp.where(mask_BTC, scores_BTC, -jnp.inf), k)
            part, p_BTNC = attend(q_BTNH, view.read_entries(0, view.size), mask_BTC)
            return part, IndexerTrace(scores_BTC, mask_BTC, p_BTNC), view
        picks_BTK = topk_search(
            q_BTJL,
            w_BTJ,
            view.read_index_keys,
            mask,
            num_entries=view.size,
            num_visible=self.num_visible(seq_index_BT),
            k=k,
            fp8_queries=self.model.kv_qdq,
        )
        part, p_BTNK, after = attend_topk(q_BTNH, view, picks_BTK)
        # Score the top-k entries again for the indexer loss: its gradient then needs their keys alone.
        scores_BTK = score_picked(q_BTJL, w_BTJ, view.gather_index_keys(picks_BTK))
        return part, IndexerTrace(scores_BTK, picks_BTK >= 0, p_BTNK), after
