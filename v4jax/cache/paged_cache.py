"""The past that outlives a call: records of fixed size and pages of entries (see `nn/kv_cache_interface.py` for the interface).

Arrays are updated in place where they are donated, at the cost of what is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from v4jax import config
from v4jax.cache.entry_cache import DeviceEntryCache
from v4jax.core.pytree import pytree
from v4jax.core.qtensor import QTensor
from v4jax.nn.attention import MAX_DECODE_QUERIES
from v4jax.nn.kv_cache_interface import NO_TOKEN, CompressionWindows, ForwardBatch, WindowKV, identity_window
from v4jax.parallel.host_memory import host_gather, host_scatter, is_host


class EntryPool:
    """Numbered pages of rows, in some format: arrays [pages, slots, ...], read and written by page and slot in it.

    A format says how rows are stored. encoded: those rows [..., width] as a pool of arrays [..., n]; decoded: the rows
    of such a pool, in dtype `compute`. shape: pages, rows of a page, numbers of a row.
    """

    shape: tuple[int, int, int]

    def encode(self, rows: jax.Array) -> EntryPool:
        raise NotImplementedError

    def decode(self, compute: jnp.dtype) -> jax.Array:
        raise NotImplementedError

    def raw_fp8(self) -> QTensor | None:
        """The rows as they are, of a format that stores them in e4m3."""
        return None

    def write(self, page: jax.Array, slot: jax.Array, rows: jax.Array) -> EntryPool:
        """The pool with `rows` [..., width] at int32 page [...] and slot [...]; those out of range are dropped."""
        return jax.tree.map(lambda a, new: host_scatter(a, new, page, slot), self, self.encode(rows))

    def gather(self, page: jax.Array, slot: jax.Array, compute: jnp.dtype) -> jax.Array:
        """Rows [..., width] in dtype `compute` at page [...] and slot [...], which lie in range (else: some row)."""
        return jax.tree.map(lambda a: host_gather(a, page, slot), self).decode(compute)

    def gather_blocks(self, page: jax.Array) -> EntryPool:
        """All rows of these pages, as a pool of arrays [..., slots, n]."""
        return jax.tree.map(lambda a: host_gather(a, page), self)


@pytree
class FloatPool(EntryPool):
    """A pool of floats: array [pages, slots, width]."""

    array: jax.Array

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pages, rows of a page, numbers of a row."""
        return self.array.shape

    def encode(self, rows: jax.Array) -> FloatPool:
        return FloatPool(rows.astype(self.array.dtype))

    def decode(self, compute: jnp.dtype) -> jax.Array:
        return self.array.astype(compute)


@pytree
class PendingEntries:
    """Entries on their way to host memory: rows of a pool [B, C, ...], at page_BC and slot_BC in it (out of range: not
    complete), and index_BC in their row. They are written there when the layer is done, since XLA:TPU would bring all
    of an array to the device that is written by the host and then read by the same program."""

    rows: EntryPool
    page_BC: jax.Array
    slot_BC: jax.Array
    index_BC: jax.Array

    def at(self, index: jax.Array, pages: int) -> tuple[jax.Array, jax.Array]:
        """(whether entries index [B, ...] are among these, their numbers here)."""
        wide = lambda a: a.reshape(-1, *[1] * (index.ndim - 1))
        number, count = index - wide(self.index_BC[:, 0]), self.page_BC.shape[1]
        inside, number = (number >= 0) & (number < count), jnp.clip(number, 0, count - 1)
        return inside & (self.page_BC[wide(jnp.arange(index.shape[0])), number] < pages), number


@pytree
class PendingState:
    """Rows [B, N, W] on their way to a tail in host memory: to slots slot_BN of record_BN (out of range: nowhere). They
    are written there when `PendingEntries` is, and for the same reason. read: true, and comes out of what was read of the tail."""

    rows_BNW: jax.Array
    record_BN: jax.Array
    slot_BN: jax.Array
    read: jax.Array


