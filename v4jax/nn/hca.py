"""Heavily compressed attention (spec 2.7): a query attends all visible entries, which are few."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.kernels.attention import SoftmaxPartial, attend_entries
from v4jax.nn import qdq
from v4jax.nn.attention import SlidingWindowAttention
from v4jax.nn.compressor import Compressor
from v4jax.nn.indexer import causal_mask
from v4jax.nn.kv_cache_interface import EntryReader, ForwardBatch, LayerCache


class HeavilyCompressedAttention(SlidingWindowAttention):
    """A window layer that also attends all its compressed entries."""

    kind = "hca"

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        super().__init__(model, rngs)
        self.compressor = Compressor(model, self.kind, "H", model.head_dim, rngs)

    def append_compressed(self, x_BTD: jax.Array, chunk: ForwardBatch, past: LayerCache) -> LayerCache:
        kv_BCH, windows, past = self.entries(x_BTD, chunk, past)
        return past.append(kv_BCH, None, windows, chunk, self.compressor.ratio)

    def entries(self, x_BTD: jax.Array, chunk: ForwardBatch, past: LayerCache):
        """Return the call's main entries [B, C, H] as the cache stores them, their windows, and the changed cache."""
        kv_BCH, windows, past = self.compressor(x_BTD, chunk, past, "main")
        return qdq.entries(kv_BCH, self.model.qk_rope_head_dim) if self.model.kv_qdq else kv_BCH, windows, past

    def attend_compressed(
        self, q_BTNH: jax.Array, extra, seq_index_BT, segments_BT, view: EntryReader
    ) -> tuple[SoftmaxPartial, None, EntryReader]:
        mask, num_visible = self.entry_mask(seq_index_BT, segments_BT, view), self.num_visible(seq_index_BT)
        return attend_entries(q_BTNH, view, mask, num_visible, kind=self.kind), None, view

    def entry_mask(self, seq_index_BT: jax.Array, segments_BT: jax.Array | None, view: EntryReader):
        """Return a function (first, count) to bool [B, T, count]: True for complete entries of the query's document."""

        def mask(first, count):
            mask_BTC = causal_mask(seq_index_BT, self.compressor.ratio, first, count)
            if segments_BT is not None:
                mask_BTC &= segments_BT[:, :, None] == entry_segments(view, first, count)[:, None, :]
            return mask_BTC

        return mask

    def num_visible(self, seq_index_BT: jax.Array) -> jax.Array:
        """Return the number of entries that the last query sees, int32 scalar; later entries need not be read."""
        return (seq_index_BT.max() + 1) // self.compressor.ratio


def entry_segments(view: EntryReader, first, count: int) -> jax.Array:
    """Return the documents of `count` entries from `first` on, int32 [B, count]."""
    if count == view.size:
        return view.segments_BC
    return jnp.take(view.segments_BC, first + jnp.arange(count), axis=1, mode="clip")
