"""The past that outlives a call: records of fixed size and pages of entries (see `nn/state.py` for the interface).

Arrays are updated in place where they are donated, at the cost of what is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from v4jax import config
from v4jax.core.qtensor import QTensor
from v4jax.nn.hot import Hot
from v4jax.nn.memory import get, in_host, put
from v4jax.nn.state import NEVER, Chunk, Rows, Windows, empty_window, pytree
from v4jax.nn.window import FEW


class Pool:
    """Numbered pages of rows, in some format: arrays [pages, slots, ...], read and written by page and slot in it.

    A format says how rows are stored. encoded: those rows [..., width] as a pool of arrays [..., n]; decoded: the rows
    of such a pool, in dtype `compute`. shape: pages, rows of a page, numbers of a row.
    """

    shape: tuple[int, int, int]

    def encoded(self, rows: jax.Array) -> Pool:
        raise NotImplementedError

    def decoded(self, compute: jnp.dtype) -> jax.Array:
        raise NotImplementedError

    def coded(self) -> QTensor | None:
        """The rows as they are, of a format that stores them in e4m3."""
        return None

    def write(self, page: jax.Array, slot: jax.Array, rows: jax.Array) -> Pool:
        """The pool with `rows` [..., width] at int32 page [...] and slot [...]; those out of range are dropped."""
        return jax.tree.map(lambda a, new: put(a, new, page, slot), self, self.encoded(rows))

    def take(self, page: jax.Array, slot: jax.Array, compute: jnp.dtype) -> jax.Array:
        """Rows [..., width] in dtype `compute` at page [...] and slot [...], which lie in range (else: some row)."""
        return jax.tree.map(lambda a: get(a, page, slot), self).decoded(compute)

    def pages(self, page: jax.Array) -> Pool:
        """All rows of these pages, as a pool of arrays [..., slots, n]."""
        return jax.tree.map(lambda a: get(a, page), self)


@pytree
class Plain(Pool):
    """A pool of floats: array [pages, slots, width]."""

    array: jax.Array

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pages, rows of a page, numbers of a row."""
        return self.array.shape

    def encoded(self, rows: jax.Array) -> Plain:
        return Plain(rows.astype(self.array.dtype))

    def decoded(self, compute: jnp.dtype) -> jax.Array:
        return self.array.astype(compute)


@pytree
class New:
    """Entries on their way to host memory: rows of a pool [B, C, ...], at page_BC and slot_BC in it (out of range: not
    complete), and index_BC in their row. They are written there when the layer is done, since XLA:TPU would bring all
    of an array to the device that is written by the host and then read by the same program."""

    rows: Pool
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
class Late:
    """Rows [B, N, W] on their way to a tail in host memory: to slots slot_BN of record_BN (out of range: nowhere). They
    are written there when `New` is, and for the same reason. read: true, and comes out of what was read of the tail."""

    rows_BNW: jax.Array
    record_BN: jax.Array
    slot_BN: jax.Array
    read: jax.Array


