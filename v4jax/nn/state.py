"""What a layer keeps of the tokens it has seen, and the one interface through which attention reads it.

Attention never knows where its past lies. It asks a `Past` for four things: the rows of the sliding window, the
compression windows that a call completes, a place for the new entries, and the entries themselves (scored and
gathered by index). Two implementations here:

* `Fresh`: the call is the whole history (training, scoring). Nothing outlives the call.
* `Kept`: arrays with room for a fixed number of tokens, updated by every call (generation); rows of the batch may
  differ in length. A decode step touches the window, the picked entries and the indexer keys, nothing else.

Both are pytrees and are passed in and out of the forward explicitly.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from v4jax import config

_NEVER = -(2**30)  # order of a row that holds nothing: before every window


def _pytree(cls):
    """Frozen dataclass registered as a pytree; fields marked static are part of the structure."""
    cls = dataclass(frozen=True)(cls)
    static = [f.name for f in dataclasses.fields(cls) if f.metadata.get("static")]
    dynamic = [f.name for f in dataclasses.fields(cls) if f.name not in static]
    return jax.tree_util.register_dataclass(cls, dynamic, static)


@_pytree
class Chunk:
    """The tokens of one call.

    tokens_BT int32; positions_BT int32 (rotary position: inside the document); order_BT int32 (place in the row's
    history, which decides who sees whom); segments_BT int32 or None (document of each token, 0 = padding);
    count_B int32 or None (tokens of each row that are real; the rest is padding on the right, None = all).
    """

    tokens_BT: jax.Array
    positions_BT: jax.Array
    order_BT: jax.Array
    segments_BT: jax.Array | None = None
    count_B: jax.Array | None = None

    @property
    def start_B(self) -> jax.Array:
        """Tokens seen before this call."""
        return self.order_BT[:, 0]


@_pytree
class Rows:
    """Keys (= values) of single tokens: kv_BSH, their order_BS, and segments_BS where documents are packed."""

    kv_BSH: jax.Array
    order_BS: jax.Array
    segments_BS: jax.Array | None = None

    def padded(self, count: int) -> Rows:
        """With `count` rows appended that no query sees."""
        after = ((0, 0), (0, count))
        segments = None if self.segments_BS is None else jnp.pad(self.segments_BS, after)
        return Rows(
            jnp.pad(self.kv_BSH, (*after, (0, 0))), jnp.pad(self.order_BS, after, constant_values=_NEVER), segments
        )


@_pytree
class Windows:
    """Compression windows that this call may complete: `now` and (overlapped layers) the one `before` each.

    now_BCPW, before_BCPW or None; index_BC int32 is the entry's index in the row; position_BC int32 the rotary position
    of its first token; complete_BC bool says whether its last token has been seen.
    """

    now_BCPW: jax.Array
    before_BCPW: jax.Array | None
    index_BC: jax.Array
    position_BC: jax.Array
    complete_BC: jax.Array


@_pytree
class Entries:
    """Compressed entries of one layer: kv_BCH, indexer keys index_BCL (CSA), and segments_BC where packed."""

    kv_BCH: jax.Array
    index_BCL: jax.Array | None = None
    segments_BC: jax.Array | None = None

    def repeated(self, times: int) -> Entries:
        """Every row `times` times in a row."""
        return jax.tree.map(lambda a: jnp.repeat(a, times, axis=0), self)


@_pytree
class Fresh:
    """No past: the call's own tokens are all there is. Documents start at multiples of the compression ratios."""

    entries: Entries | None = None

    def window(self, kv_BTH: jax.Array, chunk: Chunk, size: int) -> tuple[Rows, Fresh]:
        """`size` empty rows, then the call's rows."""
        before = ((0, 0), (size, 0))
        rows = Rows(
            jnp.pad(kv_BTH, (*before, (0, 0))),
            jnp.pad(chunk.order_BT, before, constant_values=_NEVER),
            None if chunk.segments_BT is None else jnp.pad(chunk.segments_BT, before),
        )
        return rows, self

    def windows(self, name: str, rows_BTW: jax.Array, chunk: Chunk, ratio: int, overlap: bool) -> tuple[Windows, Fresh]:
        """Whole windows by reshape; `rows` hold values and gates side by side (gates: second half of W)."""
        B, T, W = rows_BTW.shape
        count = T // ratio
        now = rows_BTW[:, : count * ratio].reshape(B, count, ratio, W)
        first = slice(0, count * ratio, ratio)
        before = None
        if overlap:
            before = jnp.concatenate([_empty_window(now[:, :1]), now[:, :-1]], axis=1)[:, :count]
            if chunk.segments_BT is not None:
                segment_BC = chunk.segments_BT[:, first]
                starts = segment_BC != jnp.pad(segment_BC, ((0, 0), (1, 0)))[:, :-1]
                before = jnp.where(starts[..., None, None], _empty_window(before), before)
        index = jnp.broadcast_to(jnp.arange(count), (B, count))
        return Windows(now, before, index, chunk.positions_BT[:, first], jnp.ones_like(index, bool)), self

    def extend(
        self, kv_BCH: jax.Array, index_BCL: jax.Array | None, windows: Windows, chunk: Chunk, ratio: int
    ) -> Fresh:
        """Keep the call's entries for the call itself."""
        count = kv_BCH.shape[1]
        segments = None if chunk.segments_BT is None else chunk.segments_BT[:, : count * ratio : ratio]
        return Fresh(Entries(kv_BCH, index_BCL, segments))

    def repeated(self, times: int) -> Fresh:
        """For reading alone: the entries of every row `times` times."""
        return dataclasses.replace(self, entries=self.entries and self.entries.repeated(times))

    def settled(self) -> Fresh:
        """What outlives the call: nothing."""
        return Fresh()


