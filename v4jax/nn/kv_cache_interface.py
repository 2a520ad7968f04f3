"""What a layer keeps of the tokens it has seen, and the one interface through which attention reads it.

Attention never knows where its past lies. It asks a `LayerCache` for the rows of the sliding window and for the compression
windows that a call completes, gives it the new entries, and reads the entries through a `EntryReader`: by index, in runs of
consecutive ones or picked one by one. Two implementations here:

* `NoCache`: the call is the whole history (training, scoring). Nothing outlives the call.
* `PagedLayerCache`: arrays that outlive the call (generation). What is of fixed size a row (window, compressor tails) lies in
  numbered *records*, the entries lie in numbered *pages*; `ForwardBatch.place` says which ones a row of the batch owns. Rows
  may differ in length. A decode step touches the window, the picked entries and the indexer keys, nothing else.

Both are pytrees and are passed in and out of the forward explicitly. `PagedLayerCache` is in `cache/paged_cache.py`, pools of pages that
quantize are in `cache/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from v4jax.core.pytree import pytree
from v4jax.core.qtensor import QTensor
from v4jax.parallel.context_parallel import active_context_shards

NO_TOKEN = -(2**30)  # order of a row that holds nothing: before every window


@pytree
class CacheSlots:
    """Where the rows of a batch lie in a `PagedLayerCache` state.

    state_slot_B int32: record of each row. block_table_BA int32: page of each run of tokens, in order; -1 where a row has none:
    nothing is written there, and what is read there is page 0 and visible to nobody.
    """

    state_slot_B: jax.Array
    block_table_BA: jax.Array


@pytree
class ForwardBatch:
    """The tokens of one call.

    tokens_BT int32; positions_BT int32 (rotary position: inside the document); seq_index_BT int32 (place in the row's
    history, which decides who sees whom); segments_BT int32 or None (document of each token, 0 = padding);
    count_B int32 or None (tokens of each row that are real; the rest is padding on the right, None = all);
    place or None (row b has record b and page b alone).
    """

    tokens_BT: jax.Array
    positions_BT: jax.Array
    seq_index_BT: jax.Array
    segments_BT: jax.Array | None = None
    num_valid_B: jax.Array | None = None
    cache_slots: CacheSlots | None = None

    @property
    def start_B(self) -> jax.Array:
        """Tokens seen before this call."""
        return self.seq_index_BT[:, 0]

    @property
    def valid_BT(self) -> jax.Array | None:
        """Which tokens are real: not padding, and of a row that has a page, or it is nobody's; None: all are."""
        valid_BT = None
        if self.num_valid_B is not None:
            valid_BT = jnp.arange(self.tokens_BT.shape[1]) < self.num_valid_B[:, None]
        if self.cache_slots is not None:
            owned_B1 = self.cache_slots.block_table_BA[:, :1] >= 0
            valid_BT = jnp.broadcast_to(owned_B1, self.tokens_BT.shape) if valid_BT is None else valid_BT & owned_B1
        return valid_BT

    @property
    def slots(self) -> CacheSlots:
        """`place`, or the one that None stands for."""
        row = jnp.arange(self.tokens_BT.shape[0], dtype=jnp.int32)
        return self.cache_slots or CacheSlots(row, row[:, None])


@pytree
class WindowKV:
    """Keys (= values) of single tokens: kv_BSH, their seq_index_BS, and segments_BS where documents are packed."""

    kv_BSH: jax.Array
    seq_index_BS: jax.Array
    segments_BS: jax.Array | None = None

    def padded(self, count: int) -> WindowKV:
        """With `count` rows appended that no query sees."""
        after = ((0, 0), (0, count))
        segments = None if self.segments_BS is None else jnp.pad(self.segments_BS, after)
        return WindowKV(
            jnp.pad(self.kv_BSH, (*after, (0, 0))),
            jnp.pad(self.seq_index_BS, after, constant_values=NO_TOKEN),
            segments,
        )


