"""The KV cache interface: the batch of one call, and how attention reads and extends a layer's cache.

Attention does not know where cached data is stored. It asks a `LayerCache` for the rows of the sliding window and for
the compression windows that a call completes. It appends the new entries to the cache. It reads entries through an
`EntryReader`, by index: a range of consecutive entries, or a gather of top-k entries. There are two implementations:

* `NoCache` (here): the call holds the full history (training, scoring). Nothing outlives the call.
* `PagedLayerCache` (`cache/paged_cache.py`): arrays that outlive the call (generation). Data of fixed size per row
  (window ring, compressor state) is stored in numbered state slots, entries are stored in numbered KV blocks.
  `ForwardBatch.cache_slots` gives the slot and the blocks of each batch row. Rows may differ in length. A decode step
  reads the window, the top-k entries and the index keys, and nothing else.

Both are pytrees and are explicit arguments and results of the forward. The pools of blocks, quantized ones included,
are in `cache/`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from v4jax.core.pytree import pytree
from v4jax.core.qtensor import QTensor
from v4jax.kernels.attention import EntrySource
from v4jax.parallel.context_parallel import active_context_shards

NO_TOKEN = -(2**30)  # seq_index of an empty window row; it is older than every window, so no query attends it


@pytree
class CacheSlots:
    """State slot and KV blocks of each batch row in a `PagedLayerCache`.

    Attributes:
        state_slot_B: int32 [B], state slot of each row.
        block_table_BA: int32 [B, A], blocks of each row, in the order of its tokens; -1 where the row has no block.
            Writes to -1 are dropped. Reads from -1 return some stored block, which no query attends.
    """

    state_slot_B: jax.Array
    block_table_BA: jax.Array


@pytree
class ForwardBatch:
    """The tokens of one call.

    Attributes:
        tokens_BT: int32 [B, T], token ids.
        positions_BT: int32 [B, T], rotary positions, counted inside the document.
        seq_index_BT: int32 [B, T], index of each token in the row's history. It decides causality and the window.
        segments_BT: int32 [B, T], document of each token in packed rows, 0 for padding; None if rows are not packed.
        num_valid_B: int32 [B], number of valid tokens of each row. The others are padding on the right. None means that
            all tokens are valid.
        cache_slots: state slot and blocks of each row; None means that row b has state slot b and block b alone.
    """

    tokens_BT: jax.Array
    positions_BT: jax.Array
    seq_index_BT: jax.Array
    segments_BT: jax.Array | None = None
    num_valid_B: jax.Array | None = None
    cache_slots: CacheSlots | None = None

    @property
    def start_B(self) -> jax.Array:
        """int32 [B], number of tokens of each row that earlier calls have processed."""
        return self.seq_index_BT[:, 0]

    @property
    def valid_BT(self) -> jax.Array | None:
        """bool [B, T], True for the tokens that count; None if all do.

        A token counts if it is among the first `num_valid_B` of its row, the row is in use (it has a KV block), and the
        token belongs to a document (in packed rows, its segment is above 0). Experts, losses and expert loads leave out
        all others.
        """
        masks = []
        if self.segments_BT is not None:
            masks.append(self.segments_BT > 0)
        if self.num_valid_B is not None:
            masks.append(jnp.arange(self.tokens_BT.shape[1]) < self.num_valid_B[:, None])
        if self.cache_slots is not None:
            masks.append(self.cache_slots.block_table_BA[:, :1] >= 0)
        return jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), self.tokens_BT.shape) if masks else None

    @property
    def slots(self) -> CacheSlots:
        """`cache_slots`, or its default: row b has state slot b and block b."""
        row = jnp.arange(self.tokens_BT.shape[0], dtype=jnp.int32)
        return self.cache_slots or CacheSlots(row, row[:, None])


@pytree
class WindowKV:
    """Uncompressed keys (which are also the values) that sliding-window attention reads, one row per token.

    Attributes:
        kv_BSH: [B, S, H], keys.
        seq_index_BS: int32 [B, S], index of each token in its row's history; NO_TOKEN for an empty row.
        segments_BS: int32 [B, S], document of each token; None if rows are not packed.
    """

    kv_BSH: jax.Array
    seq_index_BS: jax.Array
    segments_BS: jax.Array | None = None

    def padded(self, count: int) -> WindowKV:
        """Return the rows followed by `count` empty rows, which no query attends."""
        after = ((0, 0), (0, count))
        segments = None if self.segments_BS is None else jnp.pad(self.segments_BS, after)
        return WindowKV(
            jnp.pad(self.kv_BSH, (*after, (0, 0))),
            jnp.pad(self.seq_index_BS, after, constant_values=NO_TOKEN),
            segments,
        )


@pytree
class CompressionWindows:
    """Compression windows that this call may complete.

    Attributes:
        now_BCPW: projected values and gates of the tokens of each window, [B, C, P, 2 W]: values first, then gates.
        before_BCPW: the same for the preceding window of each window; None in layers without overlap.
        index_BC: int32 [B, C], index in its row of the entry that the window becomes.
        position_BC: int32 [B, C], rotary position of the window's first token.
        complete_BC: bool [B, C], True if the window's last token has been processed.
    """

    now_BCPW: jax.Array
    before_BCPW: jax.Array | None
    index_BC: jax.Array
    position_BC: jax.Array
    complete_BC: jax.Array


class EntryReader(EntrySource, Protocol):
    """Read access by index to the entries (see `EntrySource`) and index keys of one layer."""

    @property
    def segments_BC(self) -> jax.Array | None:
        """int32 [B, C], document of each entry; None if rows are not packed."""
        ...

    def read_index_keys(self, first: jax.Array, count: int, raw_fp8: bool = False) -> jax.Array | QTensor:
        """Return the index keys of entries first .. first + count - 1 of every row, [B, count, L].

        With `raw_fp8`, keys that are stored in e4m3 are returned as a QTensor instead of being dequantized.
        """
        ...

    def gather_index_keys(self, pick_BTK: jax.Array) -> jax.Array:
        """Return the index keys at int32 pick_BTK, [B, T, K, L]; a negative index gives some finite key."""
        ...


class LayerCache(Protocol):
    """The cache of one layer, as attention uses it. Methods that change it return the changed cache."""

    def update_window(self, kv_BTH: jax.Array, chunk: ForwardBatch, size: int) -> tuple[WindowKV, LayerCache]:
        """Add the call's keys. Return rows that include the last `size` tokens before the call and the call's own."""
        ...

    def compression_windows(
        self, name: str, rows_BTW: jax.Array, chunk: ForwardBatch, ratio: int, overlap: bool
    ) -> tuple[CompressionWindows, LayerCache]:
        """Add the call's projected rows of compressor `name`. Return its windows that may end inside the call.

        Args:
            name: compressor, "main" or "index".
            rows_BTW: values and gates of the call's tokens, concatenated on the last axis.
            chunk: the call.
            ratio: tokens per window.
            overlap: also return the preceding window of each window.
        """
        ...

    def append(
        self,
        kv_BCH: jax.Array,
        index_BCL: jax.Array | None,
        windows: CompressionWindows,
        chunk: ForwardBatch,
        ratio: int,
    ) -> LayerCache:
        """Add the entries and (CSA) index keys that were pooled from `windows`."""
        ...

    def reader(self, chunk: ForwardBatch, dtype: jnp.dtype, times: int = 1) -> EntryReader | None:
        """Return a reader of the entries in `dtype`, every batch row repeated `times` times; None without entries."""
        ...

    def with_reader(self, view: EntryReader | None) -> LayerCache:
        """Return the cache after reads through `view`, a reader of unrepeated rows."""
        ...

    def commit(self, done: jax.Array) -> LayerCache:
        """Return the state that outlives the call. `done` is the layer's output; pending writes come after it."""
        ...


