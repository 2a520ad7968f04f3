"""The paged KV cache of one layer: state slots of fixed size and blocks of entries.

`PagedLayerCache` implements `LayerCache` of `nn/kv_cache_interface.py`. Donated arrays are updated in place, so an
update costs only the bytes that it writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from v4jax import config
from v4jax.cache.entry_cache import DeviceEntryCache, HostPool
from v4jax.cache.entry_pool import EntryPool
from v4jax.core.pytree import pytree
from v4jax.core.qtensor import QTensor
from v4jax.kernels.attention import PagedOperands
from v4jax.kernels.tuning import tuned
from v4jax.nn.kv_cache_interface import (
    NO_TOKEN,
    CompressionWindows,
    EntryReader,
    ForwardBatch,
    WindowKV,
    identity_window,
)
from v4jax.parallel.host_memory import host_gather, host_scatter, is_host


@pytree
class PendingEntries:
    """New entries that `commit` will write to the pool in host memory.

    The write waits until the layer is done: XLA:TPU would copy a whole host array to the device if one program first
    wrote it on the host and then read it.

    Attributes:
      rows: encoded entries [B, C, ...].
      page_BC: int32 block of each entry in the pool; out of range for an incomplete entry, which is dropped.
      slot_BC: int32 slot of each entry in its block.
      index_BC: int32 index of each entry in its batch row.
    """

    rows: EntryPool
    page_BC: jax.Array
    slot_BC: jax.Array
    index_BC: jax.Array

    def at(self, index: jax.Array, pages: int) -> tuple[jax.Array, jax.Array]:
        """For entries `index` [B, ...], return (bool, whether pending; int32, position in C). pages: pool blocks."""
        wide = lambda a: a.reshape(-1, *[1] * (index.ndim - 1))
        number, count = index - wide(self.index_BC[:, 0]), self.page_BC.shape[1]
        inside, number = (number >= 0) & (number < count), jnp.clip(number, 0, count - 1)
        return inside & (self.page_BC[wide(jnp.arange(index.shape[0])), number] < pages), number


@pytree
class PendingState:
    """Compressor state rows that `commit` will write to host memory, deferred for the reason of `PendingEntries`.

    Attributes:
      rows_BNW: the rows [B, N, W].
      record_BN: int32 state slot of each row.
      slot_BN: int32 position in the compressor state; out of range for a row that is not written.
      read: scalar bool, always True, computed from the fetched state. It exists only to give the write a data
        dependence on the read (see `PagedLayerCache.commit`).
    """

    rows_BNW: jax.Array
    record_BN: jax.Array
    slot_BN: jax.Array
    read: jax.Array


@pytree
class PagedEntryReader:
    """An `EntryReader` over the blocks of a block table.

    Attributes:
      entries: pool of entries.
      index_keys: pool of index keys (CSA layers), else None.
      device_cache: device cache of host-resident entries, through which a decode step reads its top-k entries.
      pending_entries: new entries that are not in the pool yet; reads overlay them.
      block_table_BA: int32 blocks of each batch row.
      dtype: dtype that rows are decoded to.
    """

    entries: EntryPool
    index_keys: EntryPool | None
    device_cache: DeviceEntryCache | None
    pending_entries: PendingEntries | None
    block_table_BA: jax.Array
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    segments_BC: None = None

    @property
    def size(self) -> int:
        """Number of entries that the block table of a row has room for."""
        return self.block_table_BA.shape[1] * self.entries.shape[1]

    def read_entries(self, first: jax.Array, count: int) -> jax.Array:
        """Return entries first .. first + count - 1 of every row, pending ones included, [B, count, H]."""
        rows = self._read_range(self.entries, first, count)
        assert not isinstance(rows, QTensor)  # entries are decoded
        return rows

    def read_index_keys(self, first: jax.Array, count: int, raw_fp8: bool = False) -> jax.Array | QTensor:
        """Return the index keys of the same range, [B, count, L]; with `raw_fp8`, plain e4m3 keys as a QTensor."""
        assert self.index_keys is not None  # only CSA layers read index keys
        return self._read_range(self.index_keys, first, count, raw_fp8)

    def gather_entries(self, pick_BTK: jax.Array) -> tuple[jax.Array, PagedEntryReader]:
        """Return the entries at int32 pick_BTK, [B, T, K, H], and the reader after the read.

        With host-resident entries, a call of no more queries per row than a decode step has reads through the device
        cache, which then holds the fetched entries. A larger call reads from host memory directly.
        """
        slot_BTK = jnp.maximum(pick_BTK, 0)
        if self.device_cache is None or pick_BTK.shape[1] > tuned("attention")["max_decode_queries"]:
            return self._gather(self.entries, slot_BTK), self
        assert isinstance(self.entries, HostPool) and self.pending_entries is not None  # with a device cache
        wanted_BTK = (pick_BTK >= 0) & ~self.pending_entries.at(slot_BTK, self.entries.shape[0])[0]
        hot, row_BTK = self.device_cache.fetch(self.entries, *self._physical(self.entries, slot_BTK), wanted_BTK)
        rows = hot.rows.gather(jnp.zeros_like(row_BTK), row_BTK, self.dtype)
        return self._overlay_pending(rows, slot_BTK), dataclasses.replace(self, device_cache=hot)

    def gather_index_keys(self, pick_BTK: jax.Array) -> jax.Array:
        """Return the index keys at int32 pick_BTK, [B, T, K, L]."""
        assert self.index_keys is not None  # only CSA layers read index keys
        return self._gather(self.index_keys, jnp.maximum(pick_BTK, 0))

    def operands(self) -> PagedOperands | None:
        """Return the planes of the pool and the block table; None if the entries are in host memory."""
        return self.entries.operands(self.block_table_BA, self.dtype)

    def _read_range(self, pool: EntryPool, first: jax.Array, count: int, raw_fp8: bool = False) -> jax.Array | QTensor:
        """Read `count` rows from `first` on: by block if `count` is a multiple of the block's rows, else row by row."""
        slots, pages = pool.shape[1], self.block_table_BA.shape[1]
        if count % slots:
            slot = jnp.broadcast_to(first + jnp.arange(count), (self.block_table_BA.shape[0], count))
            return self._gather(pool, slot)
        numbers = jnp.minimum(first // slots + jnp.arange(count // slots), pages - 1)
        pages = pool.gather_blocks(self.block_table_BA[:, numbers])
        rows = (raw_fp8 and pages.raw_fp8()) or pages.decode(self.dtype)
        rows = jax.tree.map(lambda a: a.reshape(a.shape[0], count, a.shape[-1]), rows)
        if pool is not self.entries:
            return rows
        return self._overlay_pending(rows, jnp.broadcast_to(first + jnp.arange(count), rows.shape[:2]))

    def _gather(self, pool: EntryPool, slot: jax.Array) -> jax.Array:
        """Read the rows of `pool` at entry indices `slot` [B, ...] row by row."""
        rows = pool.gather(*self._physical(pool, slot), self.dtype)
        return self._overlay_pending(rows, slot) if pool is self.entries else rows

    def _overlay_pending(self, rows: jax.Array, index: jax.Array) -> jax.Array:
        """Replace those of `rows` [B, ..., H], the entries `index` [B, ...], that are pending by their new values."""
        if self.pending_entries is None:
            return rows
        inside, number = self.pending_entries.at(index, self.entries.shape[0])
        row = jnp.arange(index.shape[0]).reshape(-1, *[1] * (index.ndim - 1))
        new = jax.tree.map(lambda a: a[row, number], self.pending_entries.rows).decode(self.dtype)
        return jnp.where(inside[..., None], new, rows)

    def _physical(self, pool: EntryPool, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map entry indices of each batch row [B, ...] to (block, slot in the block)."""
        slots, row = pool.shape[1], jnp.arange(slot.shape[0]).reshape(-1, *[1] * (slot.ndim - 1))
        return self.block_table_BA[row, jnp.minimum(slot // slots, self.block_table_BA.shape[1] - 1)], slot % slots


@pytree
class PagedLayerCache:
    """The KV cache of one layer, which persists between calls.

    Attributes:
      window_ring_ZSH: ring of the last `sliding_window` KV rows of each state slot, plus slack rows so that
        speculative decoding can go back. Token t is at position t mod size.
      compressor_state: by compressor name, a ring of the projected rows of the last window (HCA) or last two windows
        (CSA) plus slack rows, float32 [state slots, size, W]. Token t is at position t mod size.
      entries: pool of entries; None in layers without compression.
      index_keys: pool of index keys (CSA), else None.
      device_cache: device cache of `entries` if those are in host memory, else None.
      pending_entries: entries to be written to host memory. None between calls.
      pending_state: rows to be written to compressor state "main" in host memory. None between calls.
    """

    window_ring_ZSH: jax.Array
    compressor_state: dict[str, jax.Array]
    entries: EntryPool | None
    index_keys: EntryPool | None
    device_cache: DeviceEntryCache | None = None
    pending_entries: PendingEntries | None = None
    pending_state: PendingState | None = None

    def update_window(self, kv_BTH: jax.Array, chunk: ForwardBatch, size: int) -> tuple[WindowKV, PagedLayerCache]:
        """Write the call's rows to the ring and return the window KV.

        This is the ring itself if it holds the call's rows beside `size` past rows, else both concatenated.
        """
        (_, slots, _), T, state_slot_B = self.window_ring_ZSH.shape, kv_BTH.shape[1], chunk.slots.state_slot_B
        if T <= slots - size + 1:
            window_ring_ZSH = _write_few(self.window_ring_ZSH, kv_BTH, chunk)
            last_B1 = chunk.seq_index_BT[:, -1:]
            order = last_B1 - (last_B1 - jnp.arange(slots)) % slots
            rows = WindowKV(window_ring_ZSH[state_slot_B], jnp.where(order >= 0, order, NO_TOKEN))
        else:
            ring_BSH, past_order = self.window_ring_ZSH[state_slot_B], chunk.start_B[:, None] - size + jnp.arange(size)
            past = jnp.take_along_axis(ring_BSH, (past_order % slots)[..., None], axis=1)
            order = jnp.concatenate([jnp.where(past_order >= 0, past_order, NO_TOKEN), chunk.seq_index_BT], axis=1)
            rows = WindowKV(jnp.concatenate([past, kv_BTH.astype(past.dtype)], axis=1), order)
            window_ring_ZSH = self.window_ring_ZSH.at[state_slot_B].set(_ring_after(ring_BSH, kv_BTH, chunk))
        return rows, dataclasses.replace(self, window_ring_ZSH=window_ring_ZSH)

    def compression_windows(
        self, name: str, rows_BTW: jax.Array, chunk: ForwardBatch, ratio: int, overlap: bool
    ) -> tuple[CompressionWindows, PagedLayerCache]:
        """Assemble the windows that end inside the call from the compressor state and the call's rows."""
        tail_ZSW, state_slot_B, back = self.compressor_state[name], chunk.slots.state_slot_B, int(overlap)
        (_, slots, _), T = tail_ZSW.shape, rows_BTW.shape[1]
        count = (ratio - 1 + T) // ratio
        first_B = chunk.start_B // ratio
        order = ((first_B - back) * ratio)[:, None] + jnp.arange((count + back) * ratio)
        entry, real_B = first_B[:, None] + jnp.arange(count), T if chunk.num_valid_B is None else chunk.num_valid_B
        complete = (entry + 1) * ratio <= (chunk.start_B + real_B)[:, None]
        few, late = T <= slots - (1 + back) * ratio + 1, self.pending_state
        if is_host(tail_ZSW):
            tail_BSW, late = _read_host_state(tail_ZSW, rows_BTW, chunk, complete.any() if few else None)
        elif few:
            tail_ZSW = _write_few(tail_ZSW, rows_BTW, chunk)
            tail_BSW = tail_ZSW[state_slot_B]
        else:
            tail_BSW = tail_ZSW[state_slot_B]
            tail_ZSW = tail_ZSW.at[state_slot_B].set(_ring_after(tail_BSW, rows_BTW, chunk))
        if few:
            both, source = tail_BSW, order % slots
        else:
            both = jnp.concatenate([tail_BSW, rows_BTW.astype(tail_BSW.dtype)], axis=1)
            old = order < chunk.start_B[:, None]
            source = jnp.where(old, order % slots, jnp.minimum(order - chunk.start_B[:, None], T - 1) + slots)
        rows = jnp.take_along_axis(both, source[..., None], axis=1)
        rows = rows.reshape(rows.shape[0], count + back, ratio, -1)
        now, before = rows[:, back:], None
        if overlap:
            before = jnp.where((entry == 0)[..., None, None], identity_window(rows[:, :count]), rows[:, :count])
        state = dataclasses.replace(self, compressor_state=self.compressor_state | {name: tail_ZSW}, pending_state=late)
        return CompressionWindows(now, before, entry, entry * ratio, complete), state

    def append(
        self,
        kv_BCH: jax.Array,
        index_BCL: jax.Array | None,
        windows: CompressionWindows,
        chunk: ForwardBatch,
        ratio: int,
    ) -> PagedLayerCache:
        """Write complete entries at their index. Incomplete ones get a block out of range and are dropped."""
        assert self.entries is not None  # only layers with compression append
        block_table_BA, (pages, slots, _) = chunk.slots.block_table_BA, self.entries.shape
        number = jnp.minimum(windows.index_BC // slots, block_table_BA.shape[1] - 1)
        page_BC = jnp.where(windows.complete_BC, jnp.take_along_axis(block_table_BA, number, axis=1), pages)
        slot_BC = windows.index_BC % slots
        if self.device_cache is None:

            def write(pools):
                main, index = pools
                return main.write(page_BC, slot_BC, kv_BCH), index and index.write(page_BC, slot_BC, index_BCL)

            main, index = _in_place(write, (self.entries, self.index_keys), windows.complete_BC.any())
            return dataclasses.replace(self, entries=main, index_keys=index)
        old_BC = self.device_cache.lookup(page_BC, slot_BC)
        encode = self.entries.encode
        rows = jax.eval_shape(encode, kv_BCH)
        rows = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), rows)

        def forget(pools):
            # Encode inside the same fused region as the on-device path: XLA's fusion choice changes the last bits,
            # and both paths must agree bit for bit.
            index, hot, _ = pools
            index, hot = index.write(page_BC, slot_BC, index_BCL), hot.invalidate(page_BC, slot_BC, old_BC)
            return index, hot, encode(kv_BCH)

        index, hot, rows = _in_place(forget, (self.index_keys, self.device_cache, rows), windows.complete_BC.any())
        new = PendingEntries(rows, page_BC, slot_BC, windows.index_BC)
        return dataclasses.replace(self, index_keys=index, device_cache=hot, pending_entries=new)

    def reader(self, chunk: ForwardBatch, dtype: jnp.dtype, times: int = 1) -> PagedEntryReader | None:
        """Return a reader of the batch rows' blocks in `dtype`, each batch row repeated `times` times."""
        if self.entries is None:
            return None
        pending, block_table_BA = self.pending_entries, chunk.slots.block_table_BA
        if times > 1:
            pending, block_table_BA = jax.tree.map(lambda a: jnp.repeat(a, times, axis=0), (pending, block_table_BA))
        return PagedEntryReader(self.entries, self.index_keys, self.device_cache, pending, block_table_BA, dtype)

    def with_reader(self, view: EntryReader | None) -> PagedLayerCache:
        """Take over the device cache of a reader, which holds the entries that the reader fetched."""
        if self.device_cache is None:
            return self
        assert isinstance(view, PagedEntryReader)  # made by `reader`
        return dataclasses.replace(self, device_cache=view.device_cache)

    def map_state(self, change: Callable[[jax.Array], jax.Array]) -> PagedLayerCache:
        """Apply `change` to every array of state slots."""
        tails = {name: change(tail) for name, tail in self.compressor_state.items()}
        return dataclasses.replace(self, window_ring_ZSH=change(self.window_ring_ZSH), compressor_state=tails)

    def zero_blocks(self, page_A: jax.Array) -> PagedLayerCache:
        """Zero the int32 blocks `page_A`. Numbers out of range are ignored."""
        zeros = lambda pool: jax.tree.map(lambda a: host_scatter(a, 0, page_A), pool)
        zeroed = dataclasses.replace(self, entries=zeros(self.entries), index_keys=zeros(self.index_keys))
        return zeroed.invalidate_copies(page_A)

    def invalidate_copies(self, page_A: jax.Array) -> PagedLayerCache:
        """Drop the blocks `page_A` from the device cache. Call it after writing to these blocks in host memory."""
        if self.device_cache is None:
            return self
        return dataclasses.replace(self, device_cache=self.device_cache.invalidate_blocks(page_A))

    def commit(self, done: jax.Array) -> PagedLayerCache:
        """Write pending entries and state to host memory, once the layer's output `done` is computed."""
        # Write only after every read, or XLA keeps a copy of the whole pool. XLA:TPU orders by optimization_barrier. In
        # addition, the write index depends on a fetched value (the condition is always true), which orders by data.
        first = done[(0,) * done.ndim]
        cache = self
        if self.pending_entries is not None:
            assert self.entries is not None and self.device_cache is not None  # pending ones are host-resident
            new, *_ = jax.lax.optimization_barrier((self.pending_entries, self.device_cache.entry_of_slot_S, first))
            page_BC = jnp.where(self.device_cache.entry_of_slot_S[0] < 0, new.page_BC, self.entries.shape[0])
            write_plane = lambda a, rows: host_scatter(a, rows, page_BC, new.slot_BC)
            write = lambda main: jax.tree.map(write_plane, main, new.rows)
            main = _in_place(write, self.entries, (page_BC < self.entries.shape[0]).any())
            cache = dataclasses.replace(cache, entries=main, pending_entries=None)
        if self.pending_state is not None:
            late, _ = jax.lax.optimization_barrier((self.pending_state, first))
            tail_ZSW = self.compressor_state["main"]
            slot_BN = jnp.where(self.pending_state.read, late.slot_BN, tail_ZSW.shape[1])
            write = lambda tail_ZSW: host_scatter(tail_ZSW, late.rows_BNW, late.record_BN, slot_BN)
            tail_ZSW = _in_place(write, tail_ZSW, (slot_BN < tail_ZSW.shape[1]).any())
            state = self.compressor_state | {"main": tail_ZSW}
            cache = dataclasses.replace(cache, compressor_state=state, pending_state=None)
        return cache


def new_paged_layer_cache(
    model: config.Model,
    kind: str,
    records: int,
    pool: Callable[[str], EntryPool | None],
    dtype: jnp.dtype,
    slack: int = 0,
) -> PagedLayerCache:
    """Allocate the empty cache of one layer.

    Args:
      model: the model's config.
      kind: layer type ("swa", "csa" or "hca").
      records: number of state slots.
      pool: makes the pool of entries for "main" and that of index keys for "index"; None leaves it out.
      dtype: dtype of the window ring. Compressor state is float32.
      slack: extra rows of each ring, the number of tokens that speculative decoding may go back.
    """
    main, index, tails = None, None, {}
    if kind != "swa":
        ratio, overlap = model.compress_rate(kind), 2 if kind == "csa" else 1
        tail = lambda width: jnp.zeros((records, overlap * ratio + slack, 2 * overlap * width), jnp.float32)
        main, tails["main"] = pool("main"), tail(model.head_dim)
        if kind == "csa":
            index, tails["index"] = pool("index"), tail(model.indexer.index_head_dim)
    ring_ZSH = jnp.zeros((records, model.sliding_window + slack, model.head_dim), dtype)
    return PagedLayerCache(ring_ZSH, tails, main, index)


def _in_place(write, arrays, needed: jax.Array):
    """Return write(arrays). The traced bool `needed` is False if the write would change nothing.

    XLA:CPU fuses an update into the later read of the array. The fused read also needs the old array, so XLA copies
    all of it first. A loop of at most one iteration prevents the fusion.
    """
    loop = lambda arrays: jax.lax.fori_loop(0, needed.astype(jnp.int32), lambda _, arrays: write(arrays), arrays)
    return jax.lax.platform_dependent(arrays, cpu=loop, default=write)


def _slots(chunk: ForwardBatch, slots: int) -> jax.Array:
    """Ring position of each of the call's rows, int32 [B, T]: sequence index mod slots, or `slots` for padding."""
    valid_BT = chunk.seq_index_BT >= 0
    if chunk.num_valid_B is not None:
        valid_BT &= chunk.seq_index_BT < (chunk.start_B + chunk.num_valid_B)[:, None]
    return jnp.where(valid_BT, chunk.seq_index_BT % slots, slots)


def _write_few(rings_ZSH: jax.Array, rows_BTH: jax.Array, chunk: ForwardBatch) -> jax.Array:
    """Write the call's valid rows, fewer than `slots`, to the rings of their state slots at index mod slots."""
    slot_BT, record_B1 = _slots(chunk, rings_ZSH.shape[1]), chunk.slots.state_slot_B[:, None]
    write = lambda rings: rings.at[record_B1, slot_BT].set(rows_BTH.astype(rings.dtype), mode="drop")
    return _in_place(write, rings_ZSH, (slot_BT < rings_ZSH.shape[1]).any())


def _ring_after(ring_BSH: jax.Array, rows_BTH: jax.Array, chunk: ForwardBatch) -> jax.Array:
    """Return the rings `ring_BSH` of the batch rows after writing the last of the call's valid rows."""
    slots, T = ring_BSH.shape[1], rows_BTH.shape[1]
    real_B = jnp.full(ring_BSH.shape[0], T) if chunk.num_valid_B is None else chunk.num_valid_B
    last_B = chunk.start_B + real_B - 1
    order = last_B[:, None] - (last_B[:, None] - jnp.arange(slots)) % slots  # the newest token of each slot
    source = order - chunk.start_B[:, None]
    new = jnp.take_along_axis(rows_BTH.astype(ring_BSH.dtype), jnp.clip(source, 0, T - 1)[..., None], axis=1)
    return jnp.where((source >= 0)[..., None], new, ring_BSH)


def _read_host_state(
    tail_ZSW: jax.Array, rows_BTW: jax.Array, chunk: ForwardBatch, wanted: jax.Array | None
) -> tuple[jax.Array, PendingState]:
    """Read the batch rows' compressor state from host memory.

    Args:
      tail_ZSW: compressor state in host memory.
      rows_BTW: the call's rows.
      chunk: the call.
      wanted: None if the call has more rows than the ring has room for. Else a traced bool, whether any window is
        complete; if not, nothing is fetched.

    Returns:
      The state [B, slots, W], which includes the call's rows unless `wanted` is None, and the rows to write back.
    """
    (_, slots, _), state_slot_B = tail_ZSW.shape, chunk.slots.state_slot_B
    if wanted is None:
        tail_BSW = host_gather(tail_ZSW, state_slot_B)
        new = _ring_after(tail_BSW, rows_BTW, chunk)
        slot_BN = jnp.broadcast_to(jnp.arange(slots), new.shape[:2])
    else:
        tail_BSW = jnp.zeros((state_slot_B.shape[0], *tail_ZSW.shape[1:]), tail_ZSW.dtype)
        fetch = lambda _, tail_BSW: host_gather(tail_ZSW, state_slot_B)
        tail_BSW = jax.lax.fori_loop(0, wanted.astype(jnp.int32), fetch, tail_BSW)
        new, slot_BN = rows_BTW.astype(tail_ZSW.dtype), _slots(chunk, slots)
    first = jax.lax.bitcast_convert_type(tail_BSW[0, 0, 0], jnp.uint32)
    if wanted is not None:
        tail_BSW = tail_BSW.at[jnp.arange(state_slot_B.shape[0])[:, None], slot_BN].set(new, mode="drop")
    return tail_BSW, PendingState(new, jnp.broadcast_to(state_slot_B[:, None], slot_BN.shape), slot_BN, (first | 1) > 0)
