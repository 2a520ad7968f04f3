"""Attention of a V4 layer (spec 2.3): shared key-value head, low-rank queries, sliding window, sinks.

`SlidingWindowAttention` implements pure sliding-window layers. CSA and HCA layers override three methods:
`append_compressed` adds the call's entries to the cache, `indexer_queries` computes the indexer's inputs, and
`attend_compressed` attends a tile of queries to the compressed entries.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.kernels.attention import SoftmaxPartial, attend_window, map_query_tiles
from v4jax.nn import qdq
from v4jax.nn.kv_cache_interface import (
    NO_TOKEN,
    DenseEntries,
    EntryReader,
    ForwardBatch,
    LayerCache,
    NoCache,
    WindowKV,
)
from v4jax.nn.linear import einsum, normal_param, param
from v4jax.nn.norm import RMSNorm, rms
from v4jax.nn.rope import angles, frequencies, rotate
from v4jax.parallel.context_parallel import ContextShards, active_context_shards


class SlidingWindowAttention(nnx.Module):
    """Steps 1 to 13 of spec 2.3 for a layer of kind `swa`."""

    kind = "swa"

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        self.model, self.dtype = model, jnp.dtype(model.dtype)
        m, std = model, model.initializer_range
        group_in = m.num_attention_heads // m.o_groups * m.head_dim
        self.q_down = normal_param(rngs, "DQ", (m.hidden_size, m.q_lora_rank), std)
        self.q_norm = RMSNorm("Q", m.q_lora_rank, m.rms_norm_eps)
        self.q_up = normal_param(rngs, "QNH", (m.q_lora_rank, m.num_attention_heads, m.head_dim), std)
        self.kv = normal_param(rngs, "DH", (m.hidden_size, m.head_dim), std)
        self.kv_norm = RMSNorm("H", m.head_dim, m.rms_norm_eps)
        self.sink = param("N", jnp.zeros(m.num_attention_heads))
        self.o_down = normal_param(rngs, "GIR", (m.o_groups, group_in, m.o_lora_rank), std)
        self.o_up = normal_param(rngs, "GRD", (m.o_groups, m.o_lora_rank, m.hidden_size), std)

    def __call__(
        self, x_BTD: jax.Array, chunk: ForwardBatch, past: LayerCache
    ) -> tuple[jax.Array, LayerCache, jax.Array]:
        """Apply attention to the normalized sublayer input.

        Args:
            x_BTD: [B, T, D], sublayer input.
            chunk: the tokens of the call.
            past: the layer's cache before the call.

        Returns:
            y_BTD in the compute dtype, the cache with this call's tokens, and the indexer loss of each query, float32
            [B, T] (0 in layers without an indexer).
        """
        m, (B, T, _) = self.model, x_BTD.shape
        cos_sin = angles(chunk.positions_BT, frequencies(m.rope, m.qk_rope_head_dim, compressed=self.kind != "swa"))
        cos_sin_heads = tuple(a[:, :, None] for a in cos_sin)
        low_BTQ = self.q_norm(einsum("BTD,DQ->BTQ", x_BTD, self.q_down, self.dtype))
        q_BTNH = rms(einsum("BTQ,QNH->BTNH", low_BTQ, self.q_up, self.dtype), m.rms_norm_eps)
        q_BTNH = rotate(q_BTNH, cos_sin_heads)
        kv_BTH = rotate(self.kv_norm(einsum("BTD,DH->BTH", x_BTD, self.kv, self.dtype)), cos_sin)
        if m.kv_qdq:
            kv_BTH = qdq.entries(kv_BTH, m.qk_rope_head_dim)
        rows, past = past.update_window(kv_BTH, chunk, m.sliding_window)
        past = self.append_compressed(x_BTD, chunk, past)
        extra = self.indexer_queries(x_BTD, low_BTQ, cos_sin_heads)
        if (split := active_context_shards()) is None:
            o_BTNH, loss_BT, past = self._attend(q_BTNH, extra, rows, chunk, past)
        else:
            own = WindowKV(kv_BTH, chunk.seq_index_BT, chunk.segments_BT)
            o_BTNH, loss_BT = self._attend_context_parallel(split, q_BTNH, extra, own, past.reader(chunk, self.dtype))
        o_BTNH = rotate(o_BTNH, cos_sin_heads, inverse=True)
        o_BTGI = o_BTNH.reshape(B, T, m.o_groups, -1)
        z_BTGR = einsum("BTGI,GIR->BTGR", o_BTGI, self.o_down, self.dtype)
        return einsum("BTGR,GRD->BTD", z_BTGR, self.o_up, self.dtype), past, loss_BT

    def append_compressed(self, x_BTD: jax.Array, chunk: ForwardBatch, past: LayerCache) -> LayerCache:
        """Return the cache with this call's compressed entries; a window layer has none."""
        return past

    def indexer_queries(self, x_BTD: jax.Array, low_BTQ: jax.Array, cos_sin) -> tuple[jax.Array, ...]:
        """Return the arrays [B, T, ...] that `attend_compressed` gets as `extra`; a window layer has none."""
        return ()

    def attend_compressed(
        self, q_BTNH: jax.Array, extra, seq_index_BT, segments_BT, view: EntryReader
    ) -> tuple[SoftmaxPartial, IndexerTrace | None, EntryReader]:
        """Attend a tile of queries to the compressed entries of `view`.

        Returns:
            The partial softmax, the indexer trace (None without an indexer), and the reader after the reads.
        """
        raise NotImplementedError("a window layer keeps no entries")

    def _attend(
        self, q_BTNH, extra, rows: WindowKV, chunk: ForwardBatch, past: LayerCache
    ) -> tuple[jax.Array, jax.Array, LayerCache]:
        """Attend in tiles of queries. Only reads of a single tile change the cache."""
        queries = (q_BTNH, chunk.seq_index_BT, chunk.segments_BT, *extra)
        reader = lambda times: past.reader(chunk, self.dtype, times)
        o, loss, view = map_query_tiles(self._attend_tile, queries, rows, reader, self.model.sliding_window)
        return o, loss, past if view is None else past.with_reader(view)

    def _attend_context_parallel(
        self, split: ContextShards, q_BTNH, extra, rows: WindowKV, entries: DenseEntries | None
    ):
        """Apply `_attend` with the tokens of a row split over devices (context parallelism).

        A shard needs the last `window` rows of the preceding shard, and the entries of all shards.
        """
        m = self.model
        split.check(q_BTNH.shape[1], m.alignment, m.sliding_window)

        def one(queries, rows: WindowKV, entries):
            (q_BTNH, *extra), B = queries, queries[0].shape[0]
            empty = jax.tree.map(jnp.zeros_like, jax.tree.map(lambda a: a[:, : m.sliding_window], rows))
            empty = dataclasses.replace(empty, seq_index_BS=jnp.full((B, m.sliding_window), NO_TOKEN, jnp.int32))
            join = lambda *both: jnp.concatenate(both, axis=1)
            near = jax.tree.map(join, split.halo_left(rows, m.sliding_window, empty), rows)
            chunk = ForwardBatch(rows.seq_index_BS, rows.seq_index_BS, rows.seq_index_BS, rows.segments_BS)
            return self._attend(q_BTNH, tuple(extra), near, chunk, NoCache(split.all_gather(entries)))[:2]

        return split.run(one, (q_BTNH, *extra), rows, entries)

    def _attend_tile(
        self, queries, rows: WindowKV, view: EntryReader | None
    ) -> tuple[jax.Array, jax.Array, EntryReader | None]:
        """Compute one softmax over window rows, compressed entries and the sink (spec 2.3, steps 9 to 11)."""
        q_BTNH, seq_index_BT, segments_BT, *extra = queries
        index, segments = (seq_index_BT, rows.seq_index_BS), (segments_BT, rows.segments_BS)
        part = attend_window(q_BTNH, rows.kv_BSH, *index, *segments, window=self.model.sliding_window)
        scored = None
        if view is not None and view.size:  # size is 0 if a call without history is shorter than one window
            far, scored, view = self.attend_compressed(q_BTNH, extra, seq_index_BT, segments_BT, view)
            part = part.merge(far)
        o_BTNH, max_BTN1, sum_BTN1 = part.normalize(self.sink[...])
        loss_BT = jnp.zeros(seq_index_BT.shape, jnp.float32)
        if scored is not None:
            mass_BTC = jnp.sum(scored.p_BTNC * (jnp.exp(far.max_BTN1 - max_BTN1) / sum_BTN1), axis=2)
            loss_BT = index_loss(scored.scores_BTC, scored.mask_BTC, mass_BTC)
        return o_BTNH.astype(self.dtype), loss_BT, view


class IndexerTrace(NamedTuple):
    """Inputs of the indexer loss: index scores of entries, mask of the attended ones, and exp(logit - max) of each."""

    scores_BTC: jax.Array
    mask_BTC: jax.Array
    p_BTNC: jax.Array


def index_loss(scores_BTC: jax.Array, mask_BTC: jax.Array, mass_BTC: jax.Array) -> jax.Array:
    """Return KL(teacher || softmax of the index scores) over the entries that a query attends, float32 [B, T].

    The teacher is the attention mass that the joint softmax (window, entries and sink) gives to each entry, summed
    over heads and renormalized over the entries (spec 8.3). No gradient reaches the teacher.
    """
    mass = jax.lax.stop_gradient(mass_BTC)
    sum_BT1 = mass.sum(-1, keepdims=True)
    target = mass / jnp.maximum(sum_BT1, 1e-20)
    log_p = jax.nn.log_softmax(jnp.where(mask_BTC, scores_BTC, -1e30), axis=-1)
    terms = jnp.where(mask_BTC & (target > 0), target * (jnp.log(jnp.maximum(target, 1e-30)) - log_p), 0.0)
    return terms.sum(-1)