@_pytree
class Kept:
    """Contiguous arrays with room for a fixed number of tokens.

    ring_BSH: the last `window` rows, token t in slot t mod window. tails: per compressor the projected rows of the
    last one (HCA) or two (CSA) windows, slot t mod size, float32. entries: all compressed entries.
    """

    ring_BSH: jax.Array
    tails: dict[str, jax.Array]
    entries: Entries | None

    def window(self, kv_BTH: jax.Array, chunk: Chunk, size: int) -> tuple[Rows, Kept]:
        """One token: the ring with that token in it. More: the ring's rows in order, then the call's rows."""
        T = kv_BTH.shape[1]
        ring = _ring_write(self.ring_BSH, kv_BTH, chunk)
        if T == 1:
            last_B = chunk.start_B
            order = last_B[:, None] - (last_B[:, None] - jnp.arange(size)) % size
            rows = Rows(ring, jnp.where(order >= 0, order, _NEVER))
        else:
            past_order = chunk.start_B[:, None] - size + jnp.arange(size)
            past = jnp.take_along_axis(self.ring_BSH, (past_order % size)[..., None], axis=1)
            order = jnp.concatenate([jnp.where(past_order >= 0, past_order, _NEVER), chunk.order_BT], axis=1)
            rows = Rows(jnp.concatenate([past, kv_BTH.astype(past.dtype)], axis=1), order)
        return rows, dataclasses.replace(self, ring_BSH=ring)

    def windows(self, name: str, rows_BTW: jax.Array, chunk: Chunk, ratio: int, overlap: bool) -> tuple[Windows, Kept]:
        """Windows that end inside the call, pieced together from the tail and the call's rows."""
        tail = self.tails[name]
        size, T = tail.shape[1], rows_BTW.shape[1]
        count = (ratio - 1 + T) // ratio
        first_entry_B = chunk.start_B // ratio
        first_token_B = (first_entry_B - int(overlap)) * ratio
        order = first_token_B[:, None] + jnp.arange((count + int(overlap)) * ratio)
        source = jnp.where(order < chunk.start_B[:, None], order % size, size + order - chunk.start_B[:, None])
        both = jnp.concatenate([tail, rows_BTW.astype(tail.dtype)], axis=1)
        rows = jnp.take_along_axis(both, jnp.minimum(source, size + T - 1)[..., None], axis=1)
        rows = rows.reshape(rows.shape[0], count + int(overlap), ratio, -1)
        now, before = rows[:, int(overlap) :], None
        entry = first_entry_B[:, None] + jnp.arange(count)
        if overlap:
            before = jnp.where((entry == 0)[..., None, None], _empty_window(rows[:, :count]), rows[:, :count])
        real_B = T if chunk.count_B is None else chunk.count_B
        complete = (entry + 1) * ratio <= (chunk.start_B + real_B)[:, None]
        tails = self.tails | {name: _ring_write(tail, rows_BTW, chunk)}
        return Windows(now, before, entry, entry * ratio, complete), dataclasses.replace(self, tails=tails)

    def extend(
        self, kv_BCH: jax.Array, index_BCL: jax.Array | None, windows: Windows, chunk: Chunk, ratio: int
    ) -> Kept:
        """Write complete entries at their index; the others go out of range and are dropped."""
        row, old = jnp.arange(kv_BCH.shape[0])[:, None], self.entries
        slot_BC = jnp.where(windows.complete_BC, windows.index_BC, old.kv_BCH.shape[1])
        put = lambda array, new: array.at[row, slot_BC].set(new.astype(array.dtype), mode="drop")
        index = None if index_BCL is None else put(old.index_BCL, index_BCL)
        return dataclasses.replace(self, entries=Entries(put(old.kv_BCH, kv_BCH), index))

    def repeated(self, times: int) -> Kept:
        """For reading alone: the entries of every row `times` times."""
        return dataclasses.replace(self, entries=self.entries and self.entries.repeated(times))

    def settled(self) -> Kept:
        """What outlives the call: everything."""
        return self