@pytree
class DenseEntries:
    """An `EntryReader` of contiguous arrays.

    Attributes:
        kv_BCH: [B, C, H], entries.
        index_BCL: [B, C, L], index keys; None outside of CSA layers.
        segments_BC: int32 [B, C], document of each entry; None if rows are not packed.
    """

    kv_BCH: jax.Array
    index_BCL: jax.Array | None = None
    segments_BC: jax.Array | None = None

    @property
    def size(self) -> int:
        return self.kv_BCH.shape[1]

    def read_entries(self, first, count):
        return _run(self.kv_BCH, first, count)

    def read_index_keys(self, first, count, raw_fp8=False):
        return _run(self.index_BCL, first, count)

    def gather_entries(self, pick_BTK):
        return _picked(self.kv_BCH, pick_BTK), self

    def gather_index_keys(self, pick_BTK):
        return _picked(self.index_BCL, pick_BTK)

    def operands(self) -> None:
        return None


@pytree
class NoCache:
    """A cache without history: attention reads the call's own tokens alone.

    Packed documents must start at multiples of the compression ratios.
    """

    entries: DenseEntries | None = None

    def update_window(self, kv_BTH: jax.Array, chunk: ForwardBatch, size: int) -> tuple[WindowKV, NoCache]:
        """Return `size` empty rows, then the call's rows."""
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
        """Return the full windows of the call by reshape; a remainder of fewer than `ratio` tokens is dropped.

        `rows_BTW` holds values in the first half of the last axis and gates in the second half.
        """
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
        """Keep the entries until the end of the call."""
        (B, count), segments = kv_BCH.shape[:2], chunk.segments_BT
        if segments is not None:
            segments = segments[:, : count * ratio].reshape(B, count, ratio)[:, :, 0]
        return NoCache(DenseEntries(kv_BCH, index_BCL, segments))

    def reader(self, chunk: ForwardBatch, dtype: jnp.dtype, times: int = 1) -> DenseEntries | None:
        """Return the call's entries, every row repeated `times` times."""
        return jax.tree.map(lambda a: jnp.repeat(a, times, axis=0) if times > 1 else a, self.entries)

    def with_reader(self, view: DenseEntries | None) -> NoCache:
        """Return the cache unchanged."""
        return self

    def commit(self, done: jax.Array) -> NoCache:
        """Return an empty cache: nothing outlives the call."""
        return NoCache()