@pytree
class PagedEntryReader:
    """A `EntryReader` of the pages that a table names. hot: copies through which a decode step reads picked rows; new: entries
    that are not in those pages yet."""

    entries: EntryPool
    index_keys: EntryPool | None
    device_cache: DeviceEntryCache | None
    pending_entries: PendingEntries | None
    block_table_BA: jax.Array
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    segments_BC: None = None

    @property
    def size(self) -> int:
        return self.block_table_BA.shape[1] * self.entries.shape[1]

    def read_entries(self, first, count):
        return self._read_range(self.entries, first, count)

    def read_index_keys(self, first, count, coded=False):
        return self._read_range(self.index_keys, first, count, coded)

    def gather_entries(self, pick_BTK):
        slot_BTK = jnp.maximum(pick_BTK, 0)
        if self.device_cache is None or pick_BTK.shape[1] > MAX_DECODE_QUERIES:
            return self._gather(self.entries, slot_BTK), self
        wanted_BTK = (pick_BTK >= 0) & ~self.pending_entries.at(slot_BTK, self.entries.shape[0])[0]
        hot, row_BTK = self.device_cache.fetch(self.entries, *self._physical(self.entries, slot_BTK), wanted_BTK)
        rows = hot.rows.gather(jnp.zeros_like(row_BTK), row_BTK, self.dtype)
        return self._overlay_pending(rows, slot_BTK), dataclasses.replace(self, device_cache=hot)

    def gather_index_keys(self, pick_BTK):
        return self._gather(self.index_keys, jnp.maximum(pick_BTK, 0))

    def _read_range(self, pool: EntryPool, first: jax.Array, count: int, coded: bool = False) -> jax.Array | QTensor:
        """Whole pages where a run is made of them, rows one by one where it is not."""
        slots, pages = pool.shape[1], self.block_table_BA.shape[1]
        if count % slots:
            slot = jnp.broadcast_to(first + jnp.arange(count), (self.block_table_BA.shape[0], count))
            return self._gather(pool, slot)
        numbers = jnp.minimum(first // slots + jnp.arange(count // slots), pages - 1)
        pages = pool.gather_blocks(self.block_table_BA[:, numbers])
        rows = (coded and pages.raw_fp8()) or pages.decode(self.dtype)
        rows = jax.tree.map(lambda a: a.reshape(a.shape[0], count, a.shape[-1]), rows)
        if pool is not self.entries:
            return rows
        return self._overlay_pending(rows, jnp.broadcast_to(first + jnp.arange(count), rows.shape[:2]))

    def _gather(self, pool: EntryPool, slot: jax.Array) -> jax.Array:
        rows = pool.gather(*self._physical(pool, slot), self.dtype)
        return self._overlay_pending(rows, slot) if pool is self.entries else rows

    def _overlay_pending(self, rows: jax.Array, index: jax.Array) -> jax.Array:
        """Rows [B, ..., H] of entries index [B, ...], with the new ones among them."""
        if self.pending_entries is None:
            return rows
        inside, number = self.pending_entries.at(index, self.entries.shape[0])
        row = jnp.arange(index.shape[0]).reshape(-1, *[1] * (index.ndim - 1))
        new = jax.tree.map(lambda a: a[row, number], self.pending_entries.rows).decode(self.dtype)
        return jnp.where(inside[..., None], new, rows)

    def _physical(self, pool: EntryPool, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Page, and slot in it, of entries counted in their row."""
        slots, row = pool.shape[1], jnp.arange(slot.shape[0]).reshape(-1, *[1] * (slot.ndim - 1))
        return self.block_table_BA[row, jnp.minimum(slot // slots, self.block_table_BA.shape[1] - 1)], slot % slots


@pytree
class PagedLayerCache:
    """What outlives a call.

    window_ring_ZSH: for each record the last `window` rows (and a few more, so that speculation can go back), token t in slot
    t mod size. tails: per compressor the projected rows of the last one (HCA) or two (CSA) windows, and a few more,
    float32 [records, size, W], token t in slot t mod size. main, index: pools of entries and indexer keys. hot: where
    `main` lies in host memory, copies of it; new: what is to be written there, late: to a tail "main" in host memory,
    both None between calls.
    """

    window_ring_ZSH: jax.Array
    compressor_state: dict[str, jax.Array]
    entries: EntryPool | None
    index_keys: EntryPool | None
    device_cache: DeviceEntryCache | None = None
    pending_entries: PendingEntries | None = None
    pending_state: PendingState | None = None

    def update_window(self, kv_BTH: jax.Array, chunk: ForwardBatch, size: int) -> tuple[WindowKV, PagedLayerCache]:
        """The ring with the call's tokens in it, if it has room beside `size`; else its last rows, then the call's."""
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
        """Windows that end inside the call, pieced together from the tail and the call's rows."""
        tail_ZSW, state_slot_B, back = self.compressor_state[name], chunk.slots.state_slot_B, int(overlap)
        (_, slots, _), T = tail_ZSW.shape, rows_BTW.shape[1]
        count = (ratio - 1 + T) // ratio
        first_B = chunk.start_B // ratio
        order = ((first_B - back) * ratio)[:, None] + jnp.arange((count + back) * ratio)
        entry, real_B = first_B[:, None] + jnp.arange(count), T if chunk.num_valid_B is None else chunk.num_valid_B
        complete = (entry + 1) * ratio <= (chunk.start_B + real_B)[:, None]
        few, late = T <= slots - (1 + back) * ratio + 1, self.pending_state
        if is_host(tail_ZSW):
            tail_BSW, late = _read_far(tail_ZSW, rows_BTW, chunk, complete.any() if few else None)
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
        """Write complete entries at their index; the others go out of range and are dropped."""
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
        rows = jax.eval_shape(self.entries.encode, kv_BCH)
        rows = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), rows)

        def forget(pools):  # encoded here as there, for the same bits: what is fused with what decides them
            index, hot, _ = pools
            index, hot = index.write(page_BC, slot_BC, index_BCL), hot.invalidate(page_BC, slot_BC, old_BC)
            return index, hot, self.entries.encode(kv_BCH)

        index, hot, rows = _in_place(forget, (self.index_keys, self.device_cache, rows), windows.complete_BC.any())
        new = PendingEntries(rows, page_BC, slot_BC, windows.index_BC)
        return dataclasses.replace(self, index_keys=index, device_cache=hot, pending_entries=new)

    def reader(self, chunk: ForwardBatch, dtype: jnp.dtype, times: int = 1) -> PagedEntryReader | None:
        """The pages of the rows, every row `times` times, read as `dtype`."""
        if self.entries is None:
            return None
        block_table_BA = chunk.slots.block_table_BA
        rows = jax.tree.map(
            lambda a: jnp.repeat(a, times, axis=0) if times > 1 else a, (self.pending_entries, block_table_BA)
        )
        return PagedEntryReader(self.entries, self.index_keys, self.device_cache, *rows, dtype)

    def with_reader(self, view: PagedEntryReader | None) -> PagedLayerCache:
        """With the copies that reading made."""
        return self if self.device_cache is None else dataclasses.replace(self, device_cache=view.device_cache)

    def map_state(self, change: Callable[[jax.Array], jax.Array]) -> PagedLayerCache:
        """With `change` applied to every array of records."""
        tails = {name: change(tail) for name, tail in self.compressor_state.items()}
        return dataclasses.replace(self, window_ring_ZSH=change(self.window_ring_ZSH), compressor_state=tails)

    def zero_blocks(self, page_A: jax.Array) -> PagedLayerCache:
        """With zeros in these pages, int32; those out of range are passed over."""
        zeros = lambda pool: jax.tree.map(lambda a: host_scatter(a, 0, page_A), pool)
        return dataclasses.replace(
            self, entries=zeros(self.entries), index_keys=zeros(self.index_keys)
        ).invalidate_copies(page_A)

    def invalidate_copies(self, page_A: jax.Array) -> PagedLayerCache:
        """Without copies of these pages, to be called when they were written to."""
        return (
            self
            if self.device_cache is None
            else dataclasses.replace(self, device_cache=self.device_cache.invalidate_blocks(page_A))
        )

    def commit(self, done: jax.Array) -> PagedLayerCache:
        """What outlives the call: everything, and what is new where it belongs."""
        # Written when all has been read, or the compilers would keep a copy of what is read: XLA:TPU heeds the barrier,
        # both a number that comes out of what was fetched and says where to write, though it is always the same.
        first = done[(0,) * done.ndim]
        kept = self
        if self.pending_entries is not None:
            new, *_ = jax.lax.optimization_barrier((self.pending_entries, self.device_cache.entry_of_slot_S, first))
            page_BC = jnp.where(self.device_cache.entry_of_slot_S[0] < 0, new.page_BC, self.entries.shape[0])
            write = lambda main: jax.tree.map(
                lambda a, rows: host_scatter(a, rows, page_BC, new.slot_BC), main, new.rows
            )
            main = _in_place(write, self.entries, (page_BC < self.entries.shape[0]).any())
            kept = dataclasses.replace(kept, entries=main, pending_entries=None)
        if self.pending_state is not None:
            late, _ = jax.lax.optimization_barrier((self.pending_state, first))
            tail_ZSW = self.compressor_state["main"]
            slot_BN = jnp.where(self.pending_state.read, late.slot_BN, tail_ZSW.shape[1])
            write = lambda tail_ZSW: host_scatter(tail_ZSW, late.rows_BNW, late.record_BN, slot_BN)
            tail_ZSW = _in_place(write, tail_ZSW, (slot_BN < tail_ZSW.shape[1]).any())
            kept = dataclasses.replace(
                kept, compressor_state=self.compressor_state | {"main": tail_ZSW}, pending_state=None
            )
        return kept


