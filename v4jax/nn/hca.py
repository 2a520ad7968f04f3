"""Heavily compressed attention (spec 2.7): a query attends all visible entries, which are few."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.nn import qdq
from v4jax.nn.attention import MAX_DECODE_QUERIES, SlidingWindowAttention, SoftmaxPartial, attend
from v4jax.nn.compressor import Compressor
from v4jax.nn.indexer import causal_mask
from v4jax.nn.kv_cache_interface import EntryReader, ForwardBatch, LayerCache

_MAX_SINGLE_PASS = 1024  # up to this many entries are read at once, more in pieces up to the last visible one
_FEW_PIECE = 1024  # entries per read in a decode step, where the logits of few queries take little memory


class HeavilyCompressedAttention(SlidingWindowAttention):
    """A window layer that also attends all its compressed entries."""

    kind = "hca"
    piece = 256  # entries per read in a prefill

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
        readable = self.entry_mask(seq_index_BT, segments_BT, view)
        if view.size <= _MAX_SINGLE_PASS:
            return attend(q_BTNH, view.read_entries(0, view.size), readable(0, view.size))[0], None, view
        size = self.piece if seq_index_BT.shape[1] > MAX_DECODE_QUERIES else _FEW_PIECE
        read = lambda i: attend(q_BTNH, view.read_entries(i * size, size), readable(i * size, size))[0]
        last = -(-self.num_visible(seq_index_BT) // size)
        return jax.lax.fori_loop(1, last, lambda i, part: part.merge(read(i)), read(0)), None, view

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