def _previous(a_BC: jax.Array, empty: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Shift [B, C, ...] by one along C. The first element becomes `empty` of an array of its shape.

    With context parallelism, the first element of a shard comes from the preceding shard.
    """
    shifted = lambda a, before: jnp.concatenate([before, a[:, :-1]], axis=1)
    if (split := active_context_shards()) is None:
        return shifted(a_BC, empty(a_BC[:, :1]))
    return split.run(lambda a: shifted(a, split.halo_left(a, 1, empty(a[:, :1]))), a_BC)


def _run(rows_BCH: jax.Array, first: jax.Array | int, count: int) -> jax.Array:
    """Return rows first .. first + count - 1; indices beyond the end give the last row."""
    size = rows_BCH.shape[1]
    return rows_BCH if count == size else rows_BCH[:, jnp.minimum(first + jnp.arange(count), size - 1)]


def _picked(rows_BCH: jax.Array, pick_BTK: jax.Array) -> jax.Array:
    """Gather [B, T, K, H] from each batch row's own array; negative indices give row 0."""
    return rows_BCH[jnp.arange(pick_BTK.shape[0])[:, None, None], jnp.maximum(pick_BTK, 0)]


def identity_window(rows_BCPW: jax.Array) -> jax.Array:
    """Return a window of the same shape that adds nothing to the pooling softmax: values 0, gates -inf."""
    half = rows_BCPW.shape[-1] // 2
    token_W = jnp.where(jnp.arange(2 * half) < half, 0.0, -jnp.inf)
    return jnp.broadcast_to(token_W, rows_BCPW.shape).astype(rows_BCPW.dtype)
