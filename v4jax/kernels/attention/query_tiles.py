"""Attention in tiles of queries, so that memory grows with tile size times row length, not with its square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from v4jax.kernels.tuning import tuned


class WindowRows(Protocol):
    """A pytree of arrays [B, S, ...]: the rows that sliding-window attention reads."""

    def padded(self, count: int) -> WindowRows:
        """Return the rows followed by `count` rows that no query attends."""
        ...


def map_query_tiles(attend_tile: Callable, queries, rows: WindowRows, reader: Callable[[int], object], window: int):
    """Apply `attend_tile` to tiles of the queries and to the window rows of each tile.

    Up to a tuned number of tiles are merged into the batch axis. More tiles are computed one by one, and the backward
    pass recomputes each of them.

    Args:
        attend_tile: function (queries, rows, entries) to (o, loss, entries after the reads), on arrays with a tile of
            queries on axis 1.
        queries: pytree of arrays [B, T, ...].
        rows: window rows; row `window` belongs to the first query, and S = window + T unless all queries fit one tile.
        reader: function of a number of repeats to the source of entries with each batch row repeated, None without.
        window: rows before a query that it may attend.

    Returns:
        o and loss [B, T, ...], and the source of entries after the reads; None if there were several tiles, whose
        reads leave no trace.
    """
    numbers = tuned("attention", queries)
    B, T = jax.tree.leaves(queries)[0].shape[:2]
    size = window * max(1, numbers["query_tile"] // window)  # a tile reads its own rows and the `window` rows before
    if T <= size:
        return attend_tile(queries, rows, reader(1))
    tiles, pad = -(-T // size), -T % size
    tiled = lambda a: a.reshape(B, tiles, size, *a.shape[2:])
    split = lambda a: tiled(jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2)))

    def overlapping(a):  # [B, window + T, ...] to [B, tiles, window + size, ...]
        before = tiled(a[:, : tiles * size])[:, :, :window]
        return jnp.concatenate([before, tiled(a[:, window:])], axis=2)

    arguments = (jax.tree.map(split, queries), jax.tree.map(overlapping, rows.padded(pad)))
    if tiles <= numbers["max_batched_tiles"]:  # merged into the batch axis: matmuls read the arrays without a copy
        merged = jax.tree.map(lambda a: a.reshape(B * tiles, *a.shape[2:]), arguments)
        o, loss, _ = attend_tile(*merged, reader(tiles))
    else:
        entries = reader(1)
        one = jax.checkpoint(lambda tile: attend_tile(*tile, entries)[:2])
        out = jax.lax.map(one, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), arguments))
        o, loss = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(B * tiles, *a.shape[2:]), out)
    join = lambda a: a.reshape(B, tiles * size, *a.shape[2:])[:, :T]
    return join(o), join(loss), None