def new_paged_layer_cache(
    model: config.Model,
    kind: str,
    records: int,
    pool: Callable[[str], EntryPool],
    dtype: jnp.dtype,
    slack: int = 0,
) -> PagedLayerCache:
    """Empty state of one layer: `records` records in `dtype`, and the pools that `pool("main")`, `pool("index")` make.

    A speculating engine goes back by up to `slack` tokens: rings and tails keep that many more.
    """
    main, index, tails = None, None, {}
    if kind != "swa":
        ratio, overlap = model.compress_rate(kind), 2 if kind == "csa" else 1
        tail = lambda width: jnp.zeros((records, overlap * ratio + slack, 2 * overlap * width), jnp.float32)
        main, tails["main"] = pool("main"), tail(model.head_dim)
        if kind == "csa":
            index, tails["index"] = pool("index"), tail(model.indexer.index_head_dim)
    return PagedLayerCache(
        jnp.zeros((records, model.sliding_window + slack, model.head_dim), dtype), tails, main, index
    )


def _in_place(write, arrays, needed: jax.Array):
    """write(arrays), where bool `needed` may say at run time that it would change nothing.

    XLA:CPU fuses the update of an array into what reads it afterwards, which then also reads the array as it was, so
    that all of it must be copied first. A loop of one turn at most keeps the two apart.
    """
    loop = lambda arrays: jax.lax.fori_loop(0, needed.astype(jnp.int32), lambda _, arrays: write(arrays), arrays)
    return jax.lax.platform_dependent(arrays, cpu=loop, default=write)