@pytree
class CompressionWindows:
    """Compression windows that this call may complete: `now` and (overlapped layers) the one `before` each.

    now_BCPW, before_BCPW or None; index_BC int32 is the entry's index in the row; position_BC int32 the rotary position
    of its first token; complete_BC bool says whether its last token has been seen.
    """

    now_BCPW: jax.Array
    before_BCPW: jax.Array | None
    index_BC: jax.Array
    position_BC: jax.Array
    complete_BC: jax.Array


class EntryReader(Protocol):
    """The entries of a layer, read by index: what a block of queries sees of its past.

    size: entries there is room for. `rows` and `keys` give main entries [B, count, H] and indexer keys [B, count, L]
    from index `first` on (any int32; what lies beyond the room is some row); `take_rows` and `take_keys` those at
    pick_BTK int32, [B, T, K, ...], some finite row where that is negative; `take_rows` with the view after it, for a
    past may keep what it fetched. With `coded`, keys that are stored in e4m3 come as they are. segments_BC: their
    documents, where packed.
    """

    size: int
    segments_BC: jax.Array | None

    def read_entries(self, first: jax.Array, count: int) -> jax.Array: ...
    def read_index_keys(self, first: jax.Array, count: int, coded: bool = False) -> jax.Array | QTensor: ...
    def gather_entries(self, pick_BTK: jax.Array) -> tuple[jax.Array, EntryReader]: ...
    def gather_index_keys(self, pick_BTK: jax.Array) -> jax.Array: ...


class LayerCache(Protocol):
    """What a layer keeps, as attention uses it; every method that adds something returns the past with it.

    window: rows [B, S] that include the last `size` tokens before the call and the call's own. windows: those of
    compressor `name` that may end inside the call. extend: add what was pooled from them. view: to read the entries,
    every batch row `times` times, in `dtype`; None if the layer has none. after: the past once such a view, of the rows
    as they are, was read. settled: what outlives the call, once the layer's output `done` is there.
    """

    def update_window(self, kv_BTH: jax.Array, chunk: ForwardBatch, size: int) -> tuple[WindowKV, LayerCache]: ...
    def compression_windows(
        self, name: str, rows_BTW: jax.Array, chunk: ForwardBatch, ratio: int, overlap: bool
    ) -> tuple[CompressionWindows, LayerCache]: ...
    def append(
        self,
        kv_BCH: jax.Array,
        index_BCL: jax.Array | None,
        windows: CompressionWindows,
        chunk: ForwardBatch,
        ratio: int,
    ) -> LayerCache: ...
    def reader(self, chunk: ForwardBatch, dtype: jnp.dtype, times: int = 1) -> EntryReader | None: ...
    def with_reader(self, view: EntryReader | None) -> LayerCache: ...
    def commit(self, done: jax.Array) -> LayerCache: ...


@pytree
class DenseEntries:
    """A `EntryReader` of contiguous arrays: kv_BCH, indexer keys index_BCL (CSA), and segments_BC where packed."""

    kv_BCH: jax.Array
    index_BCL: jax.Array | None = None
    segments_BC: jax.Array | None = None

    @property
    def size(self) -> int:
        return self.kv_BCH.shape[1]

    def read_entries(self, first, count):
        return _run(self.kv_BCH, first, count)

    def read_index_keys(self, first, count, coded=False):
        return _run(self.index_BCL, first, count)

    def gather_entries(self, pick_BTK):
        return _picked(self.kv_BCH, pick_BTK), self

    def gather_index_keys(self, pick_BTK):
        return _picked(self.index_BCL, pick_BTK)


