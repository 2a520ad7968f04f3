"""Rows that travel between the devices of a mesh axis: as many as there are, to where they belong, and back.

`lax.ragged_all_to_all` sends exactly these rows. XLA:CPU does not implement it; there a dense twin gathers the rows of
all devices and picks. Both are used inside `shard_map`, and both can be differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class TokenDispatcher:
    """Who sends how many rows to whom, seen from one device of `axes`, P devices in all.

    A device's rows lie sorted by destination; what arrives lies sorted by source. Arrivals are worked on in rounds of
    `room` rows, so memory has a bound and no row is ever dropped: round r holds the arrivals r * room and following.

    count_PP int32: rows from source (first axis) to destination; the same array on every device. me: own place. ragged:
    which of the two ways.
    """

    axes: tuple[str, ...]
    ragged: bool
    room: int
    me: jax.Array
    count_PP: jax.Array

    @property
    def base_PP(self) -> jax.Array:
        """First row of a destination among a source's rows."""
        return jnp.cumsum(self.count_PP, axis=1) - self.count_PP

    @property
    def start_PP(self) -> jax.Array:
        """First row of a source among a destination's arrivals."""
        return jnp.cumsum(self.count_PP, axis=0) - self.count_PP

    @property
    def rounds(self) -> jax.Array:
        """Rounds until the busiest destination is done: int32 scalar."""
        return -(-self.count_PP.sum(0).max() // self.room)

    def arrivals(self, turn: jax.Array) -> jax.Array:
        """Number among all arrivals of each slot of a round: int32 [room]; from `arriving` on, the slot is empty."""
        return turn * self.room + jnp.arange(self.room, dtype=jnp.int32)

    @property
    def arriving(self) -> jax.Array:
        """Rows that arrive here in all rounds."""
        return self.count_PP.sum(0)[self.me]

    def _parts(self, turn: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of each pair's rows, those of a round: first row at the source, first slot at the destination, number."""
        first = turn * self.room
        begin = jnp.clip(first - self.start_PP, 0, self.count_PP)
        end = jnp.clip(first + self.room - self.start_PP, 0, self.count_PP)
        return self.base_PP + begin, self.start_PP + begin - first, end - begin

    def dispatch(self, rows_RD: jax.Array, turn: jax.Array) -> jax.Array:
        """The rows that arrive here in a round, [room, D]; empty slots are zero."""
        if self.ragged:
            source, slot, number = self._parts(turn)
            return jax.lax.ragged_all_to_all(
                rows_RD,
                jnp.zeros((self.room, *rows_RD.shape[1:]), rows_RD.dtype),
                source[self.me],
                number[self.me],
                jnp.maximum(slot[self.me], 0),
                number[:, self.me],
                axis_name=self.axes,
            )
        all_PRD = jax.lax.all_gather(rows_RD, self.axes)
        arrival = self.arrivals(turn)
        ends_P = jnp.cumsum(self.count_PP[:, self.me])
        source = jnp.minimum(jnp.searchsorted(ends_P, arrival, side="right"), len(ends_P) - 1)
        row = self.base_PP[source, self.me] + arrival - self.start_PP[source, self.me]
        picked = all_PRD[source, jnp.clip(row, 0, rows_RD.shape[0] - 1)]
        return jnp.where((arrival < self.arriving)[:, None], picked, 0)

    def combine(self, done_CD: jax.Array, turn: jax.Array, home_R: jax.Array) -> jax.Array:
        """The rows of a round where they came from, [R, D], zero in the rows of other rounds.

        home_R int32: the destination of each own row, in order.
        """
        if self.ragged:
            source, slot, number = self._parts(turn)
            return jax.lax.ragged_all_to_all(
                done_CD,
                jnp.zeros((len(home_R), *done_CD.shape[1:]), done_CD.dtype),
                jnp.maximum(slot[:, self.me], 0),
                number[:, self.me],
                source[:, self.me],
                number[self.me],
                axis_name=self.axes,
            )
        all_PCD = jax.lax.all_gather(done_CD, self.axes)
        own = jnp.arange(len(home_R)) - self.base_PP[self.me, home_R]
        slot = self.start_PP[self.me, home_R] + own - turn * self.room
        here = (slot >= 0) & (slot < self.room)
        return jnp.where(here[:, None], all_PCD[home_R, jnp.clip(slot, 0, self.room - 1)], 0)
