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
from v4jax.core.pytree import pytree
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

_QUERY_TILE = 128  # queries per tile, rounded down to a multiple of the window, at least one window
_MASKED_MAX = -1e30  # lower bound of the logit maximum; finite, so that a fully masked query sums to 0 and not to NaN
# At or below this many queries per row (a decode step, draft tokens included) the keys are the left matmul operand:
# XLA:CPU would transpose them first as the right operand.
MAX_DECODE_QUERIES = 8
# Up to this many tiles are batched. More tiles are computed one by one, and the backward pass recomputes their softmax.
_MAX_BATCHED_TILES = 8


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
        """Attend in tiles of queries, so that memory grows with tile size times row length, not with its square."""
        window, T = self.model.sliding_window, q_BTNH.shape[1]
        size = window * max(1, _QUERY_TILE // window)  # a tile reads its own rows and the `window` rows before them
        queries = (q_BTNH, chunk.seq_index_BT, chunk.segments_BT, *extra)
        if T <= size:
            o, loss, view = self._attend_tile(queries, rows, past.reader(chunk, self.dtype))
            return o, loss, past.with_reader(view)
        B, tiles, pad = q_BTNH.shape[0], -(-T // size), -T % size
        tiled = lambda a: a.reshape(B, tiles, size, *a.shape[2:])
        split = lambda a: tiled(jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2)))

        def overlapping(a):  # [B, window + T, ...] to [B, tiles, window + size, ...]
            before = tiled(a[:, : tiles * size])[:, :, :window]
            return jnp.concatenate([before, tiled(a[:, window:])], axis=2)

        arguments = (jax.tree.map(split, queries), jax.tree.map(overlapping, rows.padded(pad)))
        if tiles <= _MAX_BATCHED_TILES:  # merge tiles into the batch axis: matmuls read the arrays without a copy
            merged = jax.tree.map(lambda a: a.reshape(B * tiles, *a.shape[2:]), arguments)
            o, loss, _ = self._attend_tile(*merged, past.reader(chunk, self.dtype, times=tiles))
        else:
            view = past.reader(chunk, self.dtype)
            walk = jax.checkpoint(lambda tile: self._attend_tile(*tile, view)[:2])
            out = jax.lax.map(walk, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), arguments))
            o, loss = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(B * tiles, *a.shape[2:]), out)
        join = lambda a: a.reshape(B, tiles * size, *a.shape[2:])[:, :T]
        return join(o), join(loss), past

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
        ago_BTS = seq_index_BT[:, :, None] - rows.seq_index_BS[:, None, :]
        seen_BTS = (ago_BTS >= 0) & (ago_BTS < self.model.sliding_window)
        if segments_BT is not None:
            seen_BTS &= segments_BT[:, :, None] == rows.segments_BS[:, None, :]
        part, scored = attend(q_BTNH, rows.kv_BSH, seen_BTS)[0], None
        if view is not None and view.size:  # size is 0 if a call without history is shorter than one window
            far, scored, view = self.attend_compressed(q_BTNH, extra, seq_index_BT, segments_BT, view)
            part = part.merge(far)
        sink_N1 = self.sink[...].astype(jnp.float32)[:, None]
        peak = jnp.maximum(part.max_BTN1, jax.lax.stop_gradient(sink_N1))
        shrink = jnp.exp(part.max_BTN1 - peak)
        total = part.sum_BTN1 * shrink + jnp.exp(sink_N1 - peak)
        loss_BT = jnp.zeros(seq_index_BT.shape, jnp.float32)
        if scored is not None:
            mass_BTC = jnp.sum(scored.p_BTNC * (jnp.exp(far.max_BTN1 - peak) / total), axis=2)
            loss_BT = index_loss(scored.scores_BTC, scored.mask_BTC, mass_BTC)
        return (part.o_BTNH * (shrink / total)).astype(self.dtype), loss_BT, view


@pytree
class SoftmaxPartial:
    """Unnormalized attention over a subset of the keys, per query and head, all float32.

    Attributes:
        max_BTN1: maximum of the logits. It has no gradient, because no normalized result depends on it.
        sum_BTN1: sum of exp(logit - max).
        o_BTNH: sum of exp(logit - max) times the value.
    """

    max_BTN1: jax.Array
    sum_BTN1: jax.Array
    o_BTNH: jax.Array

    def merge(self, other: SoftmaxPartial) -> SoftmaxPartial:
        """Return the attention over the union of both subsets, which must be disjoint."""
        peak = jnp.maximum(self.max_BTN1, other.max_BTN1)
        a, b = jnp.exp(self.max_BTN1 - peak), jnp.exp(other.max_BTN1 - peak)
        return SoftmaxPartial(peak, self.sum_BTN1 * a + other.sum_BTN1 * b, self.o_BTNH * a + other.o_BTNH * b)


class IndexerTrace(NamedTuple):
    """Inputs of the indexer loss: index scores of entries, mask of the attended ones, and exp(logit - max) of each."""

    scores_BTC: jax.Array
    mask_BTC: jax.Array
    p_BTNC: jax.Array


def attend(q_BTNH: jax.Array, keys: jax.Array, mask_BTS: jax.Array) -> tuple[SoftmaxPartial, jax.Array]:
    """Attend to keys, which are also the values.

    Args:
        q_BTNH: [B, T, N, H], queries.
        keys: [B, S, H] if all queries of a batch row share the keys, or [B, T, S, H] if each query has its own.
        mask_BTS: bool [B, T, S], True for the keys that a query attends.

    Returns:
        The partial softmax and exp(logit - max), float32 [B, T, N, S]. A fully masked query has sum 0.
    """
    letters = "BSH" if keys.ndim == 3 else "BTSH"
    keys = keys.astype(q_BTNH.dtype)
    if q_BTNH.shape[1] <= MAX_DECODE_QUERIES:  # keys as the left operand: see MAX_DECODE_QUERIES
        out = "BSTN" if keys.ndim == 3 else "BTSN"
        logits = jnp.einsum(f"{letters},BTNH->{out}", keys, q_BTNH, preferred_element_type=jnp.float32)
        logits = jnp.moveaxis(logits, out.index("S"), -1)
    else:
        logits = jnp.einsum(f"BTNH,{letters}->BTNS", q_BTNH, keys, preferred_element_type=jnp.float32)
    logits = jnp.where(mask_BTS[:, :, None], logits * q_BTNH.shape[-1] ** -0.5, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.maximum(logits.max(-1, keepdims=True), _MASKED_MAX))
    p_BTNS = jnp.exp(logits - peak)
    o_BTNH = jnp.einsum(f"BTNS,{letters}->BTNH", p_BTNS.astype(keys.dtype), keys, preferred_element_type=jnp.float32)
    return SoftmaxPartial(peak, p_BTNS.sum(-1, keepdims=True), o_BTNH), p_BTNS


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