@pytree
class NoCache:
    """No past: the call's own tokens are all there is. Documents start at multiples of the compression ratios."""

    entries: DenseEntries | None = None

    def update_window(self, kv_BTH: jax.Array, chunk: ForwardBatch, size: int) -> tuple[WindowKV, NoCache]:
        """`size` empty rows, then the call's rows."""
        before = ((0, 0), (size, 0))
        rows = WindowKV(
            jnp.pad(kv_BTH, (*before, (0, 0))),
            jnp.pad(chunk.seq_index_BT, before, constant_values=NO_TOKEN),
            None if chunk.segments_BT is None else jnp.pad(chunk.segments_BT, before),
        )
        return rows, self

    def compression_windows(
        self, name: str, rows_BTW: jax.Array, chunk: ForwardBatch, ratio: int, overlap: bool
    ) -> tuple[CompressionWindows, NoCache]:
        """Whole windows by reshape; `rows` hold values and gates side by side (gates: second half of W)."""
        B, T, W = rows_BTW.shape
        count = T // ratio
        now = rows_BTW[:, : count * ratio].reshape(B, count, ratio, W)
        first = lambda a_BT: a_BT[:, : count * ratio].reshape(B, count, ratio)[:, :, 0]
        before = None
        if overlap:
            before = _previous(now, identity_window)
            if chunk.segments_BT is not None:
                segment_BC = first(chunk.segments_BT)
                starts = segment_BC != _previous(segment_BC, jnp.zeros_like)
                before = jnp.where(starts[..., None, None], identity_window(before), before)
        index = jnp.broadcast_to(jnp.arange(count), (B, count))
        return CompressionWindows(now, before, index, first(chunk.positions_BT), jnp.ones_like(index, bool)), self

    def append(
        self,
        kv_BCH: jax.Array,
        index_BCL: jax.Array | None,
        windows: CompressionWindows,
        chunk: ForwardBatch,
        ratio: int,
    ) -> NoCache:
        """Keep the call's entries for the call itself."""
        (B, count), segments = kv_BCH.shape[:2], chunk.segments_BT
        if segments is not None:
            segments = segments[:, : count * ratio].reshape(B, count, ratio)[:, :, 0]
        return NoCache(DenseEntries(kv_BCH, index_BCL, segments))

    def reader(self, chunk: ForwardBatch, dtype: jnp.dtype, times: int = 1) -> DenseEntries | None:
        """The call's entries, every row `times` times."""
        return jax.tree.map(lambda a: jnp.repeat(a, times, axis=0) if times > 1 else a, self.entries)

    def with_reader(self, view: DenseEntries | None) -> NoCache:
        """Reading changes nothing."""
        return self

    def commit(self, done: jax.Array) -> NoCache:
        """What outlives the call: nothing."""
        return NoCache()


def _previous(a_BC: jax.Array, empty: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Of each entry the one before it, and `empty` of an entry for the first."""
    shifted = lambda a, before: jnp.concatenate([before, a[:, :-1]], axis=1)
    if (split := active_context_shards()) is None:
        return shifted(a_BC, empty(a_BC[:, :1]))
    return split.run(lambda a: shifted(a, split.halo_left(a, 1, empty(a[:, :1]))), a_BC)


def _run(rows_BCH: jax.Array, first: jax.Array | int, count: int) -> jax.Array:
    """`count` rows from `first` on; beyond the end, the last one."""
    size = rows_BCH.shape[1]
    return rows_BCH if count == size else rows_BCH[:, jnp.minimum(first + jnp.arange(count), size - 1)]


def _picked(rows_BCH: jax.Array, pick_BTK: jax.Array) -> jax.Array:
    """Rows of each batch row's own array: [B, T, K, H]; the first one for negative numbers."""
    return rows_BCH[jnp.arange(pick_BTK.shape[0])[:, None, None], jnp.maximum(pick_BTK, 0)]


def identity_window(rows_BCPW: jax.Array) -> jax.Array:
    """Rows that vanish in the pooling: value 0, gate -inf."""
    half = rows_BCPW.shape[-1] // 2
    return jnp.broadcast_to(jnp.where(jnp.arange(2 * half) < half, 0.0, -jnp.inf), rows_BCPW.shape).astype(
        rows_BCPW.dtype
    )