@pytree
class Paged:
    """A `View` of the pages that a table names. hot: copies through which a decode step reads picked rows; new: entries
    that are not in those pages yet."""

    main: Pool
    index: Pool | None
    hot: Hot | None
    new: New | None
    table_BA: jax.Array
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    segments_BC: None = None

    @property
    def size(self) -> int:
        return self.table_BA.shape[1] * self.main.shape[1]

    def rows(self, first, count):
        return self._run(self.main, first, count)

    def keys(self, first, count, coded=False):
        return self._run(self.index, first, count, coded)

    def take_rows(self, pick_BTK):
        slot_BTK = jnp.maximum(pick_BTK, 0)
        if self.hot is None or pick_BTK.shape[1] > FEW:
            return self._take(self.main, slot_BTK), self
        wanted_BTK = (pick_BTK >= 0) & ~self.new.at(slot_BTK, self.main.shape[0])[0]
        hot, row_BTK = self.hot.holding(self.main, *self._spot(self.main, slot_BTK), wanted_BTK)
        rows = hot.rows.take(jnp.zeros_like(row_BTK), row_BTK, self.dtype)
        return self._with_new(rows, slot_BTK), dataclasses.replace(self, hot=hot)

    def take_keys(self, pick_BTK):
        return self._take(self.index, jnp.maximum(pick_BTK, 0))

    def _run(self, pool: Pool, first: jax.Array, count: int, coded: bool = False) -> jax.Array | QTensor:
        """Whole pages where a run is made of them, rows one by one where it is not."""
        slots, pages = pool.shape[1], self.table_BA.shape[1]
        if count % slots:
            slot = jnp.broadcast_to(first + jnp.arange(count), (self.table_BA.shape[0], count))
            return self._take(pool, slot)
        numbers = jnp.minimum(first // slots + jnp.arange(count // slots), pages - 1)
        pages = pool.pages(self.table_BA[:, numbers])
        rows = (coded and pages.coded()) or pages.decoded(self.dtype)
        rows = jax.tree.map(lambda a: a.reshape(a.shape[0], count, a.shape[-1]), rows)
        if pool is not self.main:
            return rows
        return self._with_new(rows, jnp.broadcast_to(first + jnp.arange(count), rows.shape[:2]))

    def _take(self, pool: Pool, slot: jax.Array) -> jax.Array:
        rows = pool.take(*self._spot(pool, slot), self.dtype)
        return self._with_new(rows, slot) if pool is self.main else rows

    def _with_new(self, rows: jax.Array, index: jax.Array) -> jax.Array:
        """Rows [B, ..., H] of entries index [B, ...], with the new ones among them."""
        if self.new is None:
            return rows
        inside, number = self.new.at(index, self.main.shape[0])
        row = jnp.arange(index.shape[0]).reshape(-1, *[1] * (index.ndim - 1))
        new = jax.tree.map(lambda a: a[row, number], self.new.rows).decoded(self.dtype)
        return jnp.where(inside[..., None], new, rows)

    def _spot(self, pool: Pool, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Page, and slot in it, of entries counted in their row."""
        slots, row = pool.shape[1], jnp.arange(slot.shape[0]).reshape(-1, *[1] * (slot.ndim - 1))
        return self.table_BA[row, jnp.minimum(slot // slots, self.table_BA.shape[1] - 1)], slot % slots


@pytree
class Kept:
    """What outlives a call.

    ring_ZSH: for each record the last `window` rows (and a few more, so that speculation can go back), token t in slot
    t mod size. tails: per compressor the projected rows of the last one (HCA) or two (CSA) windows, and a few more,
    float32 [records, size, W], token t in slot t mod size. main, index: pools of entries and indexer keys. hot: where
    `main` lies in host memory, copies of it; new: what is to be written there, late: to a tail "main" in host memory,
    both None between calls.
    """

    ring_ZSH: jax.Array
    tails: dict[str, jax.Array]
    main: Pool | None
    index: Pool | None
    hot: Hot | None = None
    new: New | None = None
    late: Late | None = None

    def window(self, kv_BTH: jax.Array, chunk: Chunk, size: int) -> tuple[Rows, Kept]:
        """The ring with the call's tokens in it, if it has room beside `size`; else its last rows, then the call's."""
        (_, slots, _), T, record_B = self.ring_ZSH.shape, kv_BTH.shape[1], chunk.where.record_B
        if T <= slots - size + 1:
            ring_ZSH = _write_few(self.ring_ZSH, kv_BTH, chunk)
            last_B1 = chunk.order_BT[:, -1:]
            order = last_B1 - (last_B1 - jnp.arange(slots)) % slots
            rows = Rows(ring_ZSH[record_B], jnp.where(order >= 0, order, NEVER))
        else:
            ring_BSH, past_order = self.ring_ZSH[record_B], chunk.start_B[:, None] - size + jnp.arange(size)
            past = jnp.take_along_axis(ring_BSH, (past_order % slots)[..., None], axis=1)
            order = jnp.concatenate([jnp.where(past_order >= 0, past_order, NEVER), chunk.order_BT], axis=1)
            rows = Rows(jnp.concatenate([past, kv_BTH.astype(past.dtype)], axis=1), order)
            ring_ZSH = self.ring_ZSH.at[record_B].set(_ring_after(ring_BSH, kv_BTH, chunk))
        return rows, dataclasses.replace(self, ring_ZSH=ring_ZSH)

    def windows(self, name: str, rows_BTW: jax.Array, chunk: Chunk, ratio: int, overlap: bool) -> tuple[Windows, Kept]:
        """Windows that end inside the call, pieced together from the tail and the call's rows."""
        tail_ZSW, record_B, back = self.tails[name], chunk.where.record_B, int(overlap)
        (_, slots, _), T = tail_ZSW.shape, rows_BTW.shape[1]
        count = (ratio - 1 + T) // ratio
        first_B = chunk.start_B // ratio
        order = ((first_B - back) * ratio)[:, None] + jnp.arange((count + back) * ratio)
        entry, real_B = first_B[:, None] + jnp.arange(count), T if chunk.count_B is None else chunk.count_B
        complete = (entry + 1) * ratio <= (chunk.start_B + real_B)[:, None]
        few, late = T <= slots - (1 + back) * ratio + 1, self.late
        if in_host(tail_ZSW):
            tail_BSW, late = _read_far(tail_ZSW, rows_BTW, chunk, complete.any() if few else None)
        elif few:
            tail_ZSW = _write_few(tail_ZSW, rows_BTW, chunk)
            tail_BSW = tail_ZSW[record_B]
        else:
            tail_BSW = tail_ZSW[record_B]
            tail_ZSW = tail_ZSW.at[record_B].set(_ring_after(tail_BSW, rows_BTW, chunk))
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
            before = jnp.where((entry == 0)[..., None, None], empty_window(rows[:, :count]), rows[:, :count])
        state = dataclasses.replace(self, tails=self.tails | {name: tail_ZSW}, late=late)
        return Windows(now, before, entry, entry * ratio, complete), state

    def extend(
        self, kv_BCH: jax.Array, index_BCL: jax.Array | None, windows: Windows, chunk: Chunk, ratio: int
    ) -> Kept:
        """Write complete entries at their index; the others go out of range and are dropped."""
        table_BA, (pages, slots, _) = chunk.where.table_BA, self.main.shape
        number = jnp.minimum(windows.index_BC // slots, table_BA.shape[1] - 1)
        page_BC = jnp.where(windows.complete_BC, jnp.take_along_axis(table_BA, number, axis=1), pages)
        slot_BC = windows.index_BC % slots
        if self.hot is None:

            def write(pools):
                main, index = pools
                return main.write(page_BC, slot_BC, kv_BCH), index and index.write(page_BC, slot_BC, index_BCL)

            main, index = _in_place(write, (self.main, self.index), windows.complete_BC.any())
            return dataclasses.replace(self, main=main, index=index)
        old_BC = self.hot.found(page_BC, slot_BC)
        rows = jax.eval_shape(self.main.encoded, kv_BCH)
        rows = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), rows)

        def forget(pools):  # encoded here as there, for the same bits: what is fused with what decides them
            index, hot, _ = pools
            index, hot = index.write(page_BC, slot_BC, index_BCL), hot.without(page_BC, slot_BC, old_BC)
            return index, hot, self.main.encoded(kv_BCH)

        index, hot, rows = _in_place(forget, (self.index, self.hot, rows), windows.complete_BC.any())
        new = New(rows, page_BC, slot_BC, windows.index_BC)
        return dataclasses.replace(self, index=index, hot=hot, new=new)

    def view(self, chunk: Chunk, dtype: jnp.dtype, times: int = 1) -> Paged | None:
        """The pages of the rows, every row `times` times, read as `dtype`."""
        if self.main is None:
            return None
        table_BA = chunk.where.table_BA
        rows = jax.tree.map(lambda a: jnp.repeat(a, times, axis=0) if times > 1 else a, (self.new, table_BA))
        return Paged(self.main, self.index, self.hot, *rows, dtype)

    def after(self, view: Paged | None) -> Kept:
        """With the copies that reading made."""
        return self if self.hot is None else dataclasses.replace(self, hot=view.hot)

    def records(self, change: Callable[[jax.Array], jax.Array]) -> Kept:
        """With `change` applied to every array of records."""
        tails = {name: change(tail) for name, tail in self.tails.items()}
        return dataclasses.replace(self, ring_ZSH=change(self.ring_ZSH), tails=tails)

    def wiped(self, page_A: jax.Array) -> Kept:
        """With zeros in these pages, int32; those out of range are passed over."""
        zeros = lambda pool: jax.tree.map(lambda a: put(a, 0, page_A), pool)
        return dataclasses.replace(self, main=zeros(self.main), index=zeros(self.index)).recopied(page_A)

    def recopied(self, page_A: jax.Array) -> Kept:
        """Without copies of these pages, to be called when they were written to."""
        return self if self.hot is None else dataclasses.replace(self, hot=self.hot.without_pages(page_A))

    def settled(self, done: jax.Array) -> Kept:
        """What outlives the call: everything, and what is new where it belongs."""
        # Written when all has been read, or the compilers would keep a copy of what is read: XLA:TPU heeds the barrier,
        # both a number that comes out of what was fetched and says where to write, though it is always the same.
        first = done[(0,) * done.ndim]
        kept = self
        if self.new is not None:
            new, *_ = jax.lax.optimization_barrier((self.new, self.hot.entry_S, first))
            page_BC = jnp.where(self.hot.entry_S[0] < 0, new.page_BC, self.main.shape[0])
            write = lambda main: jax.tree.map(lambda a, rows: put(a, rows, page_BC, new.slot_BC), main, new.rows)
            main = _in_place(write, self.main, (page_BC < self.main.shape[0]).any())
            kept = dataclasses.replace(kept, main=main, new=None)
        if self.late is not None:
            late, _ = jax.lax.optimization_barrier((self.late, first))
            tail_ZSW = self.tails["main"]
            slot_BN = jnp.where(self.late.read, late.slot_BN, tail_ZSW.shape[1])
            write = lambda tail_ZSW: put(tail_ZSW, late.rows_BNW, late.record_BN, slot_BN)
            tail_ZSW = _in_place(write, tail_ZSW, (slot_BN < tail_ZSW.shape[1]).any())
            kept = dataclasses.replace(kept, tails=self.tails | {"main": tail_ZSW}, late=None)
        return kept


def new_kept(
    model: config.Model,
    kind: str,
    records: int,
    pool: Callable[[str], Pool],
    dtype: jnp.dtype,
    slack: int = 0,
) -> Kept:
    """Empty state of one layer: `records` records in `dtype`, and the pools that `pool("main")`, `pool("index")` make.

    A speculating engine goes back by up to `slack` tokens: rings and tails keep that many more.
    """
    main, index, tails = None, None, {}
    if kind != "swa":
        ratio, overlap = model.ratio(kind), 2 if kind == "csa" else 1
        tail = lambda width: jnp.zeros((records, overlap * ratio + slack, 2 * overlap * width), jnp.float32)
        main, tails["main"] = pool("main"), tail(model.head_dim)
        if kind == "csa":
            index, tails["index"] = pool("index"), tail(model.indexer.head_dim)
    return Kept(jnp.zeros((records, model.window + slack, model.head_dim), dtype), tails, main, index)


def _in_place(write, arrays, needed: jax.Array):
    """write(arrays), where bool `needed` may say at run time that it would change nothing.

    XLA:CPU fuses the update of an array into what reads it afterwards, which then also reads the array as it was, so
    that all of it must be copied first. A loop of one turn at most keeps the two apart.
    """
    loop = lambda arrays: jax.lax.fori_loop(0, needed.astype(jnp.int32), lambda _, arrays: write(arrays), arrays)
    return jax.lax.platform_dependent(arrays, cpu=loop, default=write)


def _slots(chunk: Chunk, slots: int) -> jax.Array:
    """Where the call's rows belong in a ring, int32 [B, T]: order mod slots, or `slots` for padding."""
    real_BT = chunk.order_BT >= 0
    if chunk.count_B is not None:
        real_BT &= chunk.order_BT < (chunk.start_B + chunk.count_B)[:, None]
    return jnp.where(real_BT, chunk.order_BT % slots, slots)


def _write_few(rings_ZSH: jax.Array, rows_BTH: jax.Array, chunk: Chunk) -> jax.Array:
    """Rings with the call's real rows, fewer than a ring has slots, at slot (order mod slots) of their records."""
    slot_BT, record_B1 = _slots(chunk, rings_ZSH.shape[1]), chunk.where.record_B[:, None]
    write = lambda rings: rings.at[record_B1, slot_BT].set(rows_BTH.astype(rings.dtype), mode="drop")
    return _in_place(write, rings_ZSH, (slot_BT < rings_ZSH.shape[1]).any())


def _ring_after(ring_BSH: jax.Array, rows_BTH: jax.Array, chunk: Chunk) -> jax.Array:
    """The rings of the batch's rows, which were ring_BSH, with the last of the call's real rows."""
    slots, T = ring_BSH.shape[1], rows_BTH.shape[1]
    real_B = jnp.full(ring_BSH.shape[0], T) if chunk.count_B is None else chunk.count_B
    last_B = chunk.start_B + real_B - 1
    order = last_B[:, None] - (last_B[:, None] - jnp.arange(slots)) % slots  # the newest token of each slot
    source = order - chunk.start_B[:, None]
    new = jnp.take_along_axis(rows_BTH.astype(ring_BSH.dtype), jnp.clip(source, 0, T - 1)[..., None], axis=1)
    return jnp.where((source >= 0)[..., None], new, ring_BSH)


def _read_far(
    tail_ZSW: jax.Array, rows_BTW: jax.Array, chunk: Chunk, wanted: jax.Array | None
) -> tuple[jax.Array, Late]:
    """Tails of the batch's rows, out of host memory: [B, slots, W], and what is to be written there.

    wanted: of a few rows, whether any window will be read, else nothing is fetched; the tails are then with these rows
    in them. None: of many rows, and the tails as they were.
    """
    (_, slots, _), record_B = tail_ZSW.shape, chunk.where.record_B
    if wanted is None:
        tail_BSW = get(tail_ZSW, record_B)
        new = _ring_after(tail_BSW, rows_BTW, chunk)
        slot_BN = jnp.broadcast_to(jnp.arange(slots), new.shape[:2])
    else:
        tail_BSW = jnp.zeros((record_B.shape[0], *tail_ZSW.shape[1:]), tail_ZSW.dtype)
        fetch = lambda _, tail_BSW: get(tail_ZSW, record_B)
        tail_BSW = jax.lax.fori_loop(0, wanted.astype(jnp.int32), fetch, tail_BSW)
        new, slot_BN = rows_BTW.astype(tail_ZSW.dtype), _slots(chunk, slots)
    first = jax.lax.bitcast_convert_type(tail_BSW[0, 0, 0], jnp.uint32)
    if wanted is not None:
        tail_BSW = tail_BSW.at[jnp.arange(record_B.shape[0])[:, None], slot_BN].set(new, mode="drop")
    return tail_BSW, Late(new, jnp.broadcast_to(record_B[:, None], slot_BN.shape), slot_BN, (first | 1) > 0)
