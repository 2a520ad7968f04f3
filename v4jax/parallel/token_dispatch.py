"""Dispatch of rows (tokens) to the devices that own their experts, and the way back (combine).

`lax.ragged_all_to_all` sends exactly the rows that have to move. XLA:CPU does not implement it, so a dense variant
gathers the rows of all devices and selects from them. Both run inside `shard_map`, and both are differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

NO_RAGGED = {"cpu"}  # platforms without `lax.ragged_all_to_all`


@dataclass(frozen=True)
class TokenDispatcher:
    """Row counts between the P devices along `axes`, seen from one of them.

    Each device sorts the rows it sends by destination. The rows it receives (arrivals) are ordered by source. Arrivals
    are processed in rounds of `room` rows: round r holds arrivals r * room to (r + 1) * room - 1. Rounds bound the
    memory, and no row is dropped.

    Attributes:
        axes: mesh axes along which rows move. P is the product of their sizes.
        platform: platform of the devices, which decides between `lax.ragged_all_to_all` and the dense variant.
        room: rows of a round.
        me: int32 scalar, index of this device along `axes`.
        count_PP: int32 [source, destination], number of rows to send; the same array on every device.
    """

    axes: tuple[str, ...]
    platform: str
    room: int
    me: jax.Array
    count_PP: jax.Array

    @property
    def base_PP(self) -> jax.Array:
        """int32 [source, destination]: index of the first row for the destination among the source's sorted rows."""
        return jnp.cumsum(self.count_PP, axis=1) - self.count_PP

    @property
    def start_PP(self) -> jax.Array:
        """int32 [source, destination]: index of the first row from the source among the destination's arrivals."""
        return jnp.cumsum(self.count_PP, axis=0) - self.count_PP

    @property
    def rounds(self) -> jax.Array:
        """int32 scalar: rounds that the destination with the most arrivals needs; the same on every device."""
        return -(-self.count_PP.sum(0).max() // self.room)

    def arrivals(self, turn: jax.Array) -> jax.Array:
        """Return int32 [room], the arrival index of each slot of round `turn`. An index >= `arriving` is empty."""
        return turn * self.room + jnp.arange(self.room, dtype=jnp.int32)

    @property
    def arriving(self) -> jax.Array:
        """int32 scalar: number of rows that arrive on this device in all rounds."""
        return self.count_PP.sum(0)[self.me]

    def _parts(self, turn: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the rows of round `turn` for each (source, destination) pair, three int32 arrays [P, P].

        They are the first row on the source, the first slot on the destination, and the number of rows. A pair
        without rows in this round may have a negative slot.
        """
        first = turn * self.room
        begin = jnp.clip(first - self.start_PP, 0, self.count_PP)
        end = jnp.clip(first + self.room - self.start_PP, 0, self.count_PP)
        return self.base_PP + begin, self.start_PP + begin - first, end - begin

    def dispatch(self, rows_RD: jax.Array, turn: jax.Array) -> jax.Array:
        """Send rows to their destinations.

        Args:
            rows_RD: rows of this device [R, D], sorted by destination.
            turn: int32 scalar, the round.

        Returns:
            The rows that arrive on this device in this round, [room, D]. Empty slots are zero.
        """
        if self.platform not in NO_RAGGED:
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

    def combine(self, done_CD: jax.Array, turn: jax.Array, destination_R: jax.Array) -> jax.Array:
        """Send the results of one round back to the sources of their rows.

        Args:
            done_CD: results of this device's slots [room, D], in the order of `dispatch`.
            turn: int32 scalar, the round.
            destination_R: int32 [R], the destination of each row of this device, in sorted order.

        Returns:
            [R, D] in the order of this device's sorted rows, zero in rows of other rounds. The sum over all rounds is
            the complete result.
        """
        if self.platform not in NO_RAGGED:
            source, slot, number = self._parts(turn)
            return jax.lax.ragged_all_to_all(
                done_CD,
                jnp.zeros((len(destination_R), *done_CD.shape[1:]), done_CD.dtype),
                jnp.maximum(slot[:, self.me], 0),
                number[:, self.me],
                source[:, self.me],
                number[self.me],
                axis_name=self.axes,
            )
        all_PCD = jax.lax.all_gather(done_CD, self.axes)
        own = jnp.arange(len(destination_R)) - self.base_PP[self.me, destination_R]
        slot = self.start_PP[self.me, destination_R] + own - turn * self.room
        here = (slot >= 0) & (slot < self.room)
        return jnp.where(here[:, None], all_PCD[destination_R, jnp.clip(slot, 0, self.room - 1)], 0)