Past = Fresh | Kept


def new_kept(model: config.Model, kind: str, batch: int, tokens: int, dtype: jnp.dtype) -> Kept:
    """Empty state of one layer for `batch` rows of at most `tokens` tokens; entries and window in `dtype`."""
    entries, tails = None, {}
    if kind != "swa":
        ratio, overlap = model.ratio(kind), 2 if kind == "csa" else 1
        count = max(1, tokens // ratio)
        index = jnp.zeros((batch, count, model.indexer.head_dim), dtype) if kind == "csa" else None
        entries = Entries(jnp.zeros((batch, count, model.head_dim), dtype), index)
        tails["main"] = jnp.zeros((batch, overlap * ratio, 2 * overlap * model.head_dim), jnp.float32)
        if kind == "csa":
            tails["index"] = jnp.zeros((batch, overlap * ratio, 2 * overlap * model.indexer.head_dim), jnp.float32)
    return Kept(jnp.zeros((batch, model.window, model.head_dim), dtype), tails, entries)


def _empty_window(rows_BCPW: jax.Array) -> jax.Array:
    """Rows that vanish in the pooling: value 0, gate -inf."""
    half = rows_BCPW.shape[-1] // 2
    return jnp.broadcast_to(jnp.where(jnp.arange(2 * half) < half, 0.0, -jnp.inf), rows_BCPW.shape).astype(
        rows_BCPW.dtype
    )


def _ring_write(ring_BSH: jax.Array, rows_BTH: jax.Array, chunk: Chunk) -> jax.Array:
    """Ring with the call's real rows written at slot (order mod size); the last `size` of them remain."""
    size, T = ring_BSH.shape[1], rows_BTH.shape[1]
    rows = rows_BTH.astype(ring_BSH.dtype)
    real_B = jnp.full(ring_BSH.shape[0], T) if chunk.count_B is None else chunk.count_B
    if T == 1:
        slot = jnp.where(real_B > 0, chunk.start_B % size, size)
        return ring_BSH.at[jnp.arange(ring_BSH.shape[0]), slot].set(rows[:, 0], mode="drop")
    last_B = chunk.start_B + real_B - 1
    order = last_B[:, None] - (last_B[:, None] - jnp.arange(size)) % size  # the newest token of each slot
    source = order - chunk.start_B[:, None]
    new = jnp.take_along_axis(rows, jnp.clip(source, 0, T - 1)[..., None], axis=1)
    return jnp.where((source >= 0)[..., None], new, ring_BSH)