def _slots(chunk: ForwardBatch, slots: int) -> jax.Array:
    """Where the call's rows belong in a ring, int32 [B, T]: order mod slots, or `slots` for padding."""
    valid_BT = chunk.seq_index_BT >= 0
    if chunk.num_valid_B is not None:
        valid_BT &= chunk.seq_index_BT < (chunk.start_B + chunk.num_valid_B)[:, None]
    return jnp.where(valid_BT, chunk.seq_index_BT % slots, slots)


def _write_few(rings_ZSH: jax.Array, rows_BTH: jax.Array, chunk: ForwardBatch) -> jax.Array:
    """Rings with the call's real rows, fewer than a ring has slots, at slot (order mod slots) of their records."""
    slot_BT, record_B1 = _slots(chunk, rings_ZSH.shape[1]), chunk.slots.state_slot_B[:, None]
    write = lambda rings: rings.at[record_B1, slot_BT].set(rows_BTH.astype(rings.dtype), mode="drop")
    return _in_place(write, rings_ZSH, (slot_BT < rings_ZSH.shape[1]).any())


def _ring_after(ring_BSH: jax.Array, rows_BTH: jax.Array, chunk: ForwardBatch) -> jax.Array:
    """The rings of the batch's rows, which were ring_BSH, with the last of the call's real rows."""
    slots, T = ring_BSH.shape[1], rows_BTH.shape[1]
    real_B = jnp.full(ring_BSH.shape[0], T) if chunk.num_valid_B is None else chunk.num_valid_B
    last_B = chunk.start_B + real_B - 1
    order = last_B[:, None] - (last_B[:, None] - jnp.arange(slots)) % slots  # the newest token of each slot
    source = order - chunk.start_B[:, None]
    new = jnp.take_along_axis(rows_BTH.astype(ring_BSH.dtype), jnp.clip(source, 0, T - 1)[..., None], axis=1)
    return jnp.where((source >= 0)[..., None], new, ring_BSH)


def _read_far(
    tail_ZSW: jax.Array, rows_BTW: jax.Array, chunk: ForwardBatch, wanted: jax.Array | None
) -> tuple[jax.Array, PendingState]:
    """Tails of the batch's rows, out of host memory: [B, slots, W], and what is to be written there.

    wanted: of a few rows, whether any window will be read, else nothing is fetched; the tails are then with these rows
    in them. None: of many rows, and the tails as they were.
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
